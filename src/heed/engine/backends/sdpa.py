"""PyTorch's scaled_dot_product_attention with a dense mask: best where most pairs are kept or the sequence is short."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heed.engine.bias import dense_bias
from heed.engine.call import Call, Result
from heed.engine.constants import kept
from heed.engine.pattern import Pattern
from heed.engine.patterns import Causal, Full


def refuse(call: Call) -> str | None:
    if call.weights:
        return "it does not return weights; use backend='reference'"
    if call.lse:
        return "it does not return the logsumexp; use backend='tiled' or 'reference'"
    if call.dropout > 0 and call.generator is not None:
        return "its dropout takes no generator; use backend='tiled' or 'reference'"
    return None


def run(call: Call) -> Result:
    options = {"dropout_p": call.dropout, "scale": call.scale, "enable_gqa": call.groups > 1}
    # Fused kernels want each token's channels side by side; without that PyTorch forms all scores.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    plain = call.bias is None and call.key_mask is None
    if plain and isinstance(call.pattern, Full):
        return Result(F.scaled_dot_product_attention(q, k, v, **options))
    if plain and call.pattern == Causal() and call.n == call.m:
        return Result(F.scaled_dot_product_attention(q, k, v, is_causal=True, **options))
    allowed = None
    if not isinstance(call.pattern, Full):  # whose mask would be one more for every length of a growing text
        allowed = _static_mask(call.pattern, call.n, call.m, q.device) if call.pattern.static else call.allowed()
    if call.key_mask is not None and call.pattern.static:  # else it is in what is allowed
        keys = call.key_mask[:, None, None, :]
        allowed = keys if allowed is None else allowed & keys
    mask = allowed
    if call.bias is not None:
        mask = dense_bias(call.bias, call.pattern, call.n, call.m).to(q.dtype)
        if allowed is not None:
            mask = mask.masked_fill(~allowed, -torch.inf)
    return Result(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))


@kept
def _static_mask(pattern: Pattern, n: int, m: int, device: torch.device) -> Tensor:
    return pattern.mask(n, m, device=device)[None, None]
