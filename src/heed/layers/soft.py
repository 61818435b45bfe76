"""SOFT (card 64): attention without softmax, a Gaussian kernel between tokens that a few landmark tokens approximate.

    Q' = x W_q / d^(1/4),  V = x W_v                         (B, h, N, d); the keys are the queries
    L  = GELU(LN(conv_rxr/r(Q')))                            (B, h, M, d)  landmarks, M = floor(H/r) * floor(W/r)
    K(a, b) = exp(-|a - b|^2 / 2)
    X  = (K(Q', L) Y) (K(Q', L)^T V) + conv_kxk(V)           (B, h, N, d), Y ~ K(L, L)^-1 by Newton's iteration
    SOFT++:  D^-1/2 Y D^-1/2 in the place of Y,  D = row sums of K(L, L)

Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity", NeurIPS 2021 (arXiv 2110.11945), and "Softmax-free
Linear Transformers", IJCV 2024 (arXiv 2207.03341). The cost is linear in N where M is fixed, with `num_landmarks`; with
a fixed stride r, as released, M grows with the grid. There is no softmax here, so the engine has no part in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.precision import at_least_float32, no_autocast
from heed.errors import unknown
from heed.layers.attention import check_heads
from heed.layers.registry import layers

_RIDGE = 0.01  # added to the diagonal of K(L, L) before the plain variant inverts it


@provides("64-soft")
def gaussian_kernel(a: Float[Tensor, "*B N d"], b: Float[Tensor, "*B M d"]) -> Float[Tensor, "*B N M"]:
    """exp(-|a_i - b_j|^2 / 2) of all pairs of rows, from one product: no (N, M, d) tensor of differences is made.

    Rounding may leave a squared distance slightly below 0, and the kernel slightly above 1, as in the authors' code.
    """
    half_a, half_b = a.square().sum(-1, keepdim=True) / 2, b.square().sum(-1) / 2
    return (a @ b.transpose(-1, -2) - half_a - half_b[..., None, :]).exp()


def _newton(matrix: Tensor, start: Tensor, iterations: int) -> Tensor:
    """Y <- 2Y - Y P Y."""
    for _ in range(iterations):
        start = 2 * start - start @ matrix @ start
    return start


class _NewtonInverse(torch.autograd.Function):
    """Newton's iteration unrecorded; the gradient is that of an inverse, dP = -Y^T G Y^T, at the last iterate."""

    @staticmethod
    def forward(kernel: Tensor, iterations: int) -> Tensor:
        alpha = 1.8 / kernel.sum(-1).amax(-1)[..., None, None].square()
        ridged = kernel + _RIDGE * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
        return _newton(ridged, alpha * ridged, iterations)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.transpose(-1, -2)
        return -(transposed @ gradients[0] @ transposed), None


@provides("64-soft")
def newton_inverse(kernel: Float[Tensor, "*B M M"], iterations: int = 20) -> Float[Tensor, "*B M M"]:
    """Approximate inverses of kernel + 0.01 I, as SOFT computes them.

    The count is part of the definition: with a small eigenvalue 20 iterations have not converged. The backward pass
    keeps the result alone, whatever the count.

    Args:
        kernel: (..., M, M) symmetric matrices with positive entries.
        iterations: Newton steps, at least 1.
    """
    return _NewtonInverse.apply(kernel, _check_iterations(iterations))  # type: ignore[no-any-return]


@provides("64-soft")
def normalised_newton_inverse(
    kernel: Float[Tensor, "B h M M"], iterations: int = 20, *, per_sample: bool = False
) -> Float[Tensor, "B h M M"]:
    """Approximate inverses of the kernel, as SOFT++ computes them: no ridge, gradients through every iteration.

    The start alpha * kernel, alpha = 2 / (largest row sum)^2, is halved up to ten times while the largest column sum of
    |I - alpha kernel^2| exceeds 1.01.

    Args:
        kernel: (B, h, M, M) symmetric matrices with positive entries.
        iterations: Newton steps, at least 1.
        per_sample: take the largest sums per batch element, so that an element's result does not depend on the others
            in its batch. The authors take them over the whole batch, which is the default.
    """
    _check_iterations(iterations)
    over = (1, 2) if per_sample else (0, 1, 2)
    alpha = 2 / kernel.sum(-1, keepdim=True).amax((*over, 3), keepdim=True).square()
    with torch.no_grad():
        identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
        squared, shrink = kernel @ kernel, torch.ones_like(alpha)
        for _ in range(10):  # without a branch, so that it compiles; once small enough, alpha stays
            residual = (identity - shrink * alpha * squared).abs().sum(-2, keepdim=True).amax((*over, 3), keepdim=True)
            shrink = torch.where(residual > 1.01, shrink / 2, shrink)
    return _newton(kernel, shrink * alpha * kernel, iterations)


@provides("64-soft")
@dataclass(frozen=True, eq=False)
class Landmarks:
    """The low-rank form of the Gaussian kernel between tokens: K(Q', Q') ~ K(Q', L) K(L, L)^-1 K(L, Q').

    Args:
        landmarks: (B, h, M, d) L.
        tokens: (B, h, N, M) K(Q', L).
        kernel: (B, h, M, M) K(L, L).
        inverse: (B, h, M, M) its inverse, more or less.
    """

    landmarks: Tensor
    tokens: Tensor
    kernel: Tensor
    inverse: Tensor

    @classmethod
    def between(
        cls,
        q: Float[Tensor, "*B N d"],
        landmarks: Float[Tensor, "*B M d"],
        invert: Callable[[Tensor], Tensor] = newton_inverse,
    ) -> Landmarks:
        """The kernels between tokens and landmarks of one's own choice."""
        kernel = gaussian_kernel(landmarks, landmarks)
        return cls(landmarks, gaussian_kernel(q, landmarks), kernel, invert(kernel))

    def mix(self, v: Float[Tensor, "*B N dv"], normalised: bool = False) -> Float[Tensor, "*B N dv"]:
        """K(Q', L) Y (K(Q', L)^T v), linear in N; `normalised` is SOFT++."""
        inverse = _normalise(self.inverse, self.kernel) if normalised else self.inverse
        # The cheaper tokens (inverse (tokens^T v)) would cancel large numbers wherever the inverse is large.
        return (self.tokens @ inverse) @ (self.tokens.transpose(-1, -2) @ v)


@provides("64-soft")
class SoftKernel(nn.Module):
    """Softmax-free mixing of values on a grid of tokens, head by head; the part of SOFT between the projections.

    Args:
        head_dim: channels per head d; the landmark convolution is shared by the heads.
        num_heads: heads h.
        ratio: side r of the patches that become landmarks, in tokens; 1 stands for the dense kernel without landmarks,
            K(Q', Q') V (heed's reading; the authors' code stops there).
        conv_size: odd side k of the depthwise convolution of the values, one kernel per head; 0 for none.
        iterations: Newton steps.
        normalised: SOFT++.
        per_sample: see `normalised_newton_inverse`.
        inverse: "newton", or "exact" for torch.linalg.inv of the matrix that Newton's iteration is given, a reference
            that fails where SOFT++'s landmarks coincide.
        num_landmarks: a square number that fixes M: queries are averaged over sqrt(M) * r cells per side before the
            landmark convolution, which does nothing where the grid has that size. None lets M grow with the grid.

    Raises:
        ValueError: settings outside these ranges.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        ratio: int = 2,
        conv_size: int = 0,
        *,
        iterations: int = 20,
        normalised: bool = False,
        per_sample: bool = False,
        inverse: str = "newton",
        num_landmarks: int | None = None,
    ) -> None:
        super().__init__()
        if ratio < 1:
            raise ValueError(f"ratio={ratio} must be at least 1; it is the side of a landmark's patch in tokens")
        if conv_size and (conv_size < 0 or conv_size % 2 == 0):
            raise ValueError(f"conv_size={conv_size} must be odd, so that a kernel has a middle, or 0 for none")
        if inverse not in ("newton", "exact"):
            raise ValueError(unknown("inverse", inverse, ("newton", "exact")))
        side = round((num_landmarks or 0) ** 0.5)
        if num_landmarks is not None and (num_landmarks < 1 or side**2 != num_landmarks):
            raise ValueError(f"num_landmarks={num_landmarks} must be a square number such as 49, for a square grid")
        if num_landmarks is not None and ratio == 1:
            raise ValueError(f"num_landmarks={num_landmarks} does not go with ratio=1, the dense kernel")
        self.label = type(self).__name__  # what errors call this layer; a model puts its place here
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.ratio = ratio
        self.iterations = _check_iterations(iterations)
        self.normalised = normalised
        self.per_sample = per_sample
        self.exact = inverse == "exact"
        self.side = side
        if ratio > 1:
            self.landmark_conv = nn.Conv2d(head_dim, head_dim, ratio, ratio, bias=False)
            self.landmark_norm = nn.LayerNorm(head_dim)
        self.conv: nn.Conv2d | None = None
        if conv_size:
            self.conv = nn.Conv2d(num_heads, num_heads, conv_size, padding=conv_size // 2, groups=num_heads, bias=False)

    def forward(
        self, q: Float[Tensor, "B h N d"], v: Float[Tensor, "B h N d"], height: int, width: int
    ) -> Float[Tensor, "B h N d"]:
        """Mix values.

        Args:
            q, v: (B, h, N, d) queries, which are the keys too, and values; row-major tokens of a grid.
            height, width: of the grid, N = height * width.

        Raises:
            ValueError: a grid that does not hold N tokens or is smaller than ratio, or queries that are not finite.
        """
        mixed = self.mix(q, v, height, width).to(v.dtype)
        if self.conv is None:
            return mixed
        maps = v.transpose(1, 2).reshape(v.shape[0], height, width, -1).permute(0, 3, 1, 2)
        kernels = self.conv.weight.repeat_interleave(self.head_dim, 0)  # a head's channels share theirs
        local = F.conv2d(maps, kernels, padding=self.conv.padding, groups=len(kernels))  # type: ignore[arg-type]
        return mixed + local.permute(0, 2, 3, 1).reshape(v.transpose(1, 2).shape).transpose(1, 2)

    def mix(
        self, q: Float[Tensor, "B h N d"], v: Float[Tensor, "B h N d"], height: int, width: int
    ) -> Float[Tensor, "B h N d"]:
        """`forward` without the convolution of the values, in float32 or better."""
        v = v.to(at_least_float32(v))
        if self.ratio == 1:
            with no_autocast(q):
                q = self._scaled(q, height, width)
                kernel = gaussian_kernel(q, q)
                return (_normalise(kernel, kernel) if self.normalised else kernel) @ v
        low_rank = self.low_rank(q, height, width)
        with no_autocast(q):
            return low_rank.mix(v, self.normalised)

    def low_rank(self, q: Float[Tensor, "B h N d"], height: int, width: int) -> Landmarks:
        """Landmarks, kernels and the inverse, in float32 or better: half precision would underflow in the
        exponential, and Newton's iteration would amplify its rounding."""
        if self.ratio == 1:
            raise ValueError("ratio=1 is the dense kernel; it has no landmarks")
        if self.ratio > min(height, width) and not self.side:
            raise ValueError(
                f"a grid of {height} x {width} tokens holds no patch of ratio={self.ratio}; give a larger grid or "
                "set num_landmarks"
            )
        q = self._scaled(q, height, width)
        maps = q.reshape(-1, height * width, self.head_dim).transpose(1, 2).unflatten(2, (height, width))
        if self.side:
            maps = F.adaptive_avg_pool2d(maps, self.side * self.ratio)
        landmarks = self.landmark_conv(maps.to(self.landmark_conv.weight.dtype)).flatten(2).transpose(1, 2)
        landmarks = F.gelu(self.landmark_norm(landmarks)).unflatten(0, q.shape[:2]).to(q.dtype)
        with no_autocast(q):
            return Landmarks.between(q, landmarks, self._invert)

    def _scaled(self, q: Tensor, height: int, width: int) -> Tensor:
        """Q' in float32 or better, checked."""
        if q.shape[2] != height * width:
            raise ValueError(f"{q.shape[2]} tokens do not fill a grid of height={height}, width={width}")
        # A look at the values, for which neither a compiled graph nor a tensor without data has a place.
        if not (torch.compiler.is_compiling() or q.is_meta) and not q.isfinite().all():
            raise ValueError(f"{self.label}: the queries are not finite; check the layer's input and weights")
        return q.to(at_least_float32(q)) / self.head_dim**0.25

    def _invert(self, kernel: Tensor) -> Tensor:
        if self.exact:
            ridge = 0.0 if self.normalised else _RIDGE
            return torch.linalg.inv(
                kernel + ridge * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
            )
        if self.normalised:
            return normalised_newton_inverse(kernel, self.iterations, per_sample=self.per_sample)
        return newton_inverse(kernel, self.iterations)

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, iterations={self.iterations}, normalised={self.normalised}"


@provides("64-soft")
class SoftAttention(nn.Module):
    """Softmax-free self-attention on a grid of tokens: projections to queries and values, `SoftKernel`, projection back.

    There is no causal form, and no place for a class token, which the landmark convolution could not see: keep it
    outside.

    Args:
        dim: channels C.
        num_heads: heads; must divide dim.
        ratio, conv_size, options: as in `SoftKernel`.
    """

    def __init__(self, dim: int, num_heads: int, ratio: int = 2, conv_size: int = 0, **options: Any) -> None:
        super().__init__()
        self.dim = dim
        self.head_dim = check_heads(dim, num_heads)
        self.q = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.kernel = SoftKernel(self.head_dim, num_heads, ratio, conv_size, **options)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "B *N C"], height: int | None = None, width: int | None = None
    ) -> Float[Tensor, "B *N C"]:
        """Mix tokens.

        Args:
            x: (B, H, W, C), or (B, N, C) with the tokens in row-major order.
            height, width: H and W of the grid, for (B, N, C) only; N = H * W.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"SoftAttention has dim={self.dim}, the input has {x.shape[-1]} channels")
        if x.ndim == 4:
            height, width = x.shape[1:3]
        if x.ndim not in (3, 4) or height is None or width is None:
            raise ValueError(
                f"input {tuple(x.shape)} with height={height}, width={width}: give (B, H, W, C), or (B, N, C) with both"
            )
        q, v = (
            project(x).reshape(x.shape[0], -1, self.kernel.num_heads, self.head_dim).transpose(1, 2)
            for project in (self.q, self.v)
        )
        return self.proj(self.kernel(q, v, height, width).transpose(1, 2).reshape(x.shape))


# The authors' names of the parts of an attention layer, and ours.
_RENAMES = (
    (r"(^|\.)W_q\.", r"\1q."),
    (r"(^|\.)W_v\.", r"\1v."),
    (r"(^|\.)ff\.", r"\1proj."),
    (r"(^|\.)attn\.", r"\1kernel."),
    (r"(^|\.)Qlandmark_op\.", r"\1landmark_conv."),
    (r"(^|\.)Qnorm_act\.0\.", r"\1landmark_norm."),
)


def authors_key(key: str) -> str:
    """The name in `SoftAttention` or `SoftKernel` of an entry in the authors' checkpoints."""
    for theirs, ours in _RENAMES:
        key = re.sub(theirs, ours, key)
    return key


def _check_iterations(iterations: int) -> int:
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be at least 1; the authors take 20 Newton steps")
    return iterations


def _normalise(matrix: Tensor, kernel: Tensor) -> Tensor:
    """D^-1/2 matrix D^-1/2 with the row sums D of the kernel."""
    root = kernel.sum(-1, keepdim=True).rsqrt()
    return root * matrix * root.transpose(-1, -2)


@layers.register("soft")
def _soft(dim: int, num_heads: int, grid: tuple[int, int], **options: Any) -> nn.Module:
    # The authors' sides: 7 x 7 landmarks, and a convolution one token wider than a landmark's patch.
    ratio = options.setdefault("ratio", max(2, round(min(grid) / 7)) if min(grid) > 1 else 1)
    options.setdefault("conv_size", (ratio + 1) | 1)
    return SoftAttention(dim, num_heads, **options)
