"""Grouped-query attention whose groups need not be equal (card 46): key norms say how many queries a key-value head serves.

    q = x W_q (B, H, N, d);   k, v = x W_k, x W_v (B, G, N, d)
    y_h = softmax(q_h k_g^T / sqrt(d)) v_g,   the first a_0 heads h have g = 0, the next a_1 have g = 1, ...   sum a = H
    out = concat(y) W_proj                                  (B, N, C)

    GQA      a = H / G
    KDGQA    a from the norms of k, at every forward pass
    DGQA     a from norms now and remembered, every `window` training steps, and at every forward pass in eval mode
    PGQA     a = H / G;  y_h - (U_h std(y_h) + mean(y_h)),  U uniform noise (N d,), standardised

`heed.layers.allocation` has the rules for a. A group with a_g = 0 leaves its keys and values unused. Weights of
multi-head attention become grouped ones by averaging the k and v of contiguous heads.

Khan et al., "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention", 2024 (arXiv 2408.08454). The paper
speaks of Gaussian noise on attention maps in PGQA; the authors' code, followed here, takes uniform noise on outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Full
from heed.errors import unknown
from heed.layers.allocation import check_kind, evolving_allocation, key_driven_allocation, key_norms, uniform_allocation
from heed.layers.attention import check_heads
from heed.layers.registry import layers

_POOLS = ("mean", "first")


def check_groups(num_heads: int, num_kv_heads: int) -> None:
    """Raise ValueError unless 1 <= num_kv_heads <= num_heads."""
    if not isinstance(num_kv_heads, int) or not 1 <= num_kv_heads <= num_heads:
        raise ValueError(f"num_kv_heads={num_kv_heads} must be an integer from 1 to num_heads={num_heads}")


@provides("46-kdgqa")
class GQA(nn.Module):
    """Grouped-query attention with equal groups, (B, N, C) -> (B, N, C), and what the other schemes share.

    Takes (B, *layout, C), such as (B, H, W, C), too. In timm's blocks it stands in for their attention.

    Args:
        dim: channels C.
        num_heads: query heads H; must divide dim.
        num_kv_heads: key-value heads G, 1 to H; must divide H here and in `PGQA`.
        qkv_bias: whether the projections to q, k and v have biases.
        attn_drop: dropout on the weights while training.
        proj_drop: dropout on the output while training.

    Raises:
        ValueError: heads that do not fit, or an input with another number of channels.
    """

    uneven: ClassVar[bool] = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_dim = check_heads(dim, num_heads)
        check_groups(num_heads, num_kv_heads)
        if num_heads % num_kv_heads and not self.uneven:
            raise ValueError(
                f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}, and {type(self).__name__} has "
                "equal groups; KDGQA and DGQA allow uneven ones"
            )
        self.dim = dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.scale = self.head_dim**-0.5
        self.attn_drop = attn_drop
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def allocation(self) -> Int[Tensor, " G"]:
        """Query heads per key-value head, as they are now."""
        return uniform_allocation(self.num_heads, self.num_kv_heads)

    def kv_cache_bytes(self, tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """Memory for the keys and values of `batch` sequences of `tokens` tokens: G / H of multi-head attention's."""
        return 2 * batch * tokens * self.num_kv_heads * self.head_dim * dtype.itemsize

    def forward(
        self, x: Float[Tensor, "B ... C"], attn_mask: None = None, is_causal: bool = False
    ) -> Float[Tensor, "B ... C"]:
        """Mix tokens; `attn_mask` and `is_causal` are what timm's blocks pass, and must be None and False."""
        q, k, v = self._project(x, attn_mask, is_causal)
        return self._output(self._attend(q, k, v), x)

    def _project(self, x: Tensor, attn_mask: None, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"{type(self).__name__} has dim={self.dim}, the input has {x.shape[-1]} channels; channels come last"
            )
        if attn_mask is not None or is_causal:
            raise ValueError(f"{type(self).__name__} takes no mask; leave attn_mask=None and is_causal=False")
        tokens = math.prod(x.shape[1:-1])
        q, k, v = (
            part(x).view(x.shape[0], tokens, -1, self.head_dim).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.attn_drop if self.training else 0.0
        return cast(Tensor, attend(q, k, v, Full(), scale=self.scale, dropout=dropout))

    def _output(self, y: Tensor, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(x.shape)))

    @classmethod
    def from_attention(cls, attention: nn.Module, num_kv_heads: int, *, pool: str = "mean", **options: Any) -> Self:
        """Turn trained multi-head attention into this: q and proj are copied, k and v pooled.

        Args:
            attention: has num_heads and the linear layers qkv and proj, as timm's and heed's have.
            num_kv_heads: G; must divide num_heads, whatever the scheme.
            pool: see `pool_heads`.
            options: further settings of the class.

        Raises:
            ValueError: attention with parts that this has none of, such as norms of q and k, or G does not fit.
        """
        heads, proj = cast(int, attention.num_heads), cast(nn.Linear, attention.proj)
        weights = grouped_weights(attention.state_dict(), heads, num_kv_heads, pool)
        for drop in ("attn_drop", "proj_drop"):
            own = getattr(attention, drop, 0.0)
            options.setdefault(drop, own.p if isinstance(own, nn.Dropout) else own)
        layer = cls(proj.out_features, heads, num_kv_heads, qkv_bias="q.bias" in weights, **options)
        layer.load_state_dict(layer.state_dict() | weights)
        return layer.to(proj.weight.device, proj.weight.dtype).train(attention.training)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"


class _Uneven(GQA):
    """Groups of any size: `split` (G,) has the sizes. It is saved, and what a checkpoint without it leaves is uniform."""

    uneven = True
    split: Tensor

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, num_kv_heads, **options)
        self.frozen = False
        self.register_buffer("split", uniform_allocation(num_heads, num_kv_heads).to(self.q.weight.device))

    @property
    def allocation(self) -> Int[Tensor, " G"]:
        return self.split.clone()

    def freeze_allocation(self, allocation: Sequence[int] | Int[Tensor, " G"] | None = None) -> None:
        """Keep the allocation from now on, so that a result no longer depends on the batch and on what came before.

        Args:
            allocation: query heads per key-value head; None for that of the last forward pass.
        """
        if allocation is not None:
            counts = [int(count) for count in allocation]
            if len(counts) != self.num_kv_heads or min(counts) < 0 or sum(counts) != self.num_heads:
                raise ValueError(
                    f"allocation={counts} must be {self.num_kv_heads} counts from 0 that sum to {self.num_heads} heads"
                )
            self.split.copy_(torch.tensor(counts))
        self.frozen = True

    def unfreeze_allocation(self) -> None:
        """Let the keys choose again."""
        self.frozen = False

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(self.split, 1, output_size=self.num_heads) for x in (k, v))
        return super()._attend(q, k, v)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}k.weight" in state_dict and f"{prefix}split" not in state_dict:
            state_dict[f"{prefix}split"] = uniform_allocation(self.num_heads, self.num_kv_heads)
        super()._load_from_state_dict(state_dict, prefix, *rest)


@provides("46-kdgqa")
class KDGQA(_Uneven):
    """Key-driven groups: allocated anew from the key norms at every forward pass, over the whole batch.

    A result depends on the other samples of its batch therefore, unless the allocation is frozen. With two key-value
    heads the rule always gives one of them everything; see `heed.layers.allocation`.

    Args:
        dim, num_heads, num_kv_heads, qkv_bias, attn_drop, proj_drop: as in `GQA`; G need not divide H.

    Raises:
        ValueError: as in `GQA`, and keys that are not finite.
    """

    def forward(
        self, x: Float[Tensor, "B ... C"], attn_mask: None = None, is_causal: bool = False
    ) -> Float[Tensor, "B ... C"]:
        q, k, v = self._project(x, attn_mask, is_causal)
        if not self.frozen:
            self.split.copy_(key_driven_allocation(key_norms(k), self.num_heads))
        return self._output(self._attend(q, k, v), x)


@provides("46-kdgqa")
class DGQA(_Uneven):
    """Groups that follow how the key norms evolve in training.

    Every `window` training steps a new split is made from the norms now and those remembered, c, and then
    c = (c + n) / window; other steps keep the split. In eval mode every forward pass makes a new split and sets c = n,
    so results depend on the order of batches, unless the allocation is frozen. All that is as in the authors' code.

    Steps are counted here from 0 and per forward pass; `start_epoch` begins anew, as the authors do every epoch.

    Args:
        dim, num_heads, num_kv_heads, qkv_bias, attn_drop, proj_drop: as in `GQA`; G need not divide H.
        kind: "diff" or "ema", see `evolving_allocation`.
        window: training steps from one split to the next, at least 1.
        generator: of the CPU, makes the random corrections repeatable.

    Raises:
        ValueError: as in `GQA`, an unknown kind, window < 1, and keys that are not finite.
    """

    cache: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        kind: str = "diff",
        window: int = 1,
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads, **options)
        check_kind(kind)
        if window < 1:
            raise ValueError(f"window={window} must be at least 1 training step")
        self.kind = kind
        self.window = window
        self.generator = generator
        self.steps = 0
        self.register_buffer("cache", torch.zeros(num_kv_heads))

    def start_epoch(self) -> None:
        """The next training step is step 0."""
        self.steps = 0

    def forward(
        self,
        x: Float[Tensor, "B ... C"],
        attn_mask: None = None,
        is_causal: bool = False,
        *,
        step: int | None = None,
        draws: Iterable[int] | None = None,
    ) -> Float[Tensor, "B ... C"]:
        """Mix tokens.

        Args:
            x: (B, *layout, C).
            attn_mask, is_causal: as in `GQA`.
            step: of the training, in the place of the layer's own count.
            draws: random heads for the corrections, see `evolving_allocation`.
        """
        q, k, v = self._project(x, attn_mask, is_causal)
        self._evolve(k, step, draws)
        return self._output(self._attend(q, k, v), x)

    @torch.compiler.disable()  # counts and draws on the CPU
    def _evolve(self, k: Tensor, step: int | None, draws: Iterable[int] | None) -> None:
        due = True
        if self.training:
            step = self.steps if step is None else step
            self.steps = step + 1
            due = step % self.window == 0
        if not due or self.frozen or k.is_meta:
            return
        norms = key_norms(k).to(self.cache)
        split = evolving_allocation(norms, self.cache, self.num_heads, self.kind, draws=draws, generator=self.generator)
        self.split.copy_(split)
        self.cache.copy_((self.cache + norms) / self.window if self.training else norms)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind!r}, window={self.window}"


@provides("46-kdgqa")
class PGQA(GQA):
    """Equal groups whose outputs lose noise of their own mean and deviation, while training and in eval mode alike.

    Every head's output then has mean 0 over tokens and channels, and results are random; the noise is shared by the batch.

    Args:
        dim, num_heads, num_kv_heads, qkv_bias, attn_drop, proj_drop: as in `GQA`.
        generator: makes the noise repeatable; on the device of the input.
    """

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, *, generator: torch.Generator | None = None, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads, **options)
        self.generator = generator

    def forward(
        self,
        x: Float[Tensor, "B ... C"],
        attn_mask: None = None,
        is_causal: bool = False,
        *,
        noise: Float[Tensor, "G g Nd"] | None = None,
    ) -> Float[Tensor, "B ... C"]:
        """Mix tokens.

        Args:
            x: (B, *layout, C).
            attn_mask, is_causal: as in `GQA`.
            noise: (G, H / G, N d) numbers from [0, 1) in the place of random ones.
        """
        q, k, v = self._project(x, attn_mask, is_causal)
        return self._output(self.perturbed(self._attend(q, k, v), noise), x)

    def perturbed(
        self, y: Float[Tensor, "B H N d"], noise: Float[Tensor, "G g Nd"] | None = None
    ) -> Float[Tensor, "B H N d"]:
        """The outputs of the heads less the noise; gradients flow through their means and deviations."""
        groups, each, size = self.num_kv_heads, self.num_heads // self.num_kv_heads, y.shape[2] * y.shape[3]
        precision = torch.promote_types(y.dtype, torch.float32)
        if noise is None:
            noise = torch.rand(groups, each, size, generator=self.generator, device=y.device, dtype=precision)
        elif noise.shape != (groups, each, size):
            raise ValueError(f"noise {tuple(noise.shape)} must be {(groups, each, size)}, one row per head")
        # The authors set the "diagonal" of each group's matrix to 0.
        noise = noise * (1 - torch.eye(each, size, device=y.device, dtype=precision))
        deviation, mean = torch.std_mean(noise, -1, keepdim=True)
        noise = ((noise - mean) / torch.where(deviation == 0, 1, deviation)).flatten(0, 1)
        rows = y.flatten(2).to(precision)
        deviation, mean = torch.std_mean(rows, -1, keepdim=True)
        return (rows - (noise * deviation + mean)).to(y.dtype).view_as(y)


@provides("46-kdgqa")
def grouped_layers(model: nn.Module) -> dict[str, GQA]:
    """The grouped attention layers in a model, by name and in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GQA)}


# -- schemes by name

_CLASSES: dict[str, tuple[type[GQA], dict[str, Any]]] = {
    "gqa": (GQA, {}),
    "kdgqa": (KDGQA, {}),
    "dgqa_diff": (DGQA, {"kind": "diff"}),
    "dgqa_ema": (DGQA, {"kind": "ema"}),
    "pgqa": (PGQA, {}),
}
SCHEMES = tuple(_CLASSES)


@provides("46-kdgqa")
def grouped_scheme(scheme: str, window: int = 1) -> tuple[type[GQA], dict[str, Any]]:
    """The class of a scheme, and the settings that make it that scheme.

    Args:
        scheme: "gqa", "kdgqa", "dgqa_diff", "dgqa_ema" or "pgqa".
        window: of DGQA; the others have none.
    """
    if scheme not in _CLASSES:
        raise ValueError(f"unknown attention scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    kind, options = _CLASSES[scheme]
    return kind, options | ({"window": window} if kind is DGQA else {})


def _register(name: str, layer: type[GQA], **chosen: Any) -> None:
    @layers.register(name)
    def create(dim: int, num_heads: int, grid: tuple[int, int], **options: Any) -> nn.Module:
        # Half the heads, or fewer where that does not divide them.
        half = max(g for g in range(1, max(1, num_heads // 2) + 1) if num_heads % g == 0)
        settings: dict[str, Any] = {"num_kv_heads": half} | chosen | options
        return layer(dim, num_heads, **settings)


for _name, _layer in (("gqa", GQA), ("kdgqa", KDGQA), ("pgqa", PGQA)):
    _register(_name, _layer)
_register("dgqa", DGQA, kind="ema")  # "diff" splits by what changed since the batch before: in evaluation that is noise


# -- from multi-head weights


@provides("46-kdgqa")
def pool_heads(
    weight: Float[Tensor, "Hd ..."], num_heads: int, num_kv_heads: int, pool: str = "mean"
) -> Float[Tensor, "Gd ..."]:
    """Weight or bias of a projection to num_heads key or value heads, made one to num_kv_heads.

    Args:
        weight: (H d, C) or (H d,), rows ordered [head][channel].
        num_heads, num_kv_heads: H and G; G must divide H.
        pool: "mean" averages contiguous groups of H / G heads; "first" keeps the first of each.
    """
    if pool not in _POOLS:
        raise ValueError(unknown("way to pool heads", pool, _POOLS))
    check_groups(num_heads, num_kv_heads)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}: conversion pools equal groups of "
            "heads, also for the schemes that allocate uneven ones afterwards"
        )
    if weight.shape[0] % num_heads:
        raise ValueError(f"weight {tuple(weight.shape)}: its rows do not divide into num_heads={num_heads} heads")
    groups = weight.unflatten(0, (num_kv_heads, num_heads // num_kv_heads, -1))
    return (groups.mean(1) if pool == "mean" else groups[:, 0]).flatten(0, 1)


@provides("46-kdgqa")
def grouped_weights(
    weights: dict[str, Tensor], num_heads: int, num_kv_heads: int, pool: str = "mean"
) -> dict[str, Tensor]:
    """Weights of multi-head attention by timm's names (qkv, proj) as those of the layers here (q, k, v, proj).

    Args:
        weights: qkv.weight (3C, C), and qkv.bias, proj.weight, proj.bias where there are such.
        num_heads, num_kv_heads, pool: as in `pool_heads`.

    Raises:
        ValueError: other keys, such as norms of q and k, which would be lost.
    """
    surplus = sorted(weights.keys() - {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"})
    if surplus:
        raise ValueError(f"grouped attention has no place for {', '.join(surplus)}; give plain multi-head attention")
    grouped = {}
    for name, fused in weights.items():
        module, part = name.split(".")
        if module == "proj":
            grouped[name] = fused
            continue
        q, k, v = fused.chunk(3)
        grouped[f"q.{part}"] = q
        grouped[f"k.{part}"] = pool_heads(k, num_heads, num_kv_heads, pool)
        grouped[f"v.{part}"] = pool_heads(v, num_heads, num_kv_heads, pool)
    return grouped
