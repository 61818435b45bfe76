"""Caches that hold less than every key and value: what the compressing caches of this room have in common.

    storage.py   nested state made of tensors: its bytes, and the same change to every tensor of it
    layer.py     CompressedLayer, CompressedCache: what transformers calls, and what they promise
    rule.py      CacheRule: brings the attention over a layer's keys, with its queries, to the cache layer
    method.py    CacheMethod: heed.apply(model, method); CacheSource, its handle's state, makes caches

A cache layer holds some state after `seen` tokens, and hands the attention what stands for them, followed by the new ones:

    update(k, v) -> (B, G, M + N, D)   M = attended() columns for the seen tokens, N new tokens

A new method is one subclass of `CompressedLayer` and one of `CacheMethod`. A cache that keeps another number of tokens in
every head returns what it likes from `extend`, says how many columns in `attended`, and lets its rule compute the
attention (`core`) from `CacheRule.layer`. Only layer.py imports transformers.
"""
