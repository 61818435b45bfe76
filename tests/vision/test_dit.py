"""MoH-DiT: sizes, conditioning, guidance, sampling through diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import heed
from heed.layers.moh import active_heads, collect_balance
from heed.vision.dit import DiT, DiTConfig

# Parameters, with the fixed position embedding as the authors count; active and all heads.
SIZES = {
    "moh_dit_s2_90": (32_997_152, 64, 72),
    "moh_dit_s2_75": (32_998_688, 54, 72),
    "moh_dit_b2_90": (130_638_368, 129, 144),
    "moh_dit_b2_75": (130_638_368, 108, 144),
    "moh_dit_l2_90": (458_512_416, 344, 384),
    "moh_dit_l2_75": (458_528_800, 288, 384),
    "moh_dit_xl2_90": (675_666_464, 403, 448),
    "moh_dit_xl2_75": (675_689_504, 336, 448),
    "dit_b2": (130_512_416, 0, 0),
    "dit_xl2": (675_129_632, 0, 0),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    with torch.device("meta"):
        model = heed.create_model(name)
    heads = active_heads(model).values()
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    assert (count, sum(x.active for x in heads), sum(x.heads for x in heads)) == SIZES[name]


def micro(**settings: object) -> DiT:
    """A small model away from its initial values, where every block is the identity."""
    model = heed.create_model("moh_dit_micro", **settings)
    assert isinstance(model, DiT)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


X, T, Y = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 10])


def test_new_models_predict_nothing() -> None:
    assert heed.create_model("moh_dit_micro")(X, T, Y).eq(0).all()


def test_time_and_class_matter() -> None:
    model = micro()
    y = model(X, T, Y)
    assert y.shape == (2, 6, 8, 8)
    assert not torch.allclose(y, model(X, T + 5, Y), atol=1e-4)
    assert not torch.allclose(y, model(X, T, torch.tensor([2, 3])), atol=1e-4)


def test_guidance() -> None:
    model, x = micro(), torch.cat([X[:1], X[:1]])
    given, none = torch.tensor([1]), torch.tensor([10])
    y, t = torch.cat([given, none]), torch.tensor([50, 50])
    plain = model.forward_with_cfg(x, t, y, 1.0)
    torch.testing.assert_close(plain[:1, :3], model(X[:1], t[:1], given)[:, :3])
    strong = model.forward_with_cfg(x, t, y, 4.0)
    apart = model(x, t, y)
    torch.testing.assert_close(strong[:1, :3], apart[1:, :3] + 4 * (apart[:1, :3] - apart[1:, :3]))
    torch.testing.assert_close(strong[:, 3:], apart[:, 3:])
    with pytest.raises(ValueError, match="a batch of 1 has no two halves"):
        model.forward_with_cfg(x[:1], t[:1], given, 2.0)


def test_labels_are_dropped_at_their_rate() -> None:
    model, y = micro(), torch.zeros(2000, dtype=torch.long)
    dropped = model.drop_labels(y, 0.25, torch.Generator().manual_seed(1))
    assert set(dropped.tolist()) == {0, 10}
    assert (dropped == 10).float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert torch.equal(dropped, model.drop_labels(y, 0.25, torch.Generator().manual_seed(1)))


def test_every_parameter_learns() -> None:
    model = micro()
    with collect_balance(model) as balance:
        loss = (model(X, T, Y) - 1).square().mean()
    (loss + 0.01 * balance.loss()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_checkpoints_come_back(tmp_path: Path) -> None:
    model = micro()
    authors = {key.replace(".router.", "."): value for key, value in model.state_dict().items()}
    assert {"blocks.1.attn.wg.weight", "blocks.1.attn.wg_0.weight", "pos_embed"} <= authors.keys()
    save_file(authors, tmp_path / "dit.safetensors")
    loaded = DiT.from_authors(tmp_path / "dit.safetensors", "moh_dit_micro")
    assert torch.equal(loaded(X, T, Y), model(X, T, Y))
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(heed.from_pretrained(tmp_path / "own")(X, T, Y), model(X, T, Y))


def test_compiles_and_takes_bfloat16() -> None:
    torch._dynamo.reset()
    model = micro()
    torch.testing.assert_close(
        torch.compile(model, backend="eager", fullgraph=True)(X, T, Y), model(X, T, Y), rtol=1e-4, atol=1e-4
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(X, T, Y)).all()
    assert model.bfloat16()(X.bfloat16(), T, Y).dtype == torch.bfloat16


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler"])
@torch.no_grad()
def test_sampling_with_a_scheduler_of_diffusers(scheduler: str) -> None:
    """The noise goes to DDIM; DDPM with learned variance takes both."""
    diffusers = pytest.importorskip("diffusers")
    learned = scheduler == "DDPMScheduler"
    steps = getattr(diffusers, scheduler)(**({"variance_type": "learned_range"} if learned else {}))
    steps.set_timesteps(4)
    model, generator = micro(), torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 8, 8, generator=generator).repeat(2, 1, 1, 1)
    for t in steps.timesteps:
        out = model.forward_with_cfg(x, t.expand(2), torch.tensor([4, 10]), 2.0)
        x = steps.step(out if learned else out[:, :3], t, x, generator=generator).prev_sample
        x = x[:1].repeat(2, 1, 1, 1)
    assert x.shape == (2, 3, 8, 8)
    assert torch.isfinite(x).all()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="num_heads has 2 layers, shared 1, routed 2"):
        DiTConfig(dim=32, num_heads=(4, 4), shared=(2,), routed=(1, 1))
    with pytest.raises(ValueError, match="give both, or neither"):
        DiTConfig(shared=(2,) * 28)
    with pytest.raises(ValueError, match="dim=32 is not divisible by num_heads=6"):
        DiT(DiTConfig(dim=32, num_heads=(6,)))
    with pytest.raises(ValueError, match="img_size=9 is not a multiple of patch_size=2"):
        DiTConfig(img_size=9)
    with pytest.raises(ValueError, match="dim=30 is not a multiple of 4"):
        DiTConfig(dim=30)
    with pytest.raises(ValueError, match=r"this model takes \(B, 3, 8, 8\)"):
        micro()(torch.randn(2, 3, 8, 10), T, Y)
