"""Which backend `auto` takes, and why."""

from __future__ import annotations

from torch.utils._triton import has_triton

from heed.engine.backends import flex, sdpa
from heed.engine.call import Call
from heed.engine.patterns import Causal, Full
from heed.engine.planner import plan_for

# Below this many scores per head a dense mask costs less than cutting the tokens into tiles. Measured on CPUs.
_SMALL = 1 << 16
# Tiles pay off while they compute at most this share of all scores.
_SHARE = {"cpu": 0.45}
_GPU_SHARE = 0.3
# Fetching a key for one tile of queries takes as long as so many scores of a dense mask. Measured on CPUs.
_FETCH = 64
# Up to so many keys, plain products have a faster gradient on a CPU than PyTorch's fused attention in half precision.
_FEW = 192
_MASK = 1 << 26  # entries of a mask per call that are still formed, 256 MB in float32


def choose(call: Call) -> tuple[str, str]:
    """(backend name, reason) for a call."""
    if call.weights:
        return "reference", "the weights are asked for"
    if call.q.device.type == "cpu" and call.q.itemsize < 4 and call.m <= _FEW and call.needs_grad:
        return "reference", f"gradients in half precision over {call.m} keys are fastest by plain products"
    dense = sdpa.refuse(call)
    if dense is None:
        if isinstance(call.pattern, Full) or (call.pattern == Causal() and call.n == call.m):
            return "sdpa", "the pattern is one that scaled_dot_product_attention knows"
        if call.n * call.m <= _SMALL:
            return "sdpa", f"{call.n} x {call.m} scores are few"
    if call.pattern.static:
        work = plan_for(call.pattern, call.n, call.m, call.q.device).work
        share = _SHARE.get(call.q.device.type, _GPU_SHARE)
        if dense is None and work > share:
            return "sdpa", f"tiles would compute {work:.0%} of all scores, more than {share:.0%}"
        if call.q.device.type == "cuda" and work <= share and flex.refuse(call) is None and has_triton():
            return "flex", f"a compiled kernel visits {work:.0%} of all scores"
        return "tiled", f"tiles compute {work:.0%} of all scores"
    fetched = call.pattern.fetches(call.m)
    if dense is None and fetched is not None and call.q.shape[:2].numel() * call.n * call.m <= _MASK:
        tile, share = fetched
        if share * _FETCH > tile:
            return "sdpa", f"{share:.0%} of the keys for {tile} queries at a time cost more to fetch than to mask"
    return "tiled", "the pattern is chosen by content" if dense is None else f"sdpa: {dense}"
