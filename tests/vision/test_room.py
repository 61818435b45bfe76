"""What every backbone must do, once per architecture, on the first name it registers (its smallest)."""

from __future__ import annotations

import pytest
import torch

import heed
from heed.models import models
from heed.vision.backbone import Backbone

FIRST = {}
for _name in models._entries if models.names() else ():
    _entry = models.get(_name)
    if issubclass(_entry.cls, Backbone):
        FIRST.setdefault(_entry.cls, _name)


def build(name: str) -> tuple[Backbone, torch.Tensor]:
    model = heed.create_model(name, num_classes=5)
    assert isinstance(model, Backbone)
    config = model.config
    return model, torch.randn(2, config.in_chans, config.img_size, config.img_size)


@pytest.fixture(params=FIRST.values(), ids=str)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_what_is_no_batch_of_images_is_named(name: str) -> None:
    model, x = build(name)
    for wrong in (x[0], torch.cat([x, x], 1)):
        with pytest.raises(ValueError, match="this model takes images"):
            model(wrong)


def test_maps_are_laid_out_channels_last_on_a_cpu() -> None:
    for channels in (1, 3):
        model = heed.create_model("van_micro", in_chans=channels)
        seen = []
        model.stages[0].proj.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))  # type: ignore[union-attr]
        model(torch.randn(2, channels, 32, 32))
        assert seen[0].stride(1) == 1


@torch.no_grad()
def test_the_layout_of_the_images_in_memory_does_not_matter(name: str) -> None:
    model, x = build(name)
    pixels_first = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.eval()(x), model(pixels_first))


def test_every_parameter_learns(name: str) -> None:
    """After a few steps away from special initial values (zeros), no gradient is missing or zero."""
    model, x = build(name)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.tensor([1, 3])).backward()
        optimizer.step()
    idle = set(getattr(model, "idle_parameters", lambda: ())())
    silent = {
        key
        for key, p in model.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
    }
    assert silent <= idle


def test_state_comes_back(name: str) -> None:
    model, x = build(name)
    other, _ = build(name)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_bfloat16_autocast_stays_near(name: str) -> None:
    model, x = build(name)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert torch.isfinite(low).all()
    torch.testing.assert_close(low.float(), model(x), rtol=0.1, atol=0.1)


def test_compiles(name: str) -> None:
    torch._dynamo.reset()
    model, x = build(name)
    model.eval()
    compiled = torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, model(x), rtol=1e-4, atol=1e-4)


def test_maps_are_what_feature_info_says(name: str) -> None:
    model, x = build(name)
    maps = model.eval().stage_maps(x)
    assert len(maps) == len(model.feature_info)
    for found, info in zip(maps, model.feature_info, strict=True):
        assert found.shape[1] == info["num_chs"]
        assert found.shape[-1] == -(-x.shape[-1] // info["reduction"])


def test_other_sizes(name: str) -> None:
    model, x = build(name)
    model.eval()
    side = x.shape[-1]
    other = torch.randn(1, x.shape[1], side + 5, 2 * side - 3)
    if model.takes_any_size:
        assert model(other).shape == (1, 5)
    else:
        with pytest.raises(ValueError, match=str(side)):
            model(other)
