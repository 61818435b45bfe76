"""NATTEN's functional interface on heed's engine (card 13): windowed attention on 1-D, 2-D and 3-D layouts of tokens.

`fused` holds attention that never forms its weights, `unfused` its two halves with the weights in between, `cost` what
a window costs. The modules are in `heed.layers.neighborhood`.
"""

from heed.engine.backends.flex import block_mask
from heed.layers.natten.cost import TileCount, count_tiles, neighborhood_flops
from heed.layers.natten.fused import attention, merge_attentions, na1d, na2d, na3d
from heed.layers.natten.unfused import (
    na1d_av,
    na1d_qk,
    na2d_av,
    na2d_qk,
    na3d_av,
    na3d_qk,
    natten2dav,
    natten2dqkrpb,
)

__all__ = [
    "TileCount",
    "attention",
    "block_mask",
    "count_tiles",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "natten2dav",
    "natten2dqkrpb",
    "neighborhood_flops",
]
