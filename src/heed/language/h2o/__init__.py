"""H2O (used in card 70, SinkLoRA): a cache that keeps the last tokens and those that got most attention so far.

    s_j = sum over all queries so far, and the heads of a key-value head, of A[i, j]
    kept = the `heavy` largest s_j before the last `recent` tokens, and these

`policy.py` says which tokens stay, `layer.py` is the cache layer, `method.py` the method for language models.

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", NeurIPS 2023,
arXiv 2306.14048.
"""

from heed.language.h2o.method import H2O
from heed.language.h2o.policy import attention_received, heavy_hitters

__all__ = ["H2O", "attention_received", "heavy_hitters"]
