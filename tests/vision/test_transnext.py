"""TransNeXt and MoH-ViT: the published counts, the authors' checkpoint, any image size, and training with a router."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import heed
from heed.layers.aggregated import AggregatedAttention, LengthScaledAttention
from heed.layers.moh import active_heads, collect_balance
from heed.vision.transnext import TransNeXt, TransNeXtConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "27-moh" / "transnext_tiny.safetensors"
SMALL: dict[str, Any] = {
    "img_size": 64,
    "num_classes": 7,
    "dims": (8, 8, 12, 16),
    "num_heads": (2, 4, 4, 4),
    "mlp_ratios": (2, 2, 2, 2),
    "depths": (1, 1, 1, 1),
    "shared_heads": (2, 0, 2, 1),
    "routed_heads": (0, 2, 1, 2),
    "drop_path": 0.0,
}


def small(**overrides: Any) -> TransNeXt:
    torch.manual_seed(0)
    return TransNeXt(TransNeXtConfig(**SMALL | overrides)).eval()


def golden() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The case's tensors, and the authors' state dict in it."""
    tensors = load_file(GOLDEN)
    assert json.loads(GOLDEN.with_suffix(".json").read_text())["config"]["embed_dims"] == list(SMALL["dims"])
    return tensors, {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}


@pytest.mark.parametrize(
    ("name", "parameters", "active", "heads"),
    [
        ("moh_vit_s80", 49_910_548, 343, 429),
        ("moh_vit_s75", 49_910_548, 323, 429),
        ("moh_vit_b75", 90_020_632, 441, 588),
        ("moh_vit_b50", 90_023_512, 294, 588),
    ],
)
def test_published_counts(name: str, parameters: int, active: int, heads: int) -> None:
    with torch.device("meta"):
        model: Any = heed.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    counts = active_heads(model).values()
    assert sum(count.active for count in counts) == active
    assert sum(count.heads for count in counts) == heads
    assert not list(model.buffers())


def test_routers_are_all_that_is_added() -> None:
    with torch.device("meta"):
        plain, gated = (heed.create_model("moh_vit_s80", depths=(1,) * 4, shared_heads=h) for h in (None, (3, 6, 3, 8)))
    own, counts = ({name: p.numel() for name, p in model.named_parameters()} for model in (plain, gated))
    routers = {name: counts[name] for name in counts.keys() - own.keys()}
    assert all(".router." in name for name in routers)
    assert sum(routers.values()) < 0.005 * sum(own.values())


def test_stages_pool_until_nothing_is_left_to_pool() -> None:
    with torch.device("meta"):
        model: Any = heed.create_model("moh_vit_b50", depths=(1, 1, 1, 1))
        assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000)
    attentions = [stage.blocks[0].attn for stage in model.stages]
    assert [type(layer) for layer in attentions] == [AggregatedAttention] * 3 + [LengthScaledAttention]
    assert [layer.grid[0] for layer in attentions] == [56, 28, 14, 7]
    assert {layer.key_grid for layer in attentions} == {(7, 7)}


@torch.no_grad()
def test_the_authors_checkpoint_gives_their_logits(tmp_path: Path) -> None:
    tensors, state = golden()
    tables = {
        "relative_pos_index1": torch.zeros(4, dtype=torch.long),
        "relative_coords_table1": torch.zeros(4, 2),
        "block1.0.attn.seq_length_scale": torch.zeros(4, 1),
        "block1.0.attn.padding_mask": torch.zeros(4, 9, dtype=torch.bool),
    }
    torch.save({"model": state | tables}, tmp_path / "released.pth")
    save_file(state, tmp_path / "released.safetensors")
    for path in tmp_path.iterdir():
        model = TransNeXt.from_authors(path, "moh_vit_s80", **SMALL)
        torch.testing.assert_close(model(tensors["input.x"]), tensors["output.logits"], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"missing: stages.0.blocks.0.attn.router.wg.weight"):
        TransNeXt.from_authors(
            path, "moh_vit_s80", **SMALL | {"shared_heads": (1, 0, 2, 1), "routed_heads": (1, 2, 1, 2)}
        )


@settings(max_examples=8)
@given(st.integers(1, 80), st.sampled_from([1, 2, 4]))
def test_a_model_of_any_image_size_gives_a_pyramid(side: int, patch: int) -> None:
    model = small(img_size=side, patch_size=patch)
    maps = model.forward_intermediates(torch.randn(2, 3, side, side), intermediates_only=True)
    for found, info in zip(maps, model.feature_info, strict=True):
        reduced = -(-side // info["reduction"])
        assert found.shape == (2, info["num_chs"], reduced, reduced)
    assert model(torch.randn(1, 3, side, side)).isfinite().all()


@pytest.mark.parametrize("shape", [(96, 96), (64, 96), (63, 64)])
def test_images_of_another_size_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"images of {shape[0]} x {shape[1]} pixels given; this model takes 64 x 64"):
        small()(torch.zeros(1, 3, *shape))


def test_weights_move_to_another_image_size() -> None:
    model = small()
    larger = small(img_size=96, pretrain_size=64)
    larger.load_state_dict(model.state_dict())
    assert larger(torch.randn(1, 3, 96, 96)).shape == (1, 7)
    # The same offset in tokens means the same bias.
    before, after = (m.get_submodule("stages.3.blocks.0.attn").position_bias() for m in (model, larger))  # type: ignore[operator]
    torch.testing.assert_close(after.view(4, 3, 3, 3, 3)[:, :2, :2, :2, :2], before.view(4, 2, 2, 2, 2))


def test_what_gets_no_gradient_gets_one_from_the_balance() -> None:
    model, x = small().train(), torch.randn(4, 3, 64, 64)
    with collect_balance(model) as balance:
        model(x).square().mean().backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9}
    assert model.idle_parameters() == {"stages.2.blocks.0.attn.router.wg.weight"} <= silent
    with collect_balance(model) as balance:
        model(x)
    balance.loss().backward()
    assert model.stages[2].blocks[0].attn.router.wg.weight.grad.abs().max() > 1e-6  # type: ignore[index, union-attr]


def test_learns_with_a_router() -> None:
    torch.manual_seed(0)
    model = heed.create_model("moh_vit_micro")
    y = torch.arange(16) % 4
    x = torch.randn(4, 1, 8, 8)[y] + 0.1 * torch.randn(16, 1, 8, 8)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        with collect_balance(model) as balance:
            loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        (loss + 0.01 * balance.loss()).backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_routed_model_compiles_and_is_saved(tmp_path: Path) -> None:
    one = {"dims": (16,), "num_heads": (4,), "mlp_ratios": (2,), "depths": (1,), "pool_ratios": (2,)}
    one |= {"window_sizes": (3,), "shared_heads": (1,), "routed_heads": (2,)}
    model, x = heed.create_model("moh_vit_micro", **one).eval(), torch.randn(2, 1, 8, 8)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(x).square().sum()
    torch.testing.assert_close(loss, model(x).square().sum())
    loss.backward()
    assert model.get_parameter("stages.0.blocks.0.attn.learnable_tokens").grad.any()  # type: ignore[union-attr]
    model.save_pretrained(tmp_path)
    again = heed.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1, 1)}, r"depths=\(1, 1\) has 2 entries for the 4 stages"),
        ({"shared_heads": (2, 0, 2)}, r"shared_heads=\(2, 0, 2\) has 3 entries for the 4 stages"),
        ({"routed_heads": (0, 2)}, r"routed_heads=\(0, 2\) has 2 entries"),
        ({"routed_heads": (1, 2, 1, 2)}, "shared=2 and routed=1 of heads=2"),
        ({"shared_heads": (-1, 0, 2, 1)}, "shared=-1"),
        ({"num_heads": (3, 4, 4, 4)}, "dim=8 is not divisible by num_heads=3"),
        ({"window_sizes": (3, None, 3, 3)}, "need a window"),
        ({"window_sizes": (3, 4, 3, None)}, "window_size=4 must be odd"),
        ({"img_size": 0}, "img_size=0"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)
