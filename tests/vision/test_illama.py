"""iLLaMA: the published sizes, what the soft mask does and does not hide, LLaMA's layer and weights, the training tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import heed
from heed.vision.illama import (
    ROADMAP,
    ILlama,
    ILlamaBlock,
    ILlamaConfig,
    SoftMask,
    SoftMaskedAttention,
    apply_rope,
    rope_table,
)
from heed.vision.illama_analysis import calibration_error, map_rank, quantised
from heed.vision.illama_training import SoftMaskSchedule, soft_mask_rates, training_recipe
from heed.vision.illama_weights import resize_positions, select_elements

EXACT: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
GOLDEN = Path(__file__).parents[1] / "golden" / "07-illama" / "model_tiny.safetensors"
rates = st.floats(0, 1)


def small(**overrides: Any) -> ILlama:
    settings: dict[str, Any] = {"img_size": 8, "patch_size": 2, "num_classes": 5, "dim": 16, "depth": 2, "num_heads": 2}
    return ILlama(ILlamaConfig(**settings | overrides)).eval()


def attention(mode: str, tokens: int = 7) -> tuple[SoftMaskedAttention, Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return SoftMaskedAttention(16, 2, mask_mode=mode), torch.randn(2, tokens, 16), rope_table(tokens, 8)


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [
        ("tiny", 5_701_096, 1.25),
        ("small", 22_018_024, 4.60),
        ("base", 86_502_376, 17.56),
        ("base_384", 86_794_216, 55.48),
        ("large", 310_445_032, 62.79),
        ("large_384", 310_834_152, 194.7),
    ],
)
def test_published_counts(name: str, parameters: int, gmacs: float) -> None:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model: Any = heed.create_model(f"illama_{name}").eval()
        assert sum(p.numel() for p in model.parameters()) == parameters
        model(torch.empty(1, 3, model.config.img_size, model.config.img_size))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize("mode", ["post", "pre"])
def test_an_open_mask_is_none(mode: str) -> None:
    layer, x, rope = attention(mode)
    torch.testing.assert_close(layer(x, SoftMask(1.0), rope), layer(x, None, rope))
    layer_again, _, _ = attention(mode)
    torch.testing.assert_close(layer_again(x, SoftMask(1 - 1e-7), rope), layer(x, None, rope), **EXACT)


@settings(max_examples=10)
@given(rates)
def test_post_is_linear_in_the_rate_and_leaves_the_last_token_alone(rate: float) -> None:
    layer, x, rope = attention("post")
    closed, half, opened = (layer(x, SoftMask(r), rope) for r in (0.0, rate, 1.0))
    torch.testing.assert_close(half, rate * opened + (1 - rate) * closed, **EXACT)
    torch.testing.assert_close(half[:, -1], opened[:, -1], **EXACT)


@settings(max_examples=10)
@given(rates, st.booleans())
def test_maps_are_the_weights(rate: float, opened: bool) -> None:
    for mode in ("post", "pre"):
        layer, x, rope = attention(mode)
        maps = layer.maps(x, SoftMask(rate, opened), rope)
        v = layer.qkv(x)[..., 32:].unflatten(2, (2, 8)).transpose(1, 2)
        mixed = layer.proj((maps @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x, SoftMask(rate, opened), rope), mixed, **EXACT)
        sums = maps.sum(-1)
        if mode == "pre":
            torch.testing.assert_close(sums, torch.ones_like(sums))
        else:
            assert (sums <= 1 + 1e-5).all()
            assert (maps >= rate * layer.maps(x, None, rope) - 1e-6).all()


@pytest.mark.parametrize(("mode", "causal"), [("post", False), ("pre", True)])
def test_only_pre_is_causal(mode: str, causal: bool) -> None:
    layer, x, rope = attention(mode)
    other = x.clone()
    other[:, -1] += 1
    a, b = layer(x, SoftMask(0), rope)[:, :-1], layer(other, SoftMask(0), rope)[:, :-1]
    assert torch.equal(a, b) is causal
    prefix = layer(x[:, :4], SoftMask(0), tuple(t[:4] for t in rope))
    assert torch.allclose(prefix, layer(x, SoftMask(0), rope)[:, :4], atol=1e-5) is causal


@settings(max_examples=10)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_rope_scores_depend_on_the_distance_alone(n: int, m: int, shift: int) -> None:
    rope = rope_table(64, 8)
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()

    def score(at_q: int, at_k: int) -> Tensor:
        turned = [apply_rope(x, (rope[0][i : i + 1], rope[1][i : i + 1])) for x, i in ((q, at_q), (k, at_k))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(n, m), score(n + shift, m + shift), **EXACT)


def test_a_first_class_token_sees_nothing_but_itself() -> None:
    x = torch.randn(3, 3, 8, 8)
    collapsed = small(**ROADMAP["causal, class token first"])(x)
    assert torch.equal(collapsed, collapsed[:1].expand(3, -1))
    # After the softmax its one weight still has a normaliser that knows the image.
    post = small(**ROADMAP["causal, class token first"] | {"mask_mode": "post"})(x)
    for step in ("causal, modified mask", "causal, class token last", "iLLaMA"):
        assert not torch.allclose(*small(**ROADMAP[step])(x)[:2])
    assert not torch.allclose(post[0], post[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("step", ROADMAP)
def test_every_step_of_the_roadmap_is_a_model(step: str) -> None:
    model = small(**ROADMAP[step])
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    names = dict(model.named_parameters())
    assert ("blocks.0.mlp.fc3.weight" in names) == (model.config.ffn == "swiglu")
    assert ("norm.bias" in names) == (model.config.norm == "layer")
    assert ("pos_embed" in names) == (model.config.positions != "rope")
    assert model.feature_info[-1]["num_chs"] == model.stage_maps(torch.randn(1, 3, 8, 8))[-1].shape[1]


def test_maps_are_row_major_patches_without_the_class_token() -> None:
    x = torch.zeros(1, 3, 8, 8)
    x[..., 2:4, 6:8] = 1  # patch (1, 3)
    for class_first in (False, True):
        model = small(class_first=class_first, depth=1, positions="rope")
        tokens = model.patch_embed(x)[0].T.view(16, 4, 4)
        assert (tokens - tokens[:, :1, :1]).abs().sum(0).nonzero().tolist() == [[1, 3]]
        (final, (last,)) = model.forward_intermediates(x)
        assert last.shape == (1, 16, 4, 4)
        torch.testing.assert_close(model.forward_head(final), model(x))


def test_is_llamas_decoder_layer() -> None:
    """In "pre" mode, and once q and k have transformers' order of channels: even ones, then odd ones."""
    transformers = pytest.importorskip("transformers")
    block = ILlamaBlock(ILlamaConfig(dim=16, num_heads=2, mask_mode="pre")).eval()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    config = transformers.LlamaConfig(
        vocab_size=1, hidden_size=16, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
        rms_norm_eps=1e-6, attention_bias=True, max_position_embeddings=32,
    )  # fmt: skip
    llama = transformers.LlamaModel(config).eval()
    halves = torch.cat([torch.arange(h * 8, h * 8 + 8).view(4, 2).T.flatten() for h in range(2)])
    weights = {}
    for kind in ("weight", "bias"):
        q, k, v = getattr(block.attn.qkv, kind).chunk(3)
        weights |= {f"q_proj.{kind}": q[halves], f"k_proj.{kind}": k[halves], f"v_proj.{kind}": v}
        weights[f"o_proj.{kind}"] = getattr(block.attn.proj, kind)
    llama.layers[0].self_attn.load_state_dict(weights)
    own = block.state_dict()
    names = {"gate_proj": "mlp.fc1", "down_proj": "mlp.fc2", "up_proj": "mlp.fc3"}
    llama.layers[0].mlp.load_state_dict({f"{theirs}.weight": own[f"{ours}.weight"] for theirs, ours in names.items()})
    llama.layers[0].input_layernorm.load_state_dict(block.norm1.state_dict())
    llama.layers[0].post_attention_layernorm.load_state_dict(block.norm2.state_dict())
    x = torch.randn(2, 10, 16)
    with torch.no_grad():
        wanted = llama(inputs_embeds=x).last_hidden_state
        ours = llama.norm(block(x, SoftMask(0), rope_table(10, 8)))
    torch.testing.assert_close(ours, wanted, **EXACT)


def llama_weights(layers: int = 2, width: int = 64, hidden: int = 300) -> dict[str, Tensor]:
    shapes = {f"self_attn.{p}_proj": (width, width) for p in "qkvo"} | {"mlp.down_proj": (width, hidden)}
    shapes |= {"mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width)}
    shapes |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    return {f"model.layers.{i}.{n}.weight": torch.randn(s) for i in range(layers) for n, s in shapes.items()}


def test_starts_from_a_llama() -> None:
    weights, model = llama_weights(), small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = model.load_llama(weights)
    after = model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(names)
    assert len(names) == 2 * 7
    first = weights["model.layers.1.self_attn.v_proj.weight"]
    torch.testing.assert_close(after["blocks.1.attn.qkv.weight"][32:], first[::4, ::4])
    rows = torch.linspace(0, 299, 256).round().long()
    wanted = weights["model.layers.0.mlp.gate_proj.weight"][rows][:, ::4]
    torch.testing.assert_close(after["blocks.0.mlp.fc1.weight"], wanted)
    for bad, message in (
        (llama_weights(layers=1), "lack model.layers.1.self_attn.q_proj.weight; 2 layers are needed"),
        (llama_weights(width=8), r"a teacher \(24, 8\) cannot give \(48, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_llama(bad)
    with pytest.raises(ValueError, match="ffn='mlp'"):
        small(**ROADMAP["ViT"]).load_llama(weights)


def test_selection_refuses_other_axes() -> None:
    with pytest.raises(ValueError, match=r"a teacher \(4,\) cannot give \(2, 2\)"):
        select_elements(torch.zeros(4), (2, 2))


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(1, 4), rates, st.sampled_from(["linear", "constant"]), st.integers(0, 5))
def test_schedules_end_at_zero(epochs: int, steps: int, rate: float, decay: str, cutoff: int) -> None:
    cutoff = min(cutoff, epochs)
    found = soft_mask_rates(epochs, steps, rate, cutoff_epoch=cutoff, decay=decay)
    assert found.shape == (epochs * steps,)
    assert not found[cutoff * steps :].any()
    assert (found.diff() <= 0).all()
    if cutoff:
        torch.testing.assert_close(found[0].item(), rate)


def test_a_schedule_drives_the_model() -> None:
    model = small()
    schedule = SoftMaskSchedule(model, soft_mask_rates(2, 3, cutoff_epoch=1))
    seen = [model.config.soft_mask_rate]
    for _ in range(7):
        schedule.step()
        seen.append(model.config.soft_mask_rate)
    assert seen == [1, 0.5, 0, 0, 0, 0, 0, 0]
    assert model.mask == SoftMask(0)


@settings(max_examples=8)
@given(st.integers(1, 5), st.booleans())
def test_resizing_to_the_same_grid_changes_nothing(side: int, class_first: bool) -> None:
    positions = torch.randn(1, side**2 + 1, 3)
    assert torch.equal(resize_positions(positions, side, class_first), positions)
    larger = resize_positions(positions, side + 2, class_first)
    slot = 0 if class_first else -1
    assert torch.equal(larger[:, slot], positions[:, slot])


def test_a_model_for_other_images() -> None:
    model = small()
    larger = model.resized(12)
    assert larger(torch.randn(1, 3, 12, 12)).shape == (1, 5)
    assert not larger.training
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.resized(8)(x), model(x))
    with pytest.raises(ValueError, match="16 position embeddings are no square grid and one slot"):
        resize_positions(torch.zeros(1, 16, 3), 5)


def test_diagnostics() -> None:
    assert map_rank(torch.eye(5)) == 5
    assert map_rank(torch.ones(2, 5, 5)).tolist() == [1, 1]
    x = torch.randn(2, 3, 8, 8)
    causal, both = (small(soft_mask_rate=rate).attention_maps(x) for rate in (0.0, 1.0))
    assert causal.shape == (2, 2, 2, 17, 17)
    assert (map_rank(causal) == 17).all()  # triangular with a positive diagonal
    assert (map_rank(both) <= 17).all()
    torch.testing.assert_close(both.sum(-1), torch.ones_like(both[..., 0]))


def test_calibration_error_is_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = 2 * torch.randn(200, 4), torch.randint(4, (200,))
    wanted = metrics.multiclass_calibration_error(logits.softmax(-1), labels, num_classes=4, n_bins=15)
    assert calibration_error(logits, labels) == pytest.approx(wanted.item(), abs=1e-6)
    assert calibration_error(torch.tensor([[50.0, 0.0]]), torch.tensor([0])) == pytest.approx(0, abs=1e-6)


def test_quantisation_stays_near_and_is_undone() -> None:
    model, x = small(), torch.randn(2, 3, 8, 8)
    before, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    with torch.no_grad(), quantised(model):
        near = model(x)
        weight = model.get_parameter("blocks.0.attn.qkv.weight")
        assert all(row.unique().numel() <= 255 for row in weight)
    with torch.no_grad(), quantised(model, 2, 2):
        far = model(x)
    assert 0 < (near - logits).norm() < (far - logits).norm()
    assert (near - logits).norm() < 0.1 * logits.norm()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), logits)


def test_loads_the_authors_checkpoint_and_keeps_its_rate(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN)
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    torch.save({"model": state}, tmp_path / "illama.pth")
    settings = {"img_size": 16, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 2, "num_heads": 2}
    model = ILlama.from_authors(tmp_path / "illama.pth", "illama_tiny", **settings)
    torch.testing.assert_close(model(tensors["input.x"]), tensors["output.logits_rate0.0"], rtol=1e-4, atol=5e-5)
    model.set_soft_mask(0.5)
    model.save_pretrained(tmp_path / "half")
    again = heed.from_pretrained(tmp_path / "half")
    torch.testing.assert_close(again(tensors["input.x"]), tensors["output.logits_rate0.5"], rtol=1e-4, atol=5e-5)
    with pytest.raises(ValueError, match="does not fit ILlama"):
        ILlama.from_authors(tmp_path / "illama.pth", "illama_tiny", **settings | {"img_size": 24})


@pytest.mark.parametrize("mode", ["post", "pre"])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_half_precision_and_export(mode: str, rate: float) -> None:
    model, x = small(mask_mode=mode, soft_mask_rate=rate), torch.randn(2, 3, 8, 8)
    logits = model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), logits, **EXACT)
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), logits, rtol=0.1, atol=0.05)


def test_recipe() -> None:
    options, masks = training_recipe("illama_small")
    assert options["mixup"] == 0.5
    assert soft_mask_rates(steps_per_epoch=1, **masks)[[0, 49, 50]].tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="did you mean 'illama_base'"):
        training_recipe("illama_bas")


def test_no_weight_decay_names_parameters() -> None:
    model = small()
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "dim=16 is not divisible by num_heads=3"),
        ({"num_heads": 16}, "dim=16 over num_heads=16 must be even"),
        ({"img_size": 9}, "img_size=9 is not a multiple of patch_size=2"),
        ({"soft_mask_rate": 1.5}, r"soft_mask_rate=1.5 must lie in \[0, 1\]"),
        ({"mask": "casual"}, "did you mean 'causal'"),
        ({"mask_mode": "both"}, "unknown mask_mode 'both'"),
        ({"ffn": "glu"}, "unknown ffn 'glu'"),
        ({"positions": "none"}, "unknown positions 'none'"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="images of 16 x 16 pixels given; this model takes 8 x 8"):
        small()(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="soft_mask_rate=-0.1"):
        small().set_soft_mask(-0.1)
    with pytest.raises(ValueError, match="head_dim=7 is odd"):
        rope_table(4, 7)
    with pytest.raises(ValueError, match="unknown mask_mode"):
        SoftMaskedAttention(16, 2, mask_mode="after")
    for options, message in (
        ({"cutoff_epoch": 4}, r"cutoff_epoch=4 must lie in \[0, epochs=3\]"),
        ({"decay": "cosine"}, "unknown decay 'cosine'"),
        ({"mode": "hard"}, "unknown mode 'hard'"),
        ({"rate": 2.0}, "soft_mask_rate=2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            soft_mask_rates(3, 2, **options)  # type: ignore[arg-type]
