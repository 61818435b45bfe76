"""Neighborhood attention (card 13) without its weights in memory, and the joining of attentions over separate keys.

    out_i = sum_{j in window(i)} softmax_j(scale * q_i . k_j) v_j      q (B, *L, H, d), k (B, *L, Hkv, d),
    lse_i = log sum_{j in window(i)} exp(scale * q_i . k_j)            v (B, *L, Hkv, dv), out (B, *L, H, dv),
                                                                       lse (B, *L, H)

Per axis the window holds `kernel_size` keys, `dilation` apart, and slides inward at the borders; runs of `stride`
queries share one window; a causal axis looks back only (`heed.patterns.Neighborhood` has the rule). Extra keys that
every query sees are an attention of their own, merged by

    out = o0 - sigmoid(l1 - l0) * (o0 - o1)        lse = l0 - logsigmoid(l0 - l1)

Hassani, Hwu, Shi, "Faster Neighborhood Attention", NeurIPS 2024, arXiv 2403.04690; stride from "Generalized
Neighborhood Attention", arXiv 2504.16922. Names and layouts are those of NATTEN 0.21: heads come last but one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.pattern import Pattern
from heed.engine.patterns import Causal, Full, Neighborhood
from heed.layers.natten.checks import CausalPerAxis, PerAxis, check_extra, check_rank, check_same, windows_on


@provides("13-fna")
def na1d(
    query: Float[Tensor, "B N H d"],
    key: Float[Tensor, "B N Hkv d"],
    value: Float[Tensor, "B N Hkv dv"],
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: CausalPerAxis = False,
    scale: float | None = None,
    additional_keys: Float[Tensor, "B M Hkv d"] | None = None,
    additional_values: Float[Tensor, "B M Hkv dv"] | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B N H dv"] | tuple[Float[Tensor, "B N H dv"], Float[Tensor, "B N H"]]:
    """Neighborhood attention on sequences.

    Args:
        query: (B, N, H, d).
        key: (B, N, Hkv, d); H must be a multiple of Hkv (grouped queries).
        value: (B, N, Hkv, dv).
        kernel_size: keys per window and axis, >= 2, odd or even; kernel_size * dilation must fit the axis.
        stride: queries that share a window, 1 to kernel_size.
        dilation: step between the keys of a window.
        is_causal: whether an axis looks back only.
        scale: factor on q . k; None or 0 mean d ** -0.5.
        additional_keys: (B, M, Hkv, d) tokens that every query sees besides its window.
        additional_values: (B, M, Hkv, dv) their values.
        return_lse: also return the natural-log logsumexp of the scaled scores (B, N, H), float32.

    Returns:
        out (B, N, H, dv), or (out, lse).

    Raises:
        ValueError: shapes or settings that do not fit, with the axis and the numbers.
    """
    return _windowed(1, query, key, value, (kernel_size, stride, dilation, is_causal), scale,
                     additional_keys, additional_values, return_lse)  # fmt: skip


@provides("13-fna")
def na2d(
    query: Float[Tensor, "B X Y H d"],
    key: Float[Tensor, "B X Y Hkv d"],
    value: Float[Tensor, "B X Y Hkv dv"],
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: CausalPerAxis = False,
    scale: float | None = None,
    additional_keys: Float[Tensor, "B M Hkv d"] | None = None,
    additional_values: Float[Tensor, "B M Hkv dv"] | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B X Y H dv"] | tuple[Float[Tensor, "B X Y H dv"], Float[Tensor, "B X Y H"]]:
    """Neighborhood attention on grids (B, X, Y, H, d); arguments as in `na1d`, one value or one per axis."""
    return _windowed(2, query, key, value, (kernel_size, stride, dilation, is_causal), scale,
                     additional_keys, additional_values, return_lse)  # fmt: skip


@provides("13-fna")
def na3d(
    query: Float[Tensor, "B T X Y H d"],
    key: Float[Tensor, "B T X Y Hkv d"],
    value: Float[Tensor, "B T X Y Hkv dv"],
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: CausalPerAxis = False,
    scale: float | None = None,
    additional_keys: Float[Tensor, "B M Hkv d"] | None = None,
    additional_values: Float[Tensor, "B M Hkv dv"] | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B T X Y H dv"] | tuple[Float[Tensor, "B T X Y H dv"], Float[Tensor, "B T X Y H"]]:
    """Neighborhood attention on volumes (B, T, X, Y, H, d); arguments as in `na1d`, one value or one per axis."""
    return _windowed(3, query, key, value, (kernel_size, stride, dilation, is_causal), scale,
                     additional_keys, additional_values, return_lse)  # fmt: skip


@provides("13-fna")
def attention(
    query: Float[Tensor, "B N H d"],
    key: Float[Tensor, "B M Hkv d"],
    value: Float[Tensor, "B M Hkv dv"],
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B N H dv"] | tuple[Float[Tensor, "B N H dv"], Float[Tensor, "B N H"]]:
    """Attention over all keys in the layout of `na1d`, with its logsumexp: a part for `merge_attentions`.

    Args:
        query: (B, N, H, d).
        key: (B, M, Hkv, d); H must be a multiple of Hkv.
        value: (B, M, Hkv, dv).
        is_causal: query i sees keys j <= i only.
        scale: factor on q . k; None or 0 mean d ** -0.5.
        return_lse: also return the natural-log logsumexp of the scaled scores (B, N, H), float32.

    Returns:
        out (B, N, H, dv), or (out, lse).

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_heads_last(1, query, key, value)
    out, lse = _run(query, key, value, Causal() if is_causal else Full(), scale, return_lse)
    return out if lse is None else (out, lse)


@provides("13-fna")
def merge_attentions(
    outputs: Sequence[Float[Tensor, "*rows dv"]], lses: Sequence[Float[Tensor, "*rows"]]
) -> tuple[Float[Tensor, "*rows dv"], Float[Tensor, "*rows"]]:
    """Join attentions of the same queries over disjoint sets of keys into the attention over all of them.

    It is computed in float32 and differentiable for any number of parts. A query that sees no key in a part (lse -inf)
    takes nothing from it.

    Args:
        outputs: one output (B, *L, H, dv) per set of keys.
        lses: the logsumexp (B, *L, H) of each.

    Returns:
        The merged output in the dtype of the first, and the merged logsumexp.

    Raises:
        ValueError: no parts, unequal numbers of outputs and lses, or shapes that do not fit.
    """
    if not outputs or len(outputs) != len(lses):
        raise ValueError(f"{len(outputs)} outputs and {len(lses)} lses; give one lse per output, and at least one part")
    for i, (out, lse) in enumerate(zip(outputs, lses, strict=True)):
        if out.shape != outputs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"part {i}: output {tuple(out.shape)} and lse {tuple(lse.shape)} do not fit output "
                f"{tuple(outputs[0].shape)}, whose lse is {tuple(outputs[0].shape[:-1])}"
            )
    precision = torch.promote_types(outputs[0].dtype, torch.float32)
    out, lse = outputs[0].to(precision), lses[0].to(precision)
    for next_out, next_lse in zip(outputs[1:], lses[1:], strict=True):
        out, lse = _merge(out, lse, next_out.to(precision), next_lse.to(precision))
    return out.to(outputs[0].dtype), lse


def _merge(o0: Tensor, l0: Tensor, o1: Tensor, l1: Tensor) -> tuple[Tensor, Tensor]:
    # The formulas at the top, arranged so that -inf - -inf, two parts without keys, cannot make NaN.
    gain = (l1 - l0).masked_fill(l1 == -torch.inf, -torch.inf)
    out = o0 - gain.sigmoid()[..., None] * (o0 - o1)
    return out, torch.maximum(l0, l1) - F.logsigmoid(gain.abs())


def _windowed(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: tuple[PerAxis, PerAxis, PerAxis, CausalPerAxis],
    scale: float | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    _check_heads_last(rank, query, key, value)
    check_same("key", key, "query", query, {a: f"tokens, axis {a - 1} of the layout" for a in range(1, rank + 1)})
    pattern = _simplest(windows_on(tuple(query.shape[1:-2]), *window))
    extra = check_extra(additional_keys, additional_values, key, value, heads=2)
    out, lse = _run(query, key, value, pattern, scale, return_lse or extra is not None)
    if extra is not None and lse is not None:
        extra_out, extra_lse = _run(query, *extra, Full(), scale, True)
        out, lse = merge_attentions([out, extra_out], [lse, extra_lse])  # type: ignore[list-item]
    return (out, lse) if return_lse and lse is not None else out


def _check_heads_last(rank: int, query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_rank(name, x, rank, "(batch, *layout, heads, width)")
    check_same("key", key, "query", query, {0: "batch", rank + 2: "width"})
    tokens = {a: f"tokens, axis {a - 1} of the layout" for a in range(1, rank + 1)}
    check_same("value", value, "key", key, {0: "batch", **tokens, rank + 1: "heads"})
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"axis {rank + 1} (heads): {heads} query heads are not a multiple of {kv_heads} key heads")


def _simplest(windows: Neighborhood) -> Pattern:
    """Windows that hold the whole layout are dense or causal attention, which has backends of its own."""
    if windows.kernel == windows.grid:
        if not any(windows.causal):
            return Full()
        if len(windows.grid) == 1:
            return Causal()
    return windows


def _run(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, scale: float | None, lse: bool
) -> tuple[Tensor, Tensor | None]:
    """attend in NATTEN's layout: tokens flattened, heads first and back again."""
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value))
    result = attend(q, k, v, pattern, scale=scale or None, return_lse=lse)
    out, sums = result if isinstance(result, tuple) else (result, None)
    out = out.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1])
    return out, None if sums is None else sums.transpose(1, 2).reshape(query.shape[:-1])
