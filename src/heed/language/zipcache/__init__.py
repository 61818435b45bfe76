"""ZipCache (card 34): a KV cache of about a fifth, with more bits for the tokens that get attention.

    s = saliency of every token, from a few probe queries                     (B, G, N)           heed.language.saliency
    U = the u N tokens of least s, per key-value head: 2 bits; the others 4 bits
    K~ = quantised per channel,  V~ = c * quantised per token of V / c        (B, N, C) packed    heed.language.quantise
    attention sees [K~, tail, new]; every `gap` tokens the full-precision tail is compressed with all the rest

The prompt itself attends in full precision. `method.py` has the settings, `store.py` the mixed-precision storage, `layer.py`
the cache layer, `ratio.py` the calculator. He et al., "ZipCache: Accurate and Efficient KV Cache Quantization with Salient
Token Identification", NeurIPS 2024, arXiv 2405.14256.
"""

from heed.language.zipcache.method import ZipCache
from heed.language.zipcache.ratio import compression_ratio
from heed.language.zipcache.store import MixedStore, Precision

__all__ = ["MixedStore", "Precision", "ZipCache", "compression_ratio"]
