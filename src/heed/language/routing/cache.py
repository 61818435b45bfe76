"""What decoding keeps of the tokens so far: per kind of heads keys, values and, for routing heads, distances to centroids.

Roy et al. (arXiv 2003.05997) cache q, k and v and compute all distances again at every step. Centroids stand still while
a text is written, so the distances themselves are kept here, (B, H, T, K), and queries are not needed again.
"""

from __future__ import annotations

from torch import Tensor

from heed.catalogue import provides


@provides("08-routing")
class LayerCache:
    """Rows (B, H, T, _) by name, for one layer.

    Args:
        limit: most tokens there may be; room for all of them is taken with the first.
        grid: blocks per axis, for n-d models; default those of a text of `limit` tokens.

    Attributes:
        length: tokens so far.
    """

    def __init__(self, limit: int, grid: tuple[int, ...] | None = None) -> None:
        self.limit = limit
        self.grid = grid
        self.length = 0
        self._rows: dict[str, Tensor] = {}

    def extend(self, kind: str, **rows: Tensor) -> dict[str, Tensor]:
        """Append rows (B, H, new, _) and return all there are so far, (B, H, length + new, _); `length` stays.

        Raises:
            ValueError: more tokens than `limit`.
        """
        found: dict[str, Tensor] = {}
        for name, new in rows.items():
            end = self.length + new.shape[2]
            if end > self.limit:
                raise ValueError(f"{end} tokens do not fit a cache of {self.limit}; start it with a higher limit")
            room = self._rows.setdefault(f"{kind}.{name}", new.new_zeros(*new.shape[:2], self.limit, new.shape[3]))
            room[:, :, self.length : end] = new.detach()
            found[name] = room[:, :, :end]
        return found
