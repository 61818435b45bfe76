"""Temperatures of tokens (card 18): factors on queries, values or keys, learned from the token and from its position.

    tau[h, n] = 1 + p(n) + t[h, n]                          a part that is off is left out; the 1 stays
    p(n) = g ln n                                           n = 1, 2, ... tokens that the query sees; g one scalar
        sigmoid   g = sigmoid(alpha)                            the paper
        exp_exp   g = exp(-exp(alpha))                          the authors' code, their beta; larger is less
        linear    g = max(alpha, 0)                             the authors' other file
    t[h, n] = tanh(sum_c a[h, c] GELU(x[h, n, c]))          sharing: x is the projected query, value or key itself
    t[n]    = tanh(w_2 . GELU(W_1 input[n]))                without: one score for all heads

tau is positive, since tanh > -1. Zhang et al., "Selective Attention: Enhancing Transformer through Principled Context
Control", NeurIPS 2024 (arXiv 2411.12892). Only the position part of the query is in the authors' code; the token part and
the value's temperature follow the paper's words. One score per head, and a scalar for the value alone, are heed's choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown

Kind = Literal["sigmoid", "exp_exp", "linear"]
TemperaturePart = Literal["position", "token"]
Which = Literal["query", "value", "key"]

_LINEAR_START = 1e-5
_START = math.exp(-math.exp(2.0))  # g of the authors' beta = 2


GAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "exp_exp": lambda alpha: torch.exp(-torch.exp(alpha)),
    # With the gradient of alpha itself, so that one that went below 0 comes back.
    "linear": lambda alpha: alpha + (alpha.clamp(min=0) - alpha).detach(),
}
_INVERSES: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda g: math.log(g / (1 - g)),
    "exp_exp": lambda g: math.log(-math.log(g)),
    "linear": lambda g: g,
}


@provides("18-selective-ssa")
def alpha_for(gain: float, position: Kind) -> float:
    """The scalar with which a parametrisation has the gain g; so temperatures move from one to another.

    Raises:
        ValueError: an unknown parametrisation, or a gain outside (0, 1); for "linear", below 0.
    """
    if position not in get_args(Kind):
        raise ValueError(unknown("parametrisation of the position", position, get_args(Kind)))
    if not (gain >= 0 if position == "linear" else 0 < gain < 1):
        raise ValueError(
            f"gain={gain} has no {position} form: it must be {'>= 0' if position == 'linear' else 'in (0, 1)'}"
        )
    return _INVERSES[position](gain)


@provides("18-selective-ssa")
@dataclass(frozen=True)
class Selective:
    """Which temperatures there are, and how they are made.

    Args:
        query, value, key: parts of each one's temperature, any of "position" and "token"; () for no temperature.
        position: parametrisation of the gain g: "sigmoid", "exp_exp" or "linear".
        sharing: make token scores from the projected vectors; False gives each temperature a small network on the input of
            the layer.
        hidden: width of that network; default that of the input.
        per_head: whether heads have token scores of their own; False adds them up to one for all (sharing only).
        gain: initial g; default that of the authors' code, 6e-4 (1e-5 for "linear"), which is almost none.
        scratch: initial token scores: False for 0, so that a trained model starts as it was; True for Xavier's.
    """

    query: tuple[TemperaturePart, ...] = ("position", "token")
    value: tuple[TemperaturePart, ...] = ("position", "token")
    key: tuple[TemperaturePart, ...] = ()
    position: Kind = "sigmoid"
    sharing: bool = True
    hidden: int | None = None
    per_head: bool = True
    gain: float | None = None
    scratch: bool = False

    def __post_init__(self) -> None:
        for name in ("query", "value", "key"):
            parts = getattr(self, name)
            if isinstance(parts, str):
                raise ValueError(f"{name}={parts!r} must be a tuple of parts, such as ({parts!r},)")
            for part in parts:
                if part not in get_args(TemperaturePart):
                    raise ValueError(unknown(f"part of the {name}'s temperature", part, get_args(TemperaturePart)))
            object.__setattr__(self, name, tuple(parts))
        if not self.query + self.value + self.key:
            raise ValueError("query, value and key have no temperature; name at least one part of one of them")
        alpha_for(self.start, self.position)
        if self.hidden is not None and (self.hidden < 1 or self.sharing):
            raise ValueError(f"hidden={self.hidden} must be >= 1, and belongs to sharing=False")

    @property
    def start(self) -> float:
        """Initial g."""
        if self.gain is not None:
            return self.gain
        return _LINEAR_START if self.position == "linear" else _START

    def temperature(self, which: Which, heads: int, head_dim: int, dim: int) -> nn.Module | None:
        """The `Temperature` of queries, values or keys with these heads, on inputs of `dim` channels; None without parts."""
        parts = getattr(self, which)
        return Temperature(parts, heads, head_dim, dim, self) if parts else None


@provides("18-selective-ssa")
class Temperature(nn.Module):
    """tau of one layer's queries, values or keys.

    Args:
        parts: "position", "token" or both.
        heads, head_dim: H and d of the vectors it scales.
        dim: channels of the layer's input, for scores without sharing.
        settings: see `Selective`.

    Attributes:
        alpha: () the position's scalar, float32; None without that part.
        score: (H, d), the token's vectors a; None without that part, or without sharing.
        network: W_1 and w_2, without sharing.
    """

    def __init__(
        self, parts: tuple[TemperaturePart, ...], heads: int, head_dim: int, dim: int, settings: Selective
    ) -> None:
        super().__init__()
        self.heads, self.position, self.per_head = heads, settings.position, settings.per_head
        self.alpha = self.score = self.network = None
        if "position" in parts:
            self.alpha = nn.Parameter(torch.tensor(alpha_for(settings.start, settings.position)))
        if "token" in parts and settings.sharing:
            self.score = nn.Parameter(torch.zeros(heads, head_dim))
            if settings.scratch:
                nn.init.xavier_uniform_(self.score)
        elif "token" in parts:
            hidden = settings.hidden or dim
            self.network = nn.Sequential(nn.Linear(dim, hidden, False), nn.GELU(), nn.Linear(hidden, 1, False))
            nn.init.xavier_uniform_(self.network[0].weight)  # type: ignore[arg-type]
            if settings.scratch:
                nn.init.xavier_uniform_(self.network[2].weight)  # type: ignore[arg-type]
            else:
                nn.init.zeros_(self.network[2].weight)  # type: ignore[arg-type]

    @property
    def gain(self) -> Tensor | None:
        """g, without its gradient; None without the position's part."""
        return None if self.alpha is None else GAINS[self.position](self.alpha.detach())

    def forward(
        self,
        x: Float[Tensor, "B H N D"],
        positions: Int[Tensor, "#B N"] | None,
        inputs: Float[Tensor, "B N C"] | None = None,
    ) -> Float[Tensor, "B H N"]:
        """tau (B, H, N), at least in float32.

        Args:
            x: (B, H, N, d) projected vectors, before norms and rotation.
            positions: (B or 1, N) from 1 on; only for the position's part.
            inputs: (B, N, C) inputs of the layer; only for scores without sharing.

        Raises:
            ValueError: positions or inputs are missing.
        """
        exact = torch.promote_types(x.dtype, torch.float32)  # in half precision, ln n of neighbours is the same
        tau = torch.ones(x.shape[0], self.heads, x.shape[2], dtype=exact, device=x.device)
        if self.alpha is not None:
            if positions is None:
                raise ValueError("the position's part of a temperature needs positions (B, N), counted from 1")
            tau = tau + GAINS[self.position](self.alpha.to(exact)) * positions.clamp(min=1).to(exact).log()[:, None]
        if self.score is not None:
            scores = (self.score[:, None].to(exact) * F.gelu(x.to(exact))).sum(-1)
            tau = tau + (scores if self.per_head else scores.sum(1, keepdim=True)).tanh()
        if self.network is not None:
            if inputs is None:
                raise ValueError("a temperature without sharing needs the inputs (B, N, C) of the layer")
            inputs = inputs.to(self.network[0].weight.dtype)  # type: ignore[arg-type]
            tau = tau + self.network(inputs)[..., 0].to(exact).tanh()[:, None]
        return tau

    def extra_repr(self) -> str:
        return f"position={None if self.alpha is None else self.position}, heads={self.heads}"


@provides("18-selective-ssa")
def spikiness(weights: Float[Tensor, "... K"], visible: Int[Tensor, ...] | int | None = None) -> Float[Tensor, ...]:
    """How even attention rows are: sum_j s_j / (L sum_j s_j^2), 1 for even rows, 1 / L for one key alone; lower is spikier.

    Args:
        weights: (..., K), keys that are not seen are 0.
        visible: L, how many keys a row sees, default all K; broadcasts to (...). Times L it is an effective number of keys.
    """
    length = weights.shape[-1] if visible is None else visible
    return weights.sum(-1) / (length * weights.square().sum(-1)).clamp(min=torch.finfo(weights.dtype).tiny)
