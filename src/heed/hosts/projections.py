"""Where a transformers decoder makes its queries, keys and values, and what they are before rotary embedding.

    q = norm_q(x W_q)    k = norm_k(x W_k)    v = x W_v         (B, N, heads * d) as (B, heads, N, d)

    q_proj, k_proj, v_proj      a module each: Llama, Mistral, Qwen, Gemma, OLMo; norms q_norm and k_norm where they are
    c_attn, qkv_proj            one module, [all q | all k | all v]: GPT-2, Phi-3
    query_key_value             one module, [q | k | v] for every head: GPT-NeoX

A rule (`heed.hosts.rules`) sees queries and keys when they are rotated and cached. What comes earlier is seen by torch's
hooks on these modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed.methods import Handle

Part = Literal["query", "key", "value"]
PARTS: tuple[Part, ...] = ("query", "key", "value")


@dataclass(frozen=True, eq=False)
class Projections:
    """The modules of one attention layer that make its queries, keys and values; `find_projections` finds them.

    Args:
        query, key, value: (B, N, C) to (B, N, width); one and the same module where the projection is packed.
        heads: query heads.
        key_heads: key-value heads.
        head_dim: d.
        query_norm, key_norm: norms between projection and rotation, None for none; over d, or over all heads together.
        by_head: whether a packed projection has q, k and v of every head side by side.
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module
    heads: int
    key_heads: int
    head_dim: int
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None
    by_head: bool = False

    @property
    def packed(self) -> bool:
        """Whether one module makes all three."""
        return self.query is self.key

    def module(self, part: Part) -> nn.Module:
        """The module that makes a part."""
        return getattr(self, part)

    def split(self, part: Part, made: Float[Tensor, "B N W"]) -> Float[Tensor, "B H N D"]:
        """One part of what its module made, normed where the host norms it: as attention gets it, but not rotated."""
        heads = self.heads if part == "query" else self.key_heads
        if self.packed and self.by_head:
            made = made.unflatten(-1, (heads, 3, self.head_dim))[..., PARTS.index(part), :].flatten(-2)
        elif self.packed:
            begin = {"query": 0, "key": self.heads, "value": self.heads + self.key_heads}[part]
            made = made[..., begin * self.head_dim : (begin + heads) * self.head_dim]
        norm = {"query": self.query_norm, "key": self.key_norm, "value": None}[part]
        if norm is not None and _width(norm) == made.shape[-1] != self.head_dim:
            made, norm = norm(made), None
        apart = made.unflatten(-1, (heads, self.head_dim))
        return (apart if norm is None else norm(apart)).transpose(1, 2)


def find_projections(layer: nn.Module) -> Projections:
    """The projections of an attention layer of transformers.

    Raises:
        TypeError: it has none that heed knows, or they make more than queries, keys and values (gates, latents).
    """
    config: Any = getattr(layer, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(layer, "head_dim", None) or getattr(layer, "head_size", None)
    if not isinstance(heads, int) or not isinstance(head_dim, int):
        raise TypeError(f"{type(layer).__name__} does not say how many heads it has, and how wide they are")
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    sizes = (heads, key_heads, head_dim)
    separate = [getattr(layer, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if all(isinstance(part, nn.Module) for part in separate):
        norms = (getattr(layer, "q_norm", None), getattr(layer, "k_norm", None))
        found = Projections(*separate, *sizes, *norms)  # type: ignore[arg-type]
        widths = [_outputs(part) for part in separate]  # type: ignore[arg-type]
        if widths[:2] == [heads * head_dim, key_heads * head_dim] or None in widths:
            return found
        raise TypeError(
            f"{type(layer).__name__}: q_proj and k_proj make {widths[0]} and {widths[1]} channels, which are not {heads} "
            f"and {key_heads} heads of {head_dim}"
        )
    for name in ("c_attn", "qkv_proj", "query_key_value"):
        module = getattr(layer, name, None)
        wanted = (heads + 2 * key_heads) * head_dim
        by_head = name == "query_key_value"
        if (
            isinstance(module, nn.Module)
            and _outputs(module) == wanted
            and (not by_head or "NeoX" in type(layer).__name__)
        ):
            return Projections(module, module, module, *sizes, by_head=by_head)
    raise TypeError(
        f"{type(layer).__name__} has no projections that heed knows: q_proj, k_proj and v_proj as in Llama, c_attn as in "
        "GPT-2, qkv_proj as in Phi-3, or query_key_value as in GPT-NeoX"
    )


class Unrotated:
    """Queries and keys of a layer's running call before rotary embedding.

    The handle's hooks on the projections keep what they made until it is asked for, or forgotten.

    Args:
        layer: the attention layer.
        handle: removes the hooks.

    Raises:
        TypeError: as `find_projections`.
    """

    def __init__(self, layer: nn.Module, handle: Handle) -> None:
        self.projections = find_projections(layer)
        self._made: dict[nn.Module, Tensor] = {}
        for module in {self.projections.query, self.projections.key}:
            handle.hook(module.register_forward_hook(self._keep))

    def queries(self) -> Float[Tensor, "B H N D"]:
        """Queries of the call's tokens; the last call's, until `forget`."""
        return self.projections.split("query", self._made[self.projections.query])

    def keys(self) -> Float[Tensor, "B G N D"]:
        """Keys of the call's tokens; those that are cached are not among them."""
        return self.projections.split("key", self._made[self.projections.key])

    def forget(self) -> None:
        """Free the memory of what was made."""
        self._made.clear()

    def _keep(self, module: nn.Module, _: object, made: Tensor) -> None:
        self._made[module] = made


def rotate(
    x: Float[Tensor, "B H N D"], cos: Float[Tensor, "#B N R"], sin: Float[Tensor, "#B N R"]
) -> Float[Tensor, "B H N D"]:
    """Rotary embedding of the first R channels, half of them with the other half, as in Llama; the rest stays."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    cos, sin = (table[:, None].to(x.dtype) for table in (cos, sin))
    return torch.cat([turned * cos + _half(turned) * sin, rest], -1)


def unrotate(
    x: Float[Tensor, "B H N D"], cos: Float[Tensor, "#B N R"], sin: Float[Tensor, "#B N R"]
) -> Float[Tensor, "B H N D"]:
    """What `rotate` made x of; also for tables that are scaled, as those of YaRN are."""
    norm = cos.square() + sin.square()
    return rotate(x, cos / norm, -sin / norm)


def _half(x: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([-high, low], -1)


def _width(norm: nn.Module) -> int | None:
    """Channels that a norm has a weight for; None for one without."""
    weight = getattr(norm, "weight", None)
    return None if weight is None else weight.numel()


def _outputs(module: nn.Module) -> int | None:
    """Channels that a projection makes: of nn.Linear, of GPT-2's Conv1D, or of what wraps them; None where unknown."""
    for name in ("out_features", "nf"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    return None
