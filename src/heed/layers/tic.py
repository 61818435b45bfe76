"""MSA-Conv (card 52): self-attention in the window of a convolution, then the convolution; maps of any size, linear cost.

With K = kh x kw taps at the offsets o_t (see `heed.layers.msa_conv`):

    q, k, v = chunk(W x + b)                            (B, C, H, W) each
    A[t, y] = softmax_t(C^-0.5 q[y] . k[y + o_t])       (B, K, H, W); beyond the map k = v = 0, which still takes weight
    o[y] = x[y] + sum_t A[t, y] v[y + o_t]              (B, C, H, W)
    y = ReLU(conv(o))                                   (B, C', H', W'), the convolution's kernel is kh x kw, too

Zhang, Wang, Bian, Xiong, "TiC: Exploring Vision Transformer in Convolution", arXiv 2310.04134. The authors released this
layer with one head, and the names of its parameters are theirs. Heads, pad_mode="mask", `MDCSM` and `IPM` are heed's own
reading of the paper's abstract: no code of them was published, and none of the paper's figures is claimed for them.
"""

from __future__ import annotations

import warnings
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.checks import per_axis
from heed.layers.attention import check_heads
from heed.layers.msa_conv import ConvWindow, PerAxis, check_pad_mode, msa_conv, msa_conv_qk
from heed.layers.registry import layers


@provides("52-tic")
class MSAConv2d(nn.Module):
    """Windowed attention, its input added, a convolution, ReLU: (B, C, H, W) -> (B, out_channels, H', W').

    It takes the place of a Conv2d; H' and W' are those of the output convolution. There is no normalisation and no
    position encoding, and the output is not negative.

    Args:
        in_channels: C.
        out_channels: channels of the output.
        kernel_size: of the attention window and of the output convolution, one number or (rows, columns).
        stride: of the output convolution; the attention works on all pixels.
        dilation: of the attention window alone.
        dropout: of attention weights while training.
        padding: of the output convolution, in pixels. The authors' 1 keeps the size for 3 x 3 only; "same" keeps it,
            (kernel_size - 1) / 2 whatever the dilation.
        bias: of the output convolution.
        heads, pad_mode: see `msa_conv`; the authors have 1 and "zeros".

    Raises:
        ValueError: settings that do not fit, another number of channels, or a map smaller than the output convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: PerAxis,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        dropout: float = 0.1,
        padding: PerAxis | str = 1,
        bias: bool = False,
        *,
        heads: int = 1,
        pad_mode: str = "zeros",
    ) -> None:
        super().__init__()
        check_heads(in_channels, heads)
        check_pad_mode(pad_mode)
        window = ConvWindow((1, 1), kernel_size, dilation)
        self.in_channels = in_channels
        self.kernel_size = window.kernel
        self.dilation = window.dilation
        self.heads = heads
        self.pad_mode = pad_mode
        self.dropout = dropout
        self.qkv_conv = nn.Conv2d(in_channels, 3 * in_channels, 1)
        amount = _padding(padding, window.kernel)
        self.mlp = nn.Conv2d(in_channels, out_channels, window.kernel, per_axis("stride", stride, 2), amount, bias=bias)

    @classmethod
    def in_place_of(cls, conv: nn.Conv2d, **options: object) -> Self:
        """A new layer with the channels, kernel, stride, padding and bias of a convolution that it is to replace.

        Args:
            conv: a convolution. Its dilation becomes that of the attention window, and its groups are not kept: the
                output convolution is dense.
            options: further settings of the layer, such as heads.
        """
        settings = {"dilation": conv.dilation, "padding": "same", "bias": conv.bias is not None} | options
        return cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, **settings)  # type: ignore[arg-type]

    def qkv(self, x: Float[Tensor, "B C H W"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, C, H, W) each."""
        rows, columns = self.kernel_size
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"input {tuple(x.shape)}: {type(self).__name__} takes maps (B, {self.in_channels}, H, W)")
        height, width = (side + 2 * int(pad) for side, pad in zip(x.shape[2:], self.mlp.padding, strict=True))
        if rows > height or columns > width:
            raise ValueError(
                f"the kernel of {rows} x {columns} is larger than the map of {x.shape[2]} x {x.shape[3]} pixels, padded "
                f"to {height} x {width}; set padding='same' or a smaller kernel_size"
            )
        q, k, v = self.qkv_conv(x).chunk(3, 1)
        return q, k, v

    def mixed(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The values after attention, before the input is added."""
        q, k, v = self.qkv(x)
        dropout = self.dropout if self.training else 0.0
        return msa_conv(q, k, v, **self._window_settings(), pad_mode=self.pad_mode, dropout=dropout)  # type: ignore[arg-type]

    def attention(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B taps H W"]:
        """The weights (B, heads * K, H, W), ordered [head][tap], before dropout."""
        q, k, _ = self.qkv(x)
        # The engine gives no weights tap by tap, so the softmax is here.
        dots = msa_conv_qk(q, k, **self._window_settings(), pad_mode=self.pad_mode)  # type: ignore[arg-type]
        scores = dots.unflatten(1, (self.heads, -1)) * (self.in_channels // self.heads) ** -0.5
        outside = scores.isneginf()  # a window may lie outside as a whole: no weights, rather than NaN
        weights = scores.masked_fill(outside, torch.finfo(scores.dtype).min).softmax(2)
        return weights.masked_fill(outside, 0.0).flatten(1, 2)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return F.relu(self.mlp(self.mixed(x) + x))

    def _window_settings(self) -> dict[str, object]:
        return {"kernel_size": self.kernel_size, "dilation": self.dilation, "heads": self.heads}

    def extra_repr(self) -> str:
        return f"dilation={self.dilation}, heads={self.heads}, pad_mode={self.pad_mode!r}"


@provides("52-tic")
class IPM(MSAConv2d):
    """Inter-pooling, heed's reading: MSA-Conv whose keys and values are averages of 2 x 2 pixels.

    A window of k x k keys covers 2k x 2k pixels, and is centred on the key that covers the query; queries keep the
    full resolution, and sides need not be even. Arguments are those of `MSAConv2d`.
    """

    pool = 2

    def qkv(self, x: Float[Tensor, "B C H W"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, C, H, W), and keys and values (B, C, ceil(H / 2), ceil(W / 2))."""
        q, k, v = super().qkv(x)
        k, v = (F.avg_pool2d(part, self.pool, ceil_mode=True) for part in (k, v))
        return q, k, v

    def _window_settings(self) -> dict[str, object]:
        return super()._window_settings() | {"pool": self.pool}


@provides("52-tic")
class MDCSM(nn.Module):
    """Multi-directional cyclic shift, heed's reading: a layer works on a map rolled over its borders, and is rolled back.

    What lies at opposite borders becomes adjacent, which zero-padded windows otherwise separate; it costs no arithmetic.

    Args:
        layer: (B, C, H, W) -> (B, C', H, W), usually an `MSAConv2d` without stride.
        shift: pixels that the map is rolled by, down and to the right.

    Raises:
        ValueError: a layer that changes the size of the map.
    """

    def __init__(self, layer: nn.Module, shift: tuple[int, int]) -> None:
        super().__init__()
        self.layer = layer
        self.shift = shift

    @staticmethod
    def directions(size: int, diagonals: bool = False) -> list[tuple[int, int]]:
        """The shifts that the layers of a network take in turns: down, right, up, left, then the four diagonals."""
        straight = [(size, 0), (0, size), (-size, 0), (0, -size)]
        return straight + [(size, size), (size, -size), (-size, -size), (-size, size)] * diagonals

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        down, right = self.shift
        y = self.layer(x.roll((down, right), (2, 3)))
        if y.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"the layer turns {x.shape[2]} x {x.shape[3]} pixels into {y.shape[2]} x {y.shape[3]}, so the shift "
                "cannot be undone; use a layer without stride and with padding='same'"
            )
        return y.roll((-down, -right), (2, 3))

    def extra_repr(self) -> str:
        return f"shift={self.shift}"


@provides("52-tic")
class MSAConvAttention(MSAConv2d):
    """`MSAConv2d` on a grid of tokens, (B, H, W, C) -> (B, H, W, C): in the place of self-attention.

    It is more than attention: its own input and a convolution belong to it, and its output is not negative.
    """

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@provides("52-tic")
def msa_conv_multiply_adds(
    dim: int, height: int, width: int, kernel_size: PerAxis = 3, out_dim: int | None = None, stride: int = 1
) -> dict[str, int]:
    """Multiply-adds per image of `MSAConv2d` on `dim` channels of height x width pixels, beside global attention.

    Args:
        dim: channels C.
        height, width: of the map in pixels.
        kernel_size, stride: of the layer.
        out_dim: channels of its output, default dim.

    Returns:
        "MSA-Conv", pixels * (3 C^2 + 2 K C + K C C' / stride^2), and "global attention" of the same width, pixels * 4 C^2
        + 2 pixels^2 C.
    """
    rows, columns = per_axis("kernel_size", kernel_size, 2)
    pixels, taps = height * width, rows * columns
    outputs = -(-height // stride) * -(-width // stride)
    return {
        "MSA-Conv": pixels * (3 * dim**2 + 2 * taps * dim) + outputs * taps * dim * (out_dim or dim),
        "global attention": pixels * (4 * dim**2 + 2 * pixels * dim),
    }


def _padding(padding: PerAxis | str, kernel: tuple[int, int]) -> tuple[int, int]:
    """Padding of the output convolution per axis."""
    same = tuple((side - 1) // 2 for side in kernel)
    if padding == "same":
        if any(side % 2 == 0 for side in kernel):
            raise ValueError(f"padding='same' needs odd sides, not kernel_size={kernel}; give the padding in pixels")
        return same  # type: ignore[return-value]
    if isinstance(padding, str):
        raise ValueError(f"padding={padding!r} must be 'same' or pixels, one number or one per axis")
    amount = per_axis("padding", padding, 2, least=0)
    if amount != same:
        warnings.warn(
            f"padding={padding} with kernel_size={kernel} changes the size of the map; {same} would keep it, whatever "
            "the dilation (padding='same')",
            stacklevel=3,
        )
    return amount  # type: ignore[return-value]


@layers.register("msa_conv")
def _msa_conv(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    defaults = {"kernel_size": 3, "dropout": 0.0, "padding": "same", "heads": num_heads}
    return MSAConvAttention(dim, dim, **(defaults | options))  # type: ignore[arg-type]
