"""Focal modulation (card 68): context gathered by ever wider depthwise convolutions, gated, multiplied into the query.

With L levels, kernels k_l = window + factor (l - 1), x of (B, H, W, C):

    q, c_0, G = x W_f                                      (H, W, C), (H, W, C), (H, W, L + 1)
    c_l = GELU(depthwise conv_{k_l}(c_{l-1}))              (H, W, C),  l = 1 .. L
    c_{L+1} = GELU(mean of c_L over H and W)               (C)
    m = W_h sum_l G_l c_l                                  (H, W, C)   the modulator; over L + 1 if normalised
    y = W_p (q * m)                                        (H, W, C)   with LayerNorm before W_p if post_norm

There are no heads and no softmax: this is not attention over pairs of tokens, and its cost is linear in H W.

Yang, Li, Dai, Yuan, Gao, "Focal Modulation Networks", NeurIPS 2022, arXiv 2203.11926. Parameter names are the
authors': f, focal_layers, h, ln, proj.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.checkpoint import load_weights
from heed.layers.registry import layers

# Names in transformers' FocalNetModulation, and ours.
TRANSFORMERS_NAMES = {
    "projection_in": "f",
    "projection_context": "h",
    "projection_out": "proj",
    "layernorm": "ln",
}


@provides("68-focalnet")
@dataclass(frozen=True)
class FocalParts:
    """What a focal modulation computes on its way, channels first, for looking at.

    Args:
        query: q, (B, C, H, W).
        contexts: c_1 .. c_L of (B, C, H, W), then the global context c_{L+1} of (B, C, 1, 1).
        gates: G, (B, L + 1, H, W); the last is the global context's. Any real number.
        modulator: m, (B, C, H, W).
    """

    query: Float[Tensor, "B C H W"]
    contexts: tuple[Tensor, ...]
    gates: Float[Tensor, "B levels H W"]
    modulator: Float[Tensor, "B C H W"]

    def strength(self) -> Float[Tensor, "B H W"]:
        """The length of the modulator at every position: the map that the authors draw."""
        return self.modulator.float().norm(dim=1)

    def shares(self) -> Float[Tensor, "B levels H W"]:
        """Each level's part in what is gathered, |G_l| |c_l| over their sum: (B, L + 1, H, W), 1 in sum over levels."""
        lengths = torch.cat(
            [c.float().norm(dim=1, keepdim=True).expand_as(self.gates[:, :1]) for c in self.contexts], 1
        )
        parts = self.gates.float().abs() * lengths
        return parts / parts.sum(1, keepdim=True).clamp_min(torch.finfo(parts.dtype).tiny)


@provides("68-focalnet")
class FocalModulation(nn.Module):
    """Focal modulation of a grid of tokens; a drop-in for self-attention on grids, and for timm's and transformers' own.

    Args:
        dim: channels C.
        window: side of the first level's kernel in tokens, odd.
        levels: L, convolutions of growing side; 0 leaves the global context alone.
        factor: how much the side grows from level to level, even.
        bias: whether f and h have biases; proj always has one.
        post_norm: LayerNorm between modulation and output projection.
        normalize_modulator: divide the gathered context by L + 1.
        drop: dropout after the output projection.
        channels_first: take and return (B, C, H, W).
        grid: rows and columns of (B, N, C) input, for hosts that do not say.

    Raises:
        ValueError: negative levels, or a kernel that is even, which would change the size of the map.
    """

    def __init__(
        self,
        dim: int,
        window: int = 3,
        levels: int = 2,
        factor: int = 2,
        *,
        bias: bool = True,
        post_norm: bool = False,
        normalize_modulator: bool = False,
        drop: float = 0.0,
        channels_first: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if levels < 0:
            raise ValueError(f"levels={levels} must not be negative; 0 leaves the global context alone")
        self.kernels = [window + factor * level for level in range(levels)]
        if any(kernel < 1 or kernel % 2 == 0 for kernel in self.kernels):
            raise ValueError(
                f"window={window} and factor={factor} give kernels {self.kernels}: all must be odd, so that the map "
                "keeps its size; take an odd window and an even factor"
            )
        self.dim = dim
        self.levels = levels
        self.normalize_modulator = normalize_modulator
        self.channels_first = channels_first
        self.grid = grid
        self.f = nn.Linear(dim, 2 * dim + levels + 1, bias=bias)
        self.h = nn.Conv2d(dim, dim, 1, bias=bias)
        self.focal_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False), nn.GELU())
            for kernel in self.kernels
        )
        self.ln = nn.LayerNorm(dim) if post_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop)

    @property
    def receptive_fields(self) -> list[int]:
        """Side in tokens that each convolutional level sees; the level after them sees the whole map."""
        return [1 + reach for reach in accumulate(kernel - 1 for kernel in self.kernels)]

    def forward(
        self, x: Float[Tensor, "B *N C"], height: int | None = None, width: int | None = None
    ) -> Float[Tensor, "B *N C"]:
        """Modulate tokens.

        Args:
            x: (B, H, W, C), or (B, C, H, W) with `channels_first`, or (B, N, C) with the tokens in row-major order.
            height, width: H and W, for (B, N, C) without `grid` only; N = H * W.

        Returns:
            The same shape.
        """
        query, context, gates = self._split(self._on_grid(x, height, width))
        y = self.drop(self.proj(self.ln(query * self._modulator(context, gates))))
        return y.permute(0, 3, 1, 2) if self.channels_first and x.ndim == 4 else y.reshape(x.shape)

    def parts(self, x: Float[Tensor, "B *N C"], height: int | None = None, width: int | None = None) -> FocalParts:
        """Query, contexts, gates and modulator for the same input as `forward`; nothing is kept on the module."""
        query, context, gates = self._split(self._on_grid(x, height, width))
        contexts: list[Tensor] = []
        parts = (query, gates, self._modulator(context, gates, contexts))
        query, gates, modulator = (part.permute(0, 3, 1, 2) for part in parts)
        return FocalParts(query, tuple(part.permute(0, 3, 1, 2) for part in contexts), gates, modulator)

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds for one image of height x width tokens, counted as the authors do."""
        gathering = sum(kernel**2 + 1 for kernel in self.kernels) + 1
        dense = self.f.weight.numel() + self.dim * (self.dim + 1) + self.proj.weight.numel()
        return height * width * (dense + gathering * self.dim)

    def load_transformers(self, weights: dict[str, Tensor]) -> None:
        """Load the state dict of a FocalNetModulation of transformers."""
        heads = {name.split(".", 1)[0] for name in weights}
        names = {head: TRANSFORMERS_NAMES.get(head, head) for head in heads}
        renamed = {names[key.split(".", 1)[0]] + key[key.index(".") :]: value for key, value in weights.items()}
        load_weights(self, renamed, "the weights of transformers")

    def extra_repr(self) -> str:
        return f"kernels={self.kernels}, normalize_modulator={self.normalize_modulator}"

    def _on_grid(self, x: Tensor, height: int | None, width: int | None) -> Tensor:
        """(B, H, W, C) of any of the inputs `forward` takes."""
        if x.ndim == 4:
            grid = x.permute(0, 2, 3, 1) if self.channels_first else x
        elif x.ndim == 3:
            rows, columns = (height, width) if height is not None and width is not None else self.grid or (0, 0)
            if rows * columns != x.shape[1]:
                raise ValueError(
                    f"{x.shape[1]} tokens are not height={rows} times width={columns}; give the height and width of "
                    "the grid, or (B, H, W, C)"
                )
            grid = x.unflatten(1, (rows, columns))
        else:
            raise ValueError(f"input {tuple(x.shape)}: give (B, H, W, C), (B, N, C), or (B, C, H, W) if channels_first")
        if grid.shape[-1] != self.dim:
            raise ValueError(f"FocalModulation has dim={self.dim}, the input {tuple(x.shape)} has {grid.shape[-1]}")
        return grid

    def _split(self, x: Tensor) -> list[Tensor]:
        """q, c_0 and G as (B, H, W, .)"""
        return list(self.f(x).split([self.dim, self.dim, self.levels + 1], -1))

    def _modulator(self, context: Tensor, gates: Tensor, contexts: list[Tensor] | None = None) -> Tensor:
        """m as (B, H, W, C); c_1 .. c_{L+1} go to `contexts`, and without it are let go as soon as they are used."""
        gathered: Tensor | None = None
        for layer, gate in zip([*self.focal_layers, _whole], gates.split(1, -1), strict=True):
            # Depthwise convolutions are fastest with the channels last in memory, as they are here.
            context = layer(context.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            gathered = context * gate if gathered is None else gathered + context * gate
            if contexts is not None:
                contexts.append(context)
        if self.normalize_modulator:
            gathered = gathered / (self.levels + 1)  # type: ignore[operator]
        return F.linear(gathered, self.h.weight.flatten(1), self.h.bias)  # type: ignore[arg-type]


def _whole(context: Tensor) -> Tensor:
    """GELU of the mean over the map, (B, C, H, W) -> (B, C, 1, 1)."""
    precise = torch.promote_types(context.dtype, torch.float32)  # thousands of positions are summed
    return F.gelu(context.mean((2, 3), keepdim=True, dtype=precise)).to(context.dtype)


@provides("68-focalnet")
def refocus(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Change weights to the windows and levels that the focal modulations of `model` have.

    A kernel is padded with zeros around it or cropped to its middle. Levels that are new start with the model's own
    kernels and with gates of 0. Wider windows alone leave every output as it was; a new level does so where the global
    gate is 0, as the global context is taken from the last level.

    Args:
        weights: a state dict with the names of `model`, of a model with other windows or fewer levels.
        model: a `FocalModulation`, or a model that holds some.

    Returns:
        A state dict in which every entry of a focal modulation fits `model`.

    Raises:
        NotImplementedError: the weights have more levels than the model.
    """
    result = dict(weights)
    for name, layer in model.named_modules():
        start = f"{name}." if name else ""
        if not isinstance(layer, FocalModulation) or f"{start}f.weight" not in weights:
            continue
        had = weights[f"{start}f.weight"].shape[0] - 2 * layer.dim - 1
        if had > layer.levels:
            raise NotImplementedError(
                f"{name or 'the layer'} has levels={layer.levels}, the weights have {had}: dropping levels is not "
                f"supported; build the model with levels={had} or more"
            )
        for key in (f"{start}f.weight", f"{start}f.bias"):
            if key in weights:
                value = weights[key]
                new = value.new_zeros(layer.levels - had, *value.shape[1:])
                result[key] = torch.cat([value[:-1], new, value[-1:]])  # the last row gates the global context
        for level, conv in enumerate(layer.focal_layers):
            key = f"{start}focal_layers.{level}.0.weight"
            if level >= had:
                result[key] = conv[0].weight.detach()  # type: ignore[index]
            elif key in weights:
                margin, odd = divmod(layer.kernels[level] - weights[key].shape[-1], 2)
                if odd:
                    raise ValueError(
                        f"{key} {tuple(weights[key].shape)} cannot be centred in a kernel of {layer.kernels[level]}"
                    )
                result[key] = F.pad(weights[key], (margin,) * 4)
    return result


@layers.register("focal")
def _focal(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    # There are no heads to divide the channels into. Two levels, the authors' small receptive field of 7, fit any grid.
    return FocalModulation(dim, **options)  # type: ignore[arg-type]
