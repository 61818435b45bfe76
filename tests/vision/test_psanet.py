"""Networks with PSA: their maps, saving and loading, targets, and that they learn both kinds of dense task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import heed
from heed.layers.psa import PSA
from heed.models import from_pretrained
from heed.vision.psa import PSANetConfig, gaussian_heatmaps, peaks


@pytest.mark.parametrize(
    ("name", "blocks", "outputs"),
    [
        ("psa_hrnet_w18_small", 18, 17),
        ("psa_hrnet_w48", 104, 17),
        ("psa_hrnet_w48_seg", 104, 19),
        ("psa_resnet18", 8, 17),
        ("psa_resnet50", 16, 17),
        ("psa_resnet101", 33, 17),
    ],
)
def test_maps(name: str, blocks: int, outputs: int) -> None:
    with torch.device("meta"):
        model: Any = heed.create_model(name)
        assert model.eval()(torch.empty(1, 3, 64, 96)).shape == (1, outputs, 16, 24)
    assert len(model.insertion.blocks) == blocks == sum(isinstance(m, PSA) for m in model.modules())


def test_without_psa() -> None:
    with torch.device("meta"):
        model: Any = heed.create_model("psa_resnet18", layout="")
    assert model.insertion is None
    assert not [m for m in model.modules() if isinstance(m, PSA)]


@torch.no_grad()
def test_the_head_reads_all_maps_enlarged_and_joined() -> None:
    model: Any = heed.create_model("psa_resnet18").eval()
    x = torch.randn(1, 3, 64, 64)
    first, *others = model.host(x)
    joined = torch.cat([first, *(F.interpolate(m, first.shape[2:], mode="bilinear") for m in others)], 1)
    torch.testing.assert_close(model(x), model.head(joined))


@pytest.mark.parametrize("fuse", ["first", "all"])
def test_learns_heat_maps_and_segmentation(fuse: str) -> None:
    torch.manual_seed(0)
    model: Any = heed.create_model("psa_resnet18", outputs=2, fuse=fuse, in_chans=1, gain=4.0)
    points = torch.tensor([[[2.0, 3.0], [5.0, 6.0]], [[4.0, 1.0], [1.0, 5.0]]])
    spots = F.interpolate(gaussian_heatmaps(points, (8, 8), 1.0), scale_factor=4)
    images = spots[:, :1] - spots[:, 1:]
    heatmaps, classes = gaussian_heatmaps(points, (8, 8), 1.0), (points.new_zeros(2, 8, 8)).long()
    classes[:, :4] = 1
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(12):
        y = model(images)
        loss = F.mse_loss(y, heatmaps) if fuse == "first" else F.cross_entropy(y, classes)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_saves_and_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = heed.create_model("psa_hrnet_w18_small", outputs=3, layout="parallel").eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 64, 64)
    again: Any = from_pretrained(tmp_path)
    assert again.config == model.config
    torch.testing.assert_close(again(x), model(x))


@settings(max_examples=15)
@given(st.integers(0, 6), st.integers(0, 8), st.sampled_from([0.5, 1.0, 2.0]))
def test_targets_peak_at_their_points(row: int, column: int, sigma: float) -> None:
    points = torch.tensor([[[row, column]]], dtype=torch.float32)
    heatmap = gaussian_heatmaps(points, (7, 9), sigma)
    assert heatmap.shape == (1, 1, 7, 9)
    assert heatmap[0, 0, row, column] == 1
    assert torch.equal(peaks(heatmap), points)
    if column < 8:
        assert heatmap[0, 0, row, column + 1].item() == pytest.approx(torch.tensor(-0.5 / sigma**2).exp().item())


def test_what_is_refused() -> None:
    for options, message in (
        ({"host": "resnet19"}, "did you mean 'resnet1"),
        ({"host": "vgg11"}, "unknown HRNet or ResNet of timm 'vgg11'"),
        ({"fuse": "last"}, "unknown way to fuse 'last'"),
        ({"outputs": 0}, "outputs=0 must be at least 1"),
        ({"layout": "serial"}, "unknown layout 'serial'"),
    ):
        with pytest.raises(ValueError, match=message):
            heed.create_model("psa_resnet18", **options)
    with pytest.raises(ValueError, match="no BasicBlock of timm"):
        heed.create_model("psa_resnet50", every_block=False)
    assert PSANetConfig().host == "hrnet_w48"
    model: Any = heed.create_model("psa_resnet18")
    for shape in ((3, 64, 64), (1, 1, 64, 64)):
        with pytest.raises(ValueError, match=r"takes images \(B, 3, H, W\)"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"points must be \(B, K, 2\)"):
        gaussian_heatmaps(torch.zeros(1, 2), (4, 4))
    with pytest.raises(ValueError, match="sigma=0 must be positive"):
        gaussian_heatmaps(torch.zeros(1, 1, 2), (4, 4), 0)
