"""MetaMixer, FFNified attention, and convolutions that fuse."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Mlp
from timm.models.metaformer import MetaFormer
from torch import Tensor, nn

import heed
from heed.layers.attention import PatternAttention
from heed.layers.metamixer import (
    FFNifiedAttention,
    FFNifiedGrid,
    FFNifiedTokenMixer,
    MetaMixer,
    SoftmaxMixer,
    Static,
    plain_depthwise,
    rep_depthwise,
)
from heed.layers.reparam import ConvNorm, fuse

quick = settings(max_examples=8, deadline=None)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def shaken(module: nn.Module) -> Any:
    """The module in evaluation, with statistics and affine weights of BatchNorm that are nothing special."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
            nn.init.normal_(cast(Tensor, part.running_mean))
            nn.init.uniform_(cast(Tensor, part.running_var), 0.5, 2)
    return module.eval()


@quick
@given(st.sampled_from([1, 2, 3]), st.sampled_from([3, 7]), st.sampled_from([1, 5, 7]), st.integers(1, 6))
@torch.no_grad()
def test_fused_is_the_same_function(ndim: int, key_kernel: int, value_kernel: int, side: int) -> None:
    mixer = shaken(FFNifiedAttention(4, key_kernel, value_kernel, ndim=ndim))
    x = torch.randn(2, 4, *[side] * ndim)
    y = mixer(x)
    assert fuse(mixer) is mixer
    torch.testing.assert_close(mixer(x), y, **CLOSE)
    assert not any("Norm" in type(part).__name__ for part in mixer.modules())


@quick
@given(st.sampled_from([(3, 1), (7, 3), (11, 5), (51, 5)]), st.sampled_from([1, 2]), st.integers(1, 13))
@torch.no_grad()
def test_two_kernels_fuse_into_the_large_one(kernels: tuple[int, int], stride: int, length: int) -> None:
    conv = shaken(rep_depthwise(2, 6, *kernels, stride=stride, ndim=1))
    x = torch.randn(3, 2, length)
    one = fuse(conv)
    assert isinstance(one, nn.Conv1d)
    assert one.kernel_size == kernels[:1]
    torch.testing.assert_close(one(x), conv(x), **CLOSE)


def test_fusing_needs_running_statistics() -> None:
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        fuse(FFNifiedAttention(4))
    mixer = FFNifiedAttention(4).eval()
    mixer.query.train()
    with pytest.raises(RuntimeError, match="ConvNorm is in training mode"):
        fuse(mixer)


@torch.no_grad()
def test_softmax_attention_is_a_metamixer() -> None:
    ours, theirs = SoftmaxMixer(8, 2), PatternAttention(8, 2, qkv_bias=False)
    key, value = cast(Any, ours.interaction).key, cast(Any, ours.aggregation).value
    query, out = cast(nn.Conv2d, ours.query), cast(nn.Conv2d, ours.projection)
    query.weight.copy_(theirs.qkv.weight[:8, :, None, None])
    key.weight.copy_(theirs.qkv.weight[8:16])
    value.weight.copy_(theirs.qkv.weight[16:])
    out.weight.copy_(theirs.proj.weight[:, :, None, None])
    cast(nn.Parameter, out.bias).copy_(theirs.proj.bias)
    x = torch.randn(2, 8, 3, 5)
    torch.testing.assert_close(ours(x), theirs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), **CLOSE)
    torch.testing.assert_close(ours.coefficients(x).sum(-1), torch.ones(2, 2, 15))


@torch.no_grad()
def test_an_mlp_is_a_metamixer() -> None:
    mlp = Mlp(6, 24)
    mixer = MetaMixer(nn.Identity(), Static(mlp.fc1), nn.GELU(), Static(mlp.fc2))
    x = torch.randn(5, 6)
    torch.testing.assert_close(mixer(x), mlp(x))


@quick
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([3, 5, 9]))
@torch.no_grad()
def test_identity_query_and_delta_kernels_leave_gelu(height: int, width: int, kernel: int) -> None:
    mixer = FFNifiedAttention(3, kernel, kernel, query=nn.Identity())
    for step in (mixer.interaction, mixer.aggregation):
        conv = cast(nn.Conv2d, cast(Static, step).operation)
        nn.init.dirac_(conv.weight, 3)
        nn.init.zeros_(cast(Tensor, conv.bias))
    x = torch.randn(2, 3, height, width)
    torch.testing.assert_close(mixer(x), F.gelu(x))


@quick
@given(st.permutations(range(5)))
@torch.no_grad()
def test_commutes_with_channel_permutation(order: list[int]) -> None:
    """Channels permuted in the input and in the weights are permuted in the output."""
    mixer, other = shaken(FFNifiedAttention(5, 7, 3)), FFNifiedAttention(5, 7, 3).eval()
    state = {k: v[order] if v.ndim else v for k, v in mixer.state_dict().items()}
    state["query.conv.weight"] = state["query.conv.weight"][:, order]
    other.load_state_dict(state)
    x = torch.randn(1, 5, 8, 6)
    torch.testing.assert_close(other(x[:, order]), mixer(x)[:, order], **CLOSE)


@torch.no_grad()
def test_shifts_with_the_picture() -> None:
    mixer = shaken(FFNifiedAttention(3, 7, 7))
    x = torch.randn(1, 3, 24, 24)
    moved = mixer(x.roll((2, 1), (2, 3)))
    inner = slice(9, -9)  # 6 pixels of reach, 2 of shift
    torch.testing.assert_close(moved[..., inner, inner], mixer(x).roll((2, 1), (2, 3))[..., inner, inner], **CLOSE)


def test_gradients_are_those_of_the_function() -> None:
    mixer = FFNifiedAttention(2, 3, 7).double().eval()
    assert torch.autograd.gradcheck(mixer, torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True))


def test_only_convolutions_and_gelu_are_left() -> None:
    mixer, x = fuse(FFNifiedGrid(4).eval()), torch.randn(1, 6, 5, 4)
    exported = torch.export.export(mixer, (x,))
    called = {str(node.target).split(".")[1] for node in exported.graph.nodes if node.op == "call_function"}
    assert {"conv2d", "gelu"} <= called <= {"conv2d", "gelu", "movedim", "permute"}
    torch.testing.assert_close(exported.module()(x), mixer(x))


@torch.no_grad()
def test_grid_and_map_agree() -> None:
    grid, maps = shaken(FFNifiedGrid(6, 3)), FFNifiedAttention(6, 3).eval()
    maps.load_state_dict(grid.state_dict())
    x = torch.randn(2, 5, 7, 6)
    torch.testing.assert_close(grid(x), maps(x.movedim(-1, 1)).movedim(1, -1))


def test_drops_into_timms_metaformer() -> None:
    model = MetaFormer(
        depths=(1, 1), dims=(8, 16), token_mixers=FFNifiedTokenMixer, num_classes=3, drop_path_rate=0.0
    )  # fmt: skip
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    mixers = [part for part in model.modules() if isinstance(part, FFNifiedTokenMixer)]
    assert len(mixers) == 2
    assert all(p.grad is not None for mixer in mixers for p in mixer.parameters())
    model.eval()
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    for mixer in mixers:
        fuse(mixer)
    torch.testing.assert_close(model(x), before, **CLOSE)


def test_drops_into_the_vit_host() -> None:
    model = heed.create_model("vit_micro", attention="ffnified", attention_options={"value_kernel": 5})
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FFNifiedAttention(4, 4), "kernel=4 has no middle; give an odd side, such as 5"),
        (lambda: FFNifiedAttention(4, 7, 0), "kernel=0 has no middle"),
        (lambda: FFNifiedAttention(4, ndim=4), "ndim=4: convolutions have 1, 2 or 3 axes"),
        (lambda: rep_depthwise(4, 6, 7), "dim=6 is not a multiple of in_dim=4"),
        (lambda: rep_depthwise(4, 4, 5), "kernel=5 with a small kernel of 2"),
        (lambda: rep_depthwise(4, 4, 3, 5), "kernel=3 with a small kernel of 5"),
        (lambda: plain_depthwise(4, 2), "kernel=2 has no middle"),
        (lambda: ConvNorm(4, 4, (1, 2)), "kernel=2 has no middle"),
        (lambda: SoftmaxMixer(6, 4), "dim=6 is not divisible by num_heads=4"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (4, 8, 8), (2, 8, 8, 4)])
def test_bad_input(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(B, 4, H, W\)"):
        FFNifiedAttention(4)(torch.zeros(shape))
