"""The named patterns at one address; see `heed.engine.pattern` for what they inherit and how they combine.

Tokens of a grid are flattened row-major. Positions are counted from 0.
"""

from heed.engine.chosen import Grouped, Selected
from heed.engine.grids import Blocks, Halo, Neighborhood
from heed.engine.pattern import Pattern
from heed.engine.sequences import Causal, Dilated, Full, Strided, Subsampled, Window

__all__ = [
    "Blocks",
    "Causal",
    "Dilated",
    "Full",
    "Grouped",
    "Halo",
    "Neighborhood",
    "Pattern",
    "Selected",
    "Strided",
    "Subsampled",
    "Window",
]
