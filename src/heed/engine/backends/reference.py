"""Dense attention in float32, written out: the specification every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from heed.engine.bias import dense_bias
from heed.engine.call import Call, Result
from heed.engine.patterns import Full
from heed.engine.precision import at_least_float32, no_autocast


def refuse(call: Call) -> str | None:
    return None


def run(call: Call) -> Result:
    """softmax(scale * q k^T + bias, over the allowed keys) v; rows without a key give 0 and lse -inf."""
    with no_autocast(call.q):  # which would round the scores
        return _run(call)


def _run(call: Call) -> Result:
    k, v = call.full_heads()
    precision = at_least_float32(call.q)
    scores = call.scale * (call.q.to(precision) @ k.to(precision).transpose(-1, -2))
    if call.bias is not None:
        scores = scores + dense_bias(call.bias, call.pattern, call.n, call.m).to(precision)
    if isinstance(call.pattern, Full) and call.key_mask is None:
        weights, lse = scores.softmax(-1), scores.logsumexp(-1) if call.lse else None
    else:
        weights, lse = _masked(call, scores)
    mixed = weights
    if call.dropout > 0:
        kept = torch.rand(weights.shape, generator=call.generator, device=weights.device) >= call.dropout
        mixed = weights * kept / (1 - call.dropout)
    out = (mixed @ v.to(precision)).to(call.v.dtype)
    return Result(out, weights if call.weights else None, lse)


def _masked(call: Call, scores: Tensor) -> tuple[Tensor, Tensor | None]:
    allowed = call.allowed()
    empty = ~allowed.any(-1, keepdim=True)
    # An empty row is computed as if everything were allowed and then set to 0, so that no NaN enters its gradient.
    scores = scores.masked_fill(~(allowed | empty), -torch.inf)
    weights = scores.softmax(-1).masked_fill(empty, 0.0)
    return weights, scores.logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf) if call.lse else None
