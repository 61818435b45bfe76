"""Polarized self-attention (card 35): a mask over channels that forgets space, and a mask over space that forgets channels.

x is (B, C, H, W), N = H W, c = C / 2; W are 1x1 convolutions, q W_v y means sum over c of q and W_v y:

    channel mask (B, C, 1, 1):   sigmoid(up(W_v x softmax_N(W_q x)))        W_q: C -> 1, W_v: C -> c, up: c -> C
    spatial mask (B, 1, H, W):   sigmoid(s), q = W_q mean_N(y) (c), W_q, W_v: C -> c, and
        parallel    s = softmax_N(q W_v y)
        sequential  s = q softmax_N(W_v y)                                  each channel of W_v y on its own
        paper       s = softmax_c(q) W_v y
    parallel:    y = x * channel mask(x) + x * spatial mask(x)
    sequential:  z = x * channel mask(x);  y = z * spatial mask(z)

The three formulas for s are those of the authors' two layouts and of their paper; the layouts as the authors' code has them
are the default. Their code calls the channel branch spatial_pool (or "right") and the spatial one channel_pool ("left").
Pooling is linear, so W_v and W_q here follow it wherever no softmax stands between: the same numbers for less work.

Liu, Liu, Fan, Huang, "Polarized Self-Attention: Towards High-quality Pixel-wise Regression", Neurocomputing 2022 (arXiv
2107.00782).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from heed.catalogue import provides
from heed.checkpoint import load_weights
from heed.errors import unknown
from heed.layers.registry import layers

_FORMS = ("parallel", "sequential", "paper")
_LAYOUTS = ("parallel", "sequential")
_VARIANTS = ("code", "paper")


class _Branch(nn.Module):
    """What both branches share: two convolutions, checks, and multiplication by the mask."""

    def __init__(self, dim: int, query_width: int, form: str) -> None:
        super().__init__()
        if form not in _FORMS:
            raise ValueError(unknown("form of polarized self-attention", form, _FORMS))
        if dim < 2:
            raise ValueError(f"dim={dim} leaves no channel for the c = dim // 2 inner ones; give at least 2")
        if dim % 2:
            warnings.warn(f"dim={dim} is odd; the inner width is rounded down to {dim // 2}", stacklevel=3)
        self.dim = dim
        self.form = form
        self.q = nn.Conv2d(dim, query_width, 1, bias=False)
        self.v = nn.Conv2d(dim, dim // 2, 1, bias=False)
        for conv in (self.q, self.v):
            nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")

    def check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.dim:
            raise ValueError(f"{type(self).__name__} takes maps (B, {self.dim}, H, W); got {tuple(x.shape)}")

    def mask(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return x * self.mask(x)

    def extra_repr(self) -> str:
        return f"{self.dim}, form={self.form!r}"


def _softmax_over_pixels(logits: Tensor) -> Tensor:
    # At least in float32: over thousands of pixels the values leave half precision. The engine does not serve here, since
    # these weights become masks or follow from one query for all.
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


@provides("35-psa")
class ChannelPSA(_Branch):
    """Multiplies each channel by a number in (0, 1), (B, C, H, W) -> (B, C, H, W).

    Args:
        dim: channels C.
        form: what leads from c pooled values to C logits. "parallel": a 1x1 convolution. "sequential": 1x1 to c // 4,
            LayerNorm, ReLU, 1x1. "paper": 1x1 to c // 4, ReLU, 1x1, LayerNorm; where the paper leaves the bottleneck
            open, this is heed's reading.

    Raises:
        ValueError: an unknown form, dim < 8 where there is a bottleneck, or an input of another shape.
    """

    def __init__(self, dim: int, form: str = "sequential") -> None:
        super().__init__(dim, 1, form)
        inner = dim // 2
        if form == "parallel":
            self.up: nn.Module = nn.Conv2d(inner, dim, 1, bias=False)
            return
        narrow = inner // 4
        if narrow < 1:
            raise ValueError(f"dim={dim} leaves no channel in the bottleneck of dim // 8; give at least 8")
        down, up = nn.Conv2d(inner, narrow, 1), nn.Conv2d(narrow, dim, 1)
        if form == "sequential":
            self.up = nn.Sequential(down, nn.LayerNorm([narrow, 1, 1]), nn.ReLU(), up)
        else:
            self.up = nn.Sequential(down, nn.ReLU(), up, nn.LayerNorm([dim, 1, 1]))

    def mask(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C 1 1"]:
        """The mask alone."""
        self.check(x)
        weights = _softmax_over_pixels(self.q(x).flatten(2)).to(x.dtype)
        pooled = x.flatten(2) @ weights.transpose(1, 2)
        return torch.sigmoid(self.up(self.v(pooled[..., None])))

    def multiply_adds(self, height: int, width: int, *, as_published: bool = False) -> int:
        """Multiply-adds for one map; `as_published` counts W_v at every pixel, where the authors' code applies it."""
        pixels, c = height * width, self.dim // 2
        up = c * self.dim if self.form == "parallel" else (c + self.dim) * (c // 4)
        if as_published:
            return pixels * (self.dim + self.dim * c + c) + up
        return pixels * 2 * self.dim + self.dim * c + up


@provides("35-psa")
class SpatialPSA(_Branch):
    """Multiplies each pixel by a number in (0, 1), (B, C, H, W) -> (B, C, H, W).

    Args:
        dim: channels C.
        form: which formula gives the logits, see the module. In the form "parallel" they sum to 1 over the pixels, so
            that on large maps the mask stays close to 0.5.

    Raises:
        ValueError: an unknown form or an input of another shape.
    """

    def __init__(self, dim: int, form: str = "sequential") -> None:
        super().__init__(dim, dim // 2, form)

    def mask(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 H W"]:
        """The mask alone."""
        self.check(x)
        q = self.q(x.mean((2, 3), keepdim=True)).flatten(2).transpose(1, 2)  # (B, 1, c)
        if self.form == "sequential":
            logits = q @ _softmax_over_pixels(self.v(x).flatten(2)).to(q.dtype)
        else:
            if self.form == "paper":
                q = q.softmax(-1)
            logits = (q @ self.v.weight.flatten(1)) @ x.flatten(2)
            if self.form == "parallel":
                logits = _softmax_over_pixels(logits).to(q.dtype)
        return torch.sigmoid(logits).unflatten(2, x.shape[2:])

    def multiply_adds(self, height: int, width: int, *, as_published: bool = False) -> int:
        """Multiply-adds for one map; `as_published` counts W_q and W_v at every pixel, as in the authors' code."""
        pixels, c = height * width, self.dim // 2
        if as_published:
            return pixels * (2 * self.dim * c + c)
        if self.form == "sequential":
            return pixels * (self.dim * c + c) + self.dim * c
        return pixels * self.dim + 2 * self.dim * c


@provides("35-psa")
class PSA(nn.Module):
    """Polarized self-attention on feature maps, (B, C, H, W) -> (B, C, H, W), for inside residual blocks.

    There is no residual connection: masks start near 0.5, so the sequential layout scales its input by about 0.25, and
    a network trained without it breaks until it is trained again, or is helped by `gain`.

    Args:
        dim: channels C; from 8 where the channel branch has a bottleneck. Odd numbers warn.
        layout: "sequential" (the authors' PSA_s) or "parallel" (PSA_p).
        variant: "code", the authors' implementation, which differs between the layouts; or "paper", the same masks in
            both.
        gain: factor on the output; 4 keeps the scale of the input in the sequential layout, 1 in the parallel one.

    Raises:
        ValueError: an unknown layout or variant, too few channels, or an input that is not (B, dim, H, W).
    """

    def __init__(self, dim: int, layout: str = "sequential", variant: str = "code", gain: float = 1.0) -> None:
        super().__init__()
        if layout not in _LAYOUTS:
            raise ValueError(unknown("layout", layout, _LAYOUTS))
        if variant not in _VARIANTS:
            raise ValueError(unknown("variant", variant, _VARIANTS))
        self.dim = dim
        self.layout = layout
        self.gain = gain
        form = layout if variant == "code" else variant
        self.channel = ChannelPSA(dim, form)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the channel branch has warned of an odd width
            self.spatial = SpatialPSA(dim, form)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        if self.layout == "sequential":
            y = self.spatial(self.channel(x))
            return y if self.gain == 1 else self.gain * y
        return x * (self.gain * (self.channel.mask(x) + self.spatial.mask(x)))

    def masks(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C 1 1"], Float[Tensor, "B 1 H W"]]:
        """The channel mask and the spatial mask that `forward` multiplies by."""
        channel = self.channel.mask(x)
        return channel, self.spatial.mask(x if self.layout == "parallel" else x * channel)

    def multiply_adds(self, height: int, width: int, *, as_published: bool = False) -> int:
        """Multiply-adds for one map, but for the masks' own multiplications."""
        return sum(
            branch.multiply_adds(height, width, as_published=as_published) for branch in (self.channel, self.spatial)
        )

    def extra_repr(self) -> str:
        return f"layout={self.layout!r}, gain={self.gain}"


@layers.register("psa")
class GridPSA(PSA):
    """PSA on a grid of tokens, (B, H, W, C) -> (B, H, W, C); it has no heads, and the grid may have any size."""

    def __init__(self, dim: int, num_heads: int = 1, grid: tuple[int, int] | None = None, **options: object) -> None:
        super().__init__(dim, **options)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"GridPSA takes tokens (B, H, W, {self.dim}), channels last; got {tuple(x.shape)}")
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


# -- in residual networks


@provides("35-psa")
@dataclass(frozen=True)
class Insertion:
    """What `insert_psa` has done.

    Args:
        blocks: names of the blocks that got a PSA.
        before: parameters of the network before.
        added: parameters of the PSAs.
    """

    blocks: tuple[str, ...]
    before: int
    added: int

    def __str__(self) -> str:
        share = self.added / self.before
        return f"{len(self.blocks)} blocks, {self.before:,} parameters and {self.added:,} added ({share:+.1%})"


@provides("35-psa")
def insert_psa(
    model: nn.Module, blocks: Sequence[type[nn.Module]] = (BasicBlock, Bottleneck), **options: object
) -> Insertion:
    """Put a PSA after the first 3x3 convolution, its norm and its activation, of every residual block, in place.

    Args:
        model: a timm network of ResNet blocks (ResNet, HRNet), or one such block. Blocks have a slot there, `aa`,
            meant for anti-aliasing.
        blocks: which classes of blocks; the authors' HRNet has PSA in BasicBlock alone.
        options: of `PSA`.

    Raises:
        ValueError: no such blocks; a block without a 3x3 convolution there, or whose slot is taken.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, tuple(blocks))}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no {' or '.join(kind.__name__ for kind in blocks)} of timm to put a PSA into"
        )
    widths = {}
    for name, block in found.items():
        # A Bottleneck's first convolution is 1x1, and the 3x3 one is its second.
        conv = getattr(block, "conv2" if isinstance(block, Bottleneck) else "conv1", None)
        if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (3, 3):
            raise ValueError(f"block {name or type(block).__name__!r} has no 3x3 convolution to follow: {conv}")
        if not isinstance(getattr(block, "aa", None), nn.Identity):
            raise ValueError(f"block {name or type(block).__name__!r}: its place for a PSA, 'aa', is taken")
        widths[name] = conv.out_channels
    before = sum(p.numel() for p in model.parameters())
    device = next(model.parameters()).device
    for name, block in found.items():
        block.aa = PSA(widths[name], **options).to(device)  # type: ignore[arg-type]
    return Insertion(tuple(found), before, sum(p.numel() for p in model.parameters()) - before)


@provides("35-psa")
@torch.no_grad()
def psa_overhead(model: nn.Module, image: Float[Tensor, "B C H W"]) -> tuple[int, int]:
    """Multiply-adds of the PSAs in a network, and of all of it, for the given images (their values do not matter)."""
    spent = 0

    def count(psa: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal spent
        assert isinstance(psa, PSA)
        spent += len(inputs[0]) * psa.multiply_adds(*inputs[0].shape[2:])

    hooks = [module.register_forward_pre_hook(count) for module in model.modules() if isinstance(module, PSA)]
    try:
        with FlopCounterMode(display=False) as counter:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return spent, counter.get_total_flops() // 2


_RENAMES = (
    (r"\bdeattn\.", "aa."),  # what the authors' HRNet calls the PSA of a block
    (r"\bconv_([qv])_right\.", r"channel.\1."),
    (r"\bconv_up\.", "channel.up."),
    (r"\bconv_([qv])_left\.", r"spatial.\1."),
)


@provides("35-psa")
def load_authors(module: nn.Module, weights: dict[str, Tensor], source: str = "the authors' weights") -> None:
    """Load weights by the authors' names into a `PSA`, or into a timm block or network with PSAs inserted.

    Raises:
        ValueError: keys that are missing, left over or of another shape.
    """
    own = {}
    for key, value in weights.items():
        for theirs, ours in _RENAMES:
            key = re.sub(theirs, ours, key)
        own[key] = value
    load_weights(module, own, source)
