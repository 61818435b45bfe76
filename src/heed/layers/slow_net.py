"""Slow nets (card 36): small networks of coordinates whose output is a kernel as large as the map it is meant for.

    f_l(c) = sin(w_l c + b_l)                               (h, S, S), c the coordinates of the positions in [-1, 1]
    o = f_0;   o = f_l * Linear_l(o) + p    l = 1 .. n      p (1, 1, S, S) learned
    W = Linear(o)                                           (1, C, S, S)

`ContextSlowNet` makes a small depthwise kernel of the same form that depends on the features x, through g:

    g = GELU(Linear(mean over the batch of Linear(x pooled to k x k)))                         (1, h, k, k)
    o = renormalise(f_l * Linear_l(o) + p) * Linear'_l(g),   renormalise(o) = alpha stopgrad(o) + beta o / ||o||_2

Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", 2024, arXiv 2401.17948, where they
are called multiplicative Gabor networks (MAGNet).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides

OMEGA = 2000.0


def channel_mixer(in_dim: int, dim: int, axes: int = 2) -> nn.Conv1d | nn.Conv2d:
    """The same linear map at every position, (B, in_dim, *S) -> (B, dim, *S): kaiming normal weights, zero bias."""
    mixer = (nn.Conv1d if axes == 1 else nn.Conv2d)(in_dim, dim, 1)
    nn.init.kaiming_normal_(mixer.weight)
    nn.init.zeros_(mixer.bias)  # type: ignore[arg-type]
    return mixer


class SineFilter(nn.Module):
    """sin(w c + b): coordinates (1, axes, *S) -> (1, hidden, *S).

    Args:
        hidden: filters.
        axes: coordinates of a position.
        layer: l; the frequencies' spread falls with it, as Gamma(6 / (l + 1), 1).
        omega: scale of the frequencies, in turns per unit of a coordinate.
    """

    def __init__(self, hidden: int, axes: int, layer: int, omega: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden, axes, *(1,) * axes))
        self.bias = nn.Parameter(torch.zeros(hidden))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        shape = torch.full(self.weight.shape, 6 / (layer + 1), device="cpu")  # there is no Gamma on the meta device
        gamma = torch.distributions.Gamma(shape, torch.ones_like(shape)).sample()
        with torch.no_grad():
            self.weight.mul_(2 * math.pi * omega * gamma.to(self.weight.device))

    def forward(self, coordinates: Float[Tensor, "1 axes *S"]) -> Float[Tensor, "1 hidden *S"]:
        # Not a convolution, which autocast would do in half precision: phases reach 1e5 radians.
        phase = (self.weight * coordinates).sum(1) + self.bias.view(-1, *(1,) * (coordinates.ndim - 2))
        return phase.sin()[None]


@provides("36-hyperzzw")
class SlowNet(nn.Module):
    """A kernel (1, dim, *S) that depends on parameters only (the authors' MAGNet_G, and MAGNet_GC for axes=1, dim=1).

    Args:
        size: positions per axis, S.
        dim: channels of the kernel.
        hidden: filters h.
        layers: products n.
        axes: 2 for kernels of S x S positions, 1 for S positions.
        omega: scale of the initial frequencies. The authors' 2000 makes kernels that look like noise, with phases that
            float32 knows to about 1e-3 radians.

    Raises:
        ValueError: a size, width or number of layers below 1.
    """

    def __init__(
        self, size: int, dim: int, hidden: int, layers: int = 2, *, axes: int = 2, omega: float = OMEGA
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim), ("hidden", hidden), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name}={value} of a slow net must be at least 1")
        self.size, self.dim, self.axes = size, dim, axes
        self.filters = nn.ModuleList(SineFilter(hidden, axes, layer, omega) for layer in range(layers + 1))
        self.linears = nn.ModuleList(channel_mixer(hidden, hidden, axes) for _ in range(layers))
        self.output = channel_mixer(hidden, dim, axes)
        self.bias = nn.Parameter(torch.zeros(1, 1, *(size,) * axes))
        # On the parameters' device by name: transformers can leave torch.linspace outside of `with torch.device(...)`.
        line = torch.linspace(-1, 1, size, device=self.bias.device)
        self.register_buffer("coordinates", torch.stack(torch.meshgrid(*[line] * axes, indexing="ij"))[None], False)
        for linear in self.linears:
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="linear")  # type: ignore[arg-type]
            nn.init.ones_(linear.bias)  # type: ignore[arg-type]
        nn.init.kaiming_uniform_(self.output.weight, nonlinearity="linear")
        with torch.no_grad():  # the authors scale at the first call, and once more after a checkpoint is loaded
            self.output.weight.mul_(size ** (-axes / 2))

    def forward(self) -> Float[Tensor, "1 C *S"]:
        filters = [sine(self.coordinates) for sine in self.filters]
        o = filters[0]
        for sine, linear in zip(filters[1:], self.linears, strict=True):
            o = sine * linear(o) + self.bias
        return self.output(o)

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, axes={self.axes}"


@provides("36-hyperzzw")
class ContextSlowNet(SlowNet):
    """A depthwise kernel (C, 1, *k) from features (B, C, *S) (the authors' MAGNet_L).

    It depends on the mean over the batch: what a sample gets depends on the others beside it.

    Args:
        size: side k of the kernel, odd.
        dim: channels C.
        hidden, layers, axes, omega: as in `SlowNet`.
        learnable: whether alpha and beta are parameters, as the paper says; they are constants in the authors' code.

    Raises:
        ValueError: an even size.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        hidden: int,
        layers: int = 2,
        *,
        axes: int = 2,
        omega: float = OMEGA,
        learnable: bool = False,
    ) -> None:
        if size % 2 == 0:
            raise ValueError(f"size={size}: a local kernel needs an odd size, such as {size + 1}")
        super().__init__(size, dim, hidden, layers, axes=axes, omega=omega)
        self.reduce = channel_mixer(dim, hidden, axes)
        self.context = channel_mixer(hidden, hidden, axes)
        self.context_linears = nn.ModuleList(channel_mixer(hidden, hidden, axes) for _ in range(layers))
        self.alpha = nn.Parameter(torch.tensor(1.0)) if learnable else 1.0
        self.beta = nn.Parameter(torch.tensor(0.1)) if learnable else 0.1

    def forward(self, x: Float[Tensor, "B C *S"]) -> Float[Tensor, "C 1 *k"]:  # type: ignore[override]
        # Pooling and Linear are linear: the mean over the batch may come first, and is then all they work on.
        pooled = (F.adaptive_avg_pool1d if self.axes == 1 else F.adaptive_avg_pool2d)(
            x.mean(0, keepdim=True), self.size
        )
        g = F.gelu(self.context(self.reduce(pooled)))
        filters = [sine(self.coordinates) for sine in self.filters]
        o = filters[0]
        for sine, linear, context in zip(filters[1:], self.linears, self.context_linears, strict=True):
            o = self.renormalise(sine * linear(o) + self.bias) * context(g)
        return self.output(o).transpose(0, 1)

    def renormalise(self, o: Float[Tensor, "1 h *k"]) -> Float[Tensor, "1 h *k"]:
        """alpha stopgrad(o) + beta o / ||o||_2, the norm over the positions of a channel."""
        unit = F.normalize(o.flatten(2), dim=2, eps=1e-12).view_as(o)
        return self.alpha * o.detach() + self.beta * unit

    def context_parameters(self) -> list[nn.Parameter]:
        """Those that read the features: the fast part of this slow net."""
        return [p for part in (self.reduce, self.context, self.context_linears) for p in part.parameters()]
