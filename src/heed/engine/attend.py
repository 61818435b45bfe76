"""`attend`: attention under a pattern, on whatever backend fits."""

from __future__ import annotations

import logging
import math
import os
from typing import Literal, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from heed.engine.backends import BACKENDS
from heed.engine.bias import Bias, RelativeBias, RelativeLogits
from heed.engine.call import Call, Result
from heed.engine.choose import choose
from heed.engine.pattern import Pattern
from heed.errors import unknown

log = logging.getLogger("heed.engine")


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *,
    bias: Bias | None = None, scale: float | Tensor | None = None, key_mask: Tensor | None = None,
    dropout: float = 0.0, generator: torch.Generator | None = None,
    return_weights: Literal[False] = False, return_lse: Literal[False] = False, backend: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, *,
    bias: Bias | None = None, scale: float | Tensor | None = None, key_mask: Tensor | None = None,
    dropout: float = 0.0, generator: torch.Generator | None = None,
    return_weights: bool = False, return_lse: bool = False, backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]: ...  # fmt: skip


def attend(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv M D"],
    v: Float[Tensor, "B Hkv M Dv"],
    pattern: Pattern,
    *,
    bias: Bias | None = None,
    scale: float | Float[Tensor, ...] | None = None,
    key_mask: Bool[Tensor, "B M"] | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    return_weights: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """softmax(scale * q k^T + bias) v over the keys that `pattern` and `key_mask` keep.

    Scores and softmax are in float32 for half-precision inputs. A query with no key to see gives 0, with gradient 0.

    Args:
        q: (B, H, N, D) queries.
        k: (B, Hkv, M, D) keys; H must be a multiple of Hkv (grouped queries).
        v: (B, Hkv, M, Dv) values.
        pattern: which keys each query may look at, see `heed.patterns`.
        bias: added to the scaled scores: a tensor that broadcasts to (B, H, N, M), a `RelativeBias` or `RelativeLogits`.
        scale: factor on q k^T, default D ** -0.5; a tensor that broadcasts to (B, H, N, 1) gives per-head or per-query
            temperatures.
        key_mask: (B, M) bool, False where a key is padding.
        dropout: probability of dropping a weight.
        generator: makes the dropout repeatable.
        return_weights: also return the weights (B, H, N, M), before dropout (reference backend).
        return_lse: also return the natural-log logsumexp of the scores (B, H, N), float32.
        backend: "auto", "reference", "sdpa", "tiled" or "flex"; the environment variable HEED_BACKEND replaces "auto".

    Returns:
        out (B, H, N, Dv), or a tuple (out, weights), (out, lse) or (out, weights, lse) as asked for.

    Raises:
        ValueError: shapes, devices, dtypes or settings that do not fit, or a backend that cannot run the call.
    """
    call = _checked(q, k, v, pattern, bias, scale, key_mask, dropout, generator, return_weights, return_lse)
    result = _run(call, backend)
    extras = tuple(x for x in (result.weights, result.lse) if x is not None)
    return (result.out, *extras) if extras else result.out


def _run(call: Call, name: str) -> Result:
    if name == "auto":
        name = os.environ.get("HEED_BACKEND", "auto")
    if name == "auto":
        name, reason = choose(call)
        if not torch.compiler.is_compiling():  # a compiled graph cannot log
            log.debug("%s for %s on %s tokens: %s", name, call.pattern, call.n, reason)
    elif name not in BACKENDS:
        raise ValueError(unknown("backend", name, (*BACKENDS, "auto")))
    chosen = BACKENDS[name]
    refusal = chosen.refuse(call)
    if refusal is not None:
        raise ValueError(f"backend {name!r} cannot run this call: {refusal}")
    return chosen.run(call)


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    bias: Bias | None,
    scale: float | Tensor | None,
    key_mask: Tensor | None,
    dropout: float,
    generator: torch.Generator | None,
    weights: bool,
    lse: bool,
) -> Call:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have shape (batch, heads, tokens, width), not {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on {q.device}; convert one of them"
            )
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be one of heed.patterns, not {pattern!r}")
    (batch, heads, n, width), (_, kv_heads, m, _) = q.shape, k.shape
    if k.shape[0] != batch or v.shape[:3] != k.shape[:3] or k.shape[3] != width:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: batches must agree, q and k share "
            "their width, k and v their heads and tokens"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must lie in [0, 1)")
    if key_mask is not None and (key_mask.shape != (batch, m) or key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask must be bool {(batch, m)}, not {key_mask.dtype} {tuple(key_mask.shape)}")
    pattern.check(n, m)
    if isinstance(bias, Tensor):
        _check_bias(bias, (batch, heads, n, m))
    elif bias is not None and not isinstance(bias, RelativeBias | RelativeLogits):
        raise TypeError(f"bias must be a tensor, RelativeBias or RelativeLogits, not {bias!r}")
    if isinstance(scale, Tensor):
        q, factor = q * scale, 1.0
        if q.shape != (batch, heads, n, width):
            raise ValueError(f"scale must broadcast to {(batch, heads, n, 1)}; it makes q {tuple(q.shape)}")
    else:
        factor = width**-0.5 if scale is None else float(scale)
    if not math.isfinite(factor):
        raise ValueError(f"scale={scale} must be finite")
    return Call(q, k, v, pattern, bias, factor, key_mask, dropout, generator, weights, lse)


def _check_bias(bias: Tensor, shape: tuple[int, int, int, int]) -> None:
    try:
        fits = torch.broadcast_shapes(bias.shape, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"bias {tuple(bias.shape)} does not broadcast to {shape} (batch, heads, queries, keys)")
