"""The operators of MSA-Conv (card 52): attention in which every pixel sees the taps of a convolution centred on it.

With a kernel of kh x kw = K taps and dilation d, tap t of the pixel y lies at y + o_t, o_t = d (t - (k - 1) / 2) per axis:

    dots[t, y] = q[y] . k[y + o_t]                   (B, K, H, W); beyond the map k = v = 0
    out[y] = sum_t a[t, y] v[y + o_t]                (B, C, H, W); a = softmax_t(C^-0.5 dots), which gives weight to
                                                     taps beyond the map, too

`msa_conv` does all of it under the pattern `ConvWindow`; `msa_conv_qk` and `msa_conv_av` are its halves, for what needs the
weights. Both work tap by tap on shifted views: neither a window nor a dense matrix of scores is ever gathered.

Zhang, Wang, Bian, Xiong, "TiC: Exploring Vision Transformer in Convolution", arXiv 2310.04134. The authors released the
halves, for one head. Heads (consecutive groups of channels, scale (C / heads)^-0.5, a softmax each; as many heads as
channels make the depthwise form), pad_mode="mask" and pooled keys are heed's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.axis import Axis
from heed.engine.checks import check_tokens, per_axis, positive_ints
from heed.engine.pattern import Pattern
from heed.errors import unknown
from heed.layers.attention import check_heads

PAD_MODES = ("zeros", "mask")
PerAxis = int | tuple[int, int]


@provides("52-tic")
@dataclass(frozen=True)
class ConvWindow(Pattern):
    """Each query sees the taps of a convolution centred on it. At the border windows are cut, not slid inward.

    Args:
        grid: sizes of the query grid, (H, W).
        kernel: taps per axis.
        dilation: step between taps, per axis; dilation * (kernel - 1) must be even, for a window to have a centre.
        pool: queries per key and axis: keys lie on a grid of ceil(H / pool) x ceil(W / pool), and a query's window is
            centred on the key that covers it.
        padded: True when the key grid is enlarged by `reach` on all sides, so that every window is whole and padding
            takes part; False when windows are cut at the border.
    """

    grid: tuple[int, int]
    kernel: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    pool: int = 1
    padded: bool = False

    def __init__(
        self, grid: tuple[int, int], kernel: PerAxis, dilation: PerAxis = 1, pool: int = 1, padded: bool = False
    ) -> None:
        set_ = object.__setattr__
        set_(self, "grid", positive_ints("grid", grid))
        set_(self, "kernel", per_axis("kernel", kernel, 2))
        set_(self, "dilation", per_axis("dilation", dilation, 2))
        set_(self, "pool", *positive_ints("pool", (pool,)))
        set_(self, "padded", padded)
        for a, (w, d) in enumerate(zip(self.kernel, self.dilation, strict=True)):
            if d * (w - 1) % 2:
                raise ValueError(
                    f"kernel {w} with dilation {d} on axis {a} has no centre; take an odd kernel or an even dilation"
                )

    @property
    def reach(self) -> tuple[int, int]:
        """From the centre of a window to its outermost tap, per axis."""
        return tuple(d * (w - 1) // 2 for w, d in zip(self.kernel, self.dilation, strict=True))  # type: ignore[return-value]

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def key_grid(self) -> tuple[int, int]:
        """Sizes of the key grid, without padding."""
        rows, columns = self.grid
        return -(-rows // self.pool), -(-columns // self.pool)

    def check(self, n: int, m: int) -> None:
        padding = (2 * reach * self.padded for reach in self.reach)
        check_tokens("ConvWindow", self.grid, n, "queries")
        check_tokens("ConvWindow", tuple(map(sum, zip(self.key_grid, padding, strict=True))), m, "keys")

    def axes(self, n: int, m: int) -> tuple[Axis, ...]:
        settings = zip(self.grid, self.kernel, self.dilation, self.reach, strict=True)
        return tuple(_axis(*setting, self.pool, self.padded) for setting in settings)


def _axis(queries: int, kernel: int, dilation: int, reach: int, pool: int, padded: bool) -> Axis:
    keys = -(-queries // pool) + 2 * reach * padded
    # Keys are sorted by their remainder modulo the dilation, so that the taps of a window follow each other.
    keys_of = [list(range(rest, keys, dilation)) for rest in range(dilation)]
    sizes = torch.tensor([len(members) for members in keys_of])
    start = sizes.cumsum(0) - sizes
    taps = [y // pool - (0 if padded else reach) for y in range(queries)]  # positions of the windows' first taps
    group, index = torch.tensor([(tap % dilation, tap // dilation) for tap in taps]).unbind(1)
    first = start[group] + index.clamp(min=0)
    last = start[group] + torch.minimum(index + kernel - 1, sizes[group] - 1)
    if dilation == 1:
        return Axis(first, last, keys)
    queries_of = [[y for y, tap in enumerate(taps) if tap % dilation == rest] for rest in range(dilation)]
    query_order, key_order = (torch.tensor(list(itertools.chain(*lists))) for lists in (queries_of, keys_of))
    pieces = tuple(len(part) for part in queries_of if part)
    return Axis(first[query_order], last[query_order], keys, query_order, key_order, pieces=pieces)


@provides("52-tic")
def msa_conv_qk(
    q: Float[Tensor, "B C H W"],
    k: Float[Tensor, "B C h w"],
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    *,
    heads: int = 1,
    pad_mode: str = "zeros",
    pool: int = 1,
    stride: int = 1,
) -> Float[Tensor, "B taps H W"]:
    """The scores q[y] . k[y + o_t] of every pixel with the taps of its window; not scaled. Differentiable.

    Half precision is computed in, and comes back in, float32.

    Args:
        q: (B, C, H, W).
        k: (B, C, ceil(H / pool), ceil(W / pool)).
        kernel_size: taps, one number or (rows, columns).
        dilation: pixels between taps, one number or one per axis; dilation * (kernel_size - 1) must be even.
        heads: consecutive groups of channels with scores of their own.
        pad_mode: taps beyond the map have score 0 ("zeros", the authors') or -inf ("mask").
        pool: pixels of q per pixel of k and axis.
        stride: 1 is all there is, as in the authors' operator.

    Returns:
        (B, heads * K, H, W), ordered [head][tap], taps row by row.

    Raises:
        ValueError: shapes or settings that do not fit.
    """
    window = _window(q, {"k": k}, q.shape[1], kernel_size, dilation, heads, pad_mode, pool, stride)
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    dots = torch.stack([(q * tap).unflatten(1, (heads, -1)).sum(2) for tap in _taps(k, window)], 2)
    if pad_mode == "mask":
        inside = torch.stack(list(_taps(torch.ones_like(k[:1, :1]), window)), 2)
        dots = dots.masked_fill(inside == 0, -torch.inf)
    return dots.flatten(1, 2)


@provides("52-tic")
def msa_conv_av(
    attention: Float[Tensor, "B taps H W"],
    v: Float[Tensor, "B C h w"],
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    *,
    heads: int = 1,
    pool: int = 1,
    stride: int = 1,
) -> Float[Tensor, "B C H W"]:
    """The values in every pixel's window mixed, sum_t a[t, y] v[y + o_t]; v is 0 beyond the map. Differentiable.

    Args:
        attention: (B, heads * K, H, W) weights, ordered as `msa_conv_qk` orders scores.
        v: (B, C, ceil(H / pool), ceil(W / pool)).
        kernel_size, dilation, heads, pool, stride: as in `msa_conv_qk`.

    Raises:
        ValueError: shapes or settings that do not fit.
    """
    window = _window(attention, {"v": v}, v.shape[1], kernel_size, dilation, heads, "zeros", pool, stride)
    if attention.shape[1] != heads * window.taps:
        raise ValueError(
            f"attention {tuple(attention.shape)} has {attention.shape[1]} channels; {heads} heads of {window.taps} taps "
            f"make {heads * window.taps}"
        )
    weights = attention.unflatten(1, (heads, 1, window.taps)).unbind(3)  # (B, heads, 1, H, W) per tap
    out: Tensor | None = None
    for weight, tap in zip(weights, _taps(v, window), strict=True):
        part = weight * tap.unflatten(1, (heads, -1))
        out = part if out is None else out + part
    assert out is not None  # a window has at least one tap
    return out.flatten(1, 2)


@provides("52-tic")
def msa_conv(
    q: Float[Tensor, "B C H W"],
    k: Float[Tensor, "B C h w"],
    v: Float[Tensor, "B C h w"],
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    *,
    heads: int = 1,
    pad_mode: str = "zeros",
    pool: int = 1,
    dropout: float = 0.0,
) -> Float[Tensor, "B C H W"]:
    """softmax over taps of (C / heads)^-0.5 q[y] . k[y + o_t], times v[y + o_t]; the weights are never formed.

    Args:
        q, k, v, kernel_size, dilation, heads, pool: as in `msa_conv_qk` and `msa_conv_av`.
        pad_mode: taps beyond the map have score and value 0 and take weight ("zeros", the authors'), or none ("mask").
        dropout: probability of dropping a weight.

    Raises:
        ValueError: shapes or settings that do not fit.
    """
    window = _window(q, {"k": k, "v": v}, q.shape[1], kernel_size, dilation, heads, pad_mode, pool)
    if window.padded:
        k, v = (_pad(x, window) for x in (k, v))
    q_, k_, v_ = (x.reshape(x.shape[0], heads, -1, x.shape[2] * x.shape[3]).transpose(2, 3) for x in (q, k, v))
    mixed = attend(q_, k_, v_, window, dropout=dropout).transpose(1, 2)
    return mixed.reshape(q.shape[0], *q.shape[2:], q.shape[1]).permute(0, 3, 1, 2)


def _taps(x: Tensor, window: ConvWindow) -> Iterator[Tensor]:
    """For tap after tap, row by row, what lies there for every query: (B, C, H, W). Views, unless keys are pooled."""
    rows, columns = x.shape[2:]
    x = _pad(x, window)
    for i in range(window.kernel[0]):
        for j in range(window.kernel[1]):
            top, left = i * window.dilation[0], j * window.dilation[1]
            tap = x[:, :, top : top + rows, left : left + columns]
            if window.pool > 1:
                tap = tap.repeat_interleave(window.pool, 2).repeat_interleave(window.pool, 3)
            yield tap[:, :, : window.grid[0], : window.grid[1]]


def _pad(x: Tensor, window: ConvWindow) -> Tensor:
    down, right = window.reach
    return F.pad(x, (right, right, down, down))


def check_pad_mode(pad_mode: str) -> None:
    """Raise ValueError for what is none of `PAD_MODES`."""
    if pad_mode not in PAD_MODES:
        raise ValueError(unknown("pad_mode", pad_mode, PAD_MODES))


def _window(
    queries: Tensor,
    keys: dict[str, Tensor],
    channels: int,
    kernel_size: PerAxis,
    dilation: PerAxis,
    heads: int,
    pad_mode: str,
    pool: int,
    stride: int = 1,
) -> ConvWindow:
    """The pattern of a call, after a check of its maps by name."""
    if stride != 1:
        raise ValueError(f"stride={stride}: the operators work on every pixel; stride MSAConv2d's output convolution")
    check_pad_mode(pad_mode)
    if queries.ndim != 4:
        raise ValueError(f"maps must be (B, C, H, W), not {tuple(queries.shape)}")
    window = ConvWindow(tuple(queries.shape[2:]), kernel_size, dilation, pool, pad_mode == "zeros")  # type: ignore[arg-type]
    check_heads(channels, heads)
    wanted = (queries.shape[0], channels, *window.key_grid)
    for name, x in keys.items():
        if x.shape != wanted:
            raise ValueError(
                f"{name} {tuple(x.shape)} must be {wanted} to fit a map {tuple(queries.shape)} with pool={pool}"
            )
    return window
