"""RazorAttention (card 65): a few heads look things up and keep the whole cache; the others keep little, and one mean token.

    scores of all heads on a text that repeats; 15 % of them are retrieval heads          profile.py, heads.py, alibi.py
    other heads: first and last tokens, k_c = mean of the dropped keys, v_c = mean of the values      store.py
    out = [sum_n exp(s_n) v_n + N_d exp(s_c) v_c] / [sum_n exp(s_n) + N_d exp(s_c)]                   rule.py

`method.py` has the settings, `layer.py` the cache layer. Tang et al., "RazorAttention: Efficient KV Cache Compression
Through Retrieval Heads", ICLR 2025, arXiv 2407.15891. The authors published the search for heads only; storage and
attention are heed's own reading of the paper's equations.
"""

from heed.language.razor.alibi import alibi_scope, alibi_slopes, alibi_windows
from heed.language.razor.heads import RetrievalHeads
from heed.language.razor.method import Razor
from heed.language.razor.profile import HeadScores, profile_heads, repeated_prompt, repeated_scores, top_heads
from heed.language.razor.rule import compensated_attention
from heed.language.razor.store import Budget, WindowStore

__all__ = [
    "Budget",
    "HeadScores",
    "Razor",
    "RetrievalHeads",
    "WindowStore",
    "alibi_scope",
    "alibi_slopes",
    "alibi_windows",
    "compensated_attention",
    "profile_heads",
    "repeated_prompt",
    "repeated_scores",
    "top_heads",
]
