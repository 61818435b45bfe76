"""HiP attention (card 57): long prompts and caches in O(T log T), by a tree search for the keys that matter.

    A_i = sinks + what the search chose for i's query block + the last `window` keys                 `attention.py`
    o_i = softmax(scale q_i K[A_i]^T) V[A_i]

`search.py` has the search and the budget, `method.py` the method for language models, `report.py` what it costs and keeps.
Lee et al., "A Training-Free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned
Attention", ICLR 2025, arXiv 2406.09827.
"""

from heed.language.hip.attention import hip_attention, sparse_attention
from heed.language.hip.method import HiP, HiPState, dense_start
from heed.language.hip.report import HiPCost, found_blocks, hip_cost, kept_mass
from heed.language.hip.search import HiPBudget, Selection, search_blocks

__all__ = [
    "HiP",
    "HiPBudget",
    "HiPCost",
    "HiPState",
    "Selection",
    "dense_start",
    "found_blocks",
    "hip_attention",
    "hip_cost",
    "kept_mass",
    "search_blocks",
    "sparse_attention",
]
