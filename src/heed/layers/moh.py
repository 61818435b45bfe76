"""Mixture-of-Head attention (card 27): every token uses a few shared heads always and the top-k of the others.

    y = sum_i g_i H_i W_O^i                  H_i (B, N, d) output of head i, g (B, N, heads) gates, shared heads first
    p = softmax(x W_g)                       (B, N, E)   E = heads - shared candidates
    r = routed * p * top-k(p) / sum          (B, N, E)   routed heads per token keep a weight, the others get 0
    s = shared * softmax(x W_1)              (B, N, shared), 1 for a single shared head
    b = 2 softmax(x W_0)                     (B, N, 2), only with both kinds of heads
    g = [b_0 s, b_1 r]                       the gates of a token sum to b_0 shared + b_1 routed
    l = E^2 mean_e(mean_tokens(p) mean_tokens(top-k(p)))       load balance, weighted 0.01 in the loss

Jin, Zhu, Yuan, Yan, "MoH: Multi-Head Attention as Mixture-of-Head Attention", ICML 2025, arXiv 2410.11842. The router
is a submodule called `router`; the authors keep its layers beside qkv and proj, `authors_router_key` maps the names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Full
from heed.layers.attention import check_heads
from heed.layers.registry import layers
from heed.layers.routed_heads import attend_routed, gathering_pays

ROUTER_LAYERS = ("wg", "wg_0", "wg_1")


class Routing(NamedTuple):
    """What a router decided for the tokens of a batch.

    gates: (B, N, heads) weight of every head, shared heads first; exactly 0 where a head is not used.
    probs: (B, N, E) softmax over the candidates; None without routed heads.
    mask: (B, N, E) bool, the candidates a token uses; None without routed heads.
    balance: (B, N, 2) weights of the shared and the routed heads, their sum 2; None where only one kind exists.
    """

    gates: Tensor
    probs: Tensor | None = None
    mask: Tensor | None = None
    balance: Tensor | None = None


def check_split(heads: int, shared: int, routed: int) -> None:
    """ValueError unless `shared` heads and `routed` of the remaining ones can be used."""
    if shared < 0 or routed < 0 or shared + routed > heads or shared + routed == 0:
        raise ValueError(
            f"shared={shared} and routed={routed} of heads={heads}: both must be >= 0 and their sum in [1, {heads}]; "
            f"{heads - shared} heads are left to route"
        )


class Router(nn.Module):
    """Base of what chooses heads: `active_heads` and `collect_balance` find it by this class. Forward gives `Routing`.

    Args:
        heads: all heads.
        shared: the first heads, which every token uses.
        routed: how many of the others a token uses.

    Raises:
        ValueError: numbers that do not fit the heads.
    """

    def __init__(self, heads: int, shared: int, routed: int) -> None:
        super().__init__()
        check_split(heads, shared, routed)
        self.heads, self.shared, self.routed = heads, shared, routed

    @property
    def active(self) -> int:
        """Heads that a token uses."""
        return self.shared + self.routed

    def extra_repr(self) -> str:
        return f"heads={self.heads}, shared={self.shared}, routed={self.routed}"


@provides("27-moh")
class MoHRouter(Router):
    """Gates of the heads from the tokens, (B, N, C) -> `Routing`; it knows nothing of the attention kernel.

    Parameters are `wg` (with routed heads), `wg_0` (with both kinds) and `wg_1` (with two or more shared heads), linear
    layers without bias. shared = heads, routed = 0 weighs all heads; shared = 0 only routes.

    Args:
        dim: channels C.
        heads, shared, routed: as in `Router`.

    Raises:
        ValueError: numbers that do not fit, or heads that no token could use.
    """

    def __init__(self, dim: int, heads: int, shared: int, routed: int) -> None:
        super().__init__(heads, shared, routed)
        if not routed and shared < heads:
            raise ValueError(
                f"shared={shared} and routed={routed} of heads={heads} leave {heads - shared} heads unused"
            )
        if routed:
            self.wg = nn.Linear(dim, heads - shared, bias=False)
        if routed and shared:
            self.wg_0 = nn.Linear(dim, 2, bias=False)
        if shared > 1:
            self.wg_1 = nn.Linear(dim, shared, bias=False)

    def forward(self, x: Float[Tensor, "B N C"]) -> Routing:
        equal = x.new_ones(*x.shape[:-1], self.shared)
        always = self.wg_1(x).softmax(-1) * self.shared if self.shared > 1 else equal
        if not self.routed:
            return Routing(always)
        probs = self.wg(x).softmax(-1)
        mask = top_mask(probs, self.routed)
        kept = probs * mask
        chosen = kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).eps) * self.routed
        if not self.shared:
            return Routing(chosen, probs, mask)
        balance = 2 * self.wg_0(x).softmax(-1)
        gates = torch.cat([balance[..., :1] * always, balance[..., 1:] * chosen], -1)
        return Routing(gates, probs, mask, balance)


def top_mask(scores: Float[Tensor, "... E"], k: int) -> Bool[Tensor, "... E"]:
    """True at the k largest entries of the last axis: always exactly k, also under ties."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k, -1).indices, True)


def gated_heads(out: Float[Tensor, "B N h d"], gates: Float[Tensor, "B N h"]) -> Float[Tensor, "B N h d"]:
    """Any attention's output per head, weighted by the gates; goes before the output projection."""
    return out * gates.unsqueeze(-1).to(out.dtype)


def attend_gated(
    q: Float[Tensor, "B h N d"],
    k: Float[Tensor, "B h N d"],
    v: Float[Tensor, "B h N d"],
    routing: Routing,
    active: int,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    gather: bool | None = None,
) -> Float[Tensor, "B N h d"]:
    """Dense attention with gated heads.

    Args:
        q, k, v: (B, heads, N, head_dim) queries, keys, values.
        routing: the router's.
        active: heads that a token uses.
        scale: factor on q k^T, default head_dim ** -0.5.
        dropout: probability of dropping a weight.
        gather: True computes the chosen (token, head) pairs only, False all heads, None what is expected to be quicker.
    """
    if gather is None:
        gather = gathering_pays(q.shape[2], q.shape[1], active, q.device)
    if gather and routing.mask is not None:
        return attend_routed(q, k, v, routing.gates, routing.mask, scale=scale, dropout=dropout)
    return gated_heads(attend(q, k, v, Full(), scale=scale, dropout=dropout).transpose(1, 2), routing.gates)


@provides("27-moh")
def load_balance(routing: Routing, padding: Bool[Tensor, "B N"] | None = None) -> Float[Tensor, ""]:
    """The load-balance term l of one layer: `routed` at a uniform router, larger where few heads get all tokens.

    Args:
        routing: of a router with routed heads.
        padding: (B, N) bool, True where a token is padding and does not count (the authors count all).

    Raises:
        ValueError: a routing without routed heads.
    """
    if routing.probs is None or routing.mask is None:
        raise ValueError("load_balance needs routed heads; this routing has shared heads only")
    probs, mask = routing.probs.flatten(0, -2), routing.mask.flatten(0, -2).to(routing.probs.dtype)
    if padding is None:
        mean, share = probs.mean(0), mask.mean(0)
    else:
        weight = (~padding).flatten().to(probs.dtype)
        weight = weight / weight.sum().clamp(min=1)
        mean, share = weight @ probs, weight @ mask
    return (mean * share).mean() * probs.shape[-1] ** 2


@provides("27-moh")
class MoHAttention(nn.Module):
    """Self-attention over all tokens with a router over its heads, (B, ..., C) -> (B, ..., C).

    Where enough is left out (`gathering_pays`), only the chosen (token, head) pairs are computed. On CPUs with half of
    the heads active that is from about 520 tokens on, with three quarters from 1,040; projections, keys and values are
    as in multi-head attention at any rate.

    Args:
        dim: channels C.
        num_heads: heads; must divide dim unless head_dim is given.
        shared, routed: as in `Router`.
        head_dim: width of a head, default dim / num_heads.
        qkv_bias: whether the q, k, v projection has a bias.
        qk_norm: LayerNorm over every head's query and key.
        qk_scale: factor on q k^T, default head_dim ** -0.5.
        attn_drop: dropout on the weights while training.
        proj_drop: dropout on the output while training.
        gather: True computes the chosen pairs only, False all heads, None what is expected to be quicker.

    Raises:
        ValueError: heads that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shared: int,
        routed: int,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        gather: bool | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.head_dim = check_heads(dim, num_heads) if head_dim is None else head_dim
        self.scale = qk_scale or self.head_dim**-0.5
        self.attn_drop, self.gather = attn_drop, gather
        self.qkv = nn.Linear(dim, 3 * num_heads * self.head_dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.router = MoHRouter(dim, num_heads, shared, routed)
        self.proj = nn.Linear(num_heads * self.head_dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Float[Tensor, "B ... C"]) -> Float[Tensor, "B ... C"]:
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"MoHAttention has dim={self.dim}, the input has {x.shape[-1]} channels; channels come last"
            )
        tokens = x.flatten(1, -2)
        routing = self.router(tokens)
        y = attend_gated(
            *self.project(tokens),
            routing,
            self.router.active,
            scale=self.scale,
            dropout=self.attn_drop if self.training else 0.0,
            gather=self.gather,
        )
        return self.proj_drop(self.proj(y.flatten(2))).view(x.shape)

    def project(self, x: Float[Tensor, "B N C"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, heads, N, head_dim) each."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v  # norms leave autocast's half precision


class ActiveHeads(NamedTuple):
    """How many of a layer's heads a token uses."""

    active: int
    heads: int

    @property
    def share(self) -> float:
        return self.active / self.heads


@provides("27-moh")
def active_heads(model: nn.Module) -> dict[str, ActiveHeads]:
    """The used heads of every layer with a router, by the layer's name."""
    return {name: ActiveHeads(router.active, router.heads) for name, router in _routers(model)}


@dataclass
class Balance:
    """The routings of the layers that ran inside `collect_balance`, in order, with the layers' names."""

    routings: list[tuple[str, Routing]] = field(default_factory=list)

    def loss(self, padding: Bool[Tensor, "B N"] | None = None) -> Float[Tensor, ""]:
        """The mean of `load_balance` over the collected routings; training adds 0.01 times it.

        Raises:
            ValueError: nothing was collected.
        """
        if not self.routings:
            raise ValueError("no routing was collected: run the model, with routed heads, inside collect_balance")
        return torch.stack([load_balance(routing, padding) for _, routing in self.routings]).mean()

    def usage(self) -> dict[str, Float[Tensor, " E"]]:
        """Per layer the share of tokens that use each routed head; over several runs their mean."""
        shares: dict[str, list[Tensor]] = {}
        for name, routing in self.routings:
            if routing.mask is not None:
                shares.setdefault(name, []).append(routing.mask.flatten(0, -2).float().mean(0))
        return {name: torch.stack(values).mean(0) for name, values in shares.items()}


@provides("27-moh")
@contextmanager
def collect_balance(model: nn.Module) -> Iterator[Balance]:
    """Collects what the routers of `model` decide, for the loss; nothing stays in the model, its layers or globals.

        with collect_balance(model) as balance:
            loss = criterion(model(x), y) + 0.01 * balance.loss()

    A layer that runs several times counts every time; layers without routed heads do not count.
    """
    balance = Balance()

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, routing: balance.routings.append((name, routing))

    hooks = [router.register_forward_hook(keep(name)) for name, router in _routers(model) if router.routed]
    try:
        yield balance
    finally:
        for hook in hooks:
            hook.remove()


def _routers(model: nn.Module) -> list[tuple[str, Router]]:
    """Routers, with the names of the layers that own them as `router`."""
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, Router))
    return [(name.removesuffix("router").removesuffix("."), router) for name, router in named]


@layers.register("moh")
def _moh(dim: int, num_heads: int, grid: tuple[int, int], **options: object) -> nn.Module:
    # About three quarters of the heads, half of them routed: with one routed head its gate is constant and nothing but
    # the load-balance loss would teach the router.
    active = round(0.75 * num_heads)
    routed = max(2, active // 2) if num_heads > 2 else 0
    options.setdefault("routed", routed)
    options.setdefault("shared", active - routed if routed else num_heads)
    return MoHAttention(dim, num_heads, **options)  # type: ignore[arg-type]


def authors_router_key(key: str) -> str:
    """A key of the authors' checkpoints with heed's place for the router: blocks.0.attn.router.wg.weight."""
    path, _, leaf = key.rpartition(".")
    owner, dot, layer = path.rpartition(".")
    return f"{owner}{dot}router.{layer}.{leaf}" if layer in ROUTER_LAYERS else key
