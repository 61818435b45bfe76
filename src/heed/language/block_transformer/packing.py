"""Blocks out of tokens: padding to whole blocks, and packing of documents for training (card 15).

    p pad tokens in front, T tokens, pad tokens to the next multiple of L        (B, T) -> (B, N, L)

What makes prompts of any length work is that documents start anywhere in their first block while training: p is random.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from heed.catalogue import provides


@provides("15-block-transformer")
@dataclass
class Blocks:
    """Tokens in blocks.

    Attributes:
        ids: (B, N, L).
        mask: (B, N, L) int64, 0 for padding.
    """

    ids: Tensor
    mask: Tensor

    @property
    def block_mask(self) -> Tensor:
        """(B, N), 0 for blocks of padding only."""
        return self.mask.any(-1).long()


@provides("15-block-transformer")
def to_blocks(
    ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"] | None, block_length: int, front: int, pad_id: int
) -> Blocks:
    """Cut rows into blocks, after `front` pad tokens and before as many as fill the last block.

    Args:
        ids: (B, T).
        mask: (B, T), 0 for padding that is there already; None for none.
        block_length: L.
        front: pad tokens in front.
        pad_id: what they are.

    Raises:
        ValueError: a mask of another shape, or a negative `front`.
    """
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"attention_mask {tuple(mask.shape)} must have the shape of the ids {tuple(ids.shape)}")
    if front < 0:
        raise ValueError(f"{front} pad tokens in front must be 0 or more")
    mask = torch.ones_like(ids, dtype=torch.long) if mask is None else mask.long()
    sides = (front, -(front + ids.shape[1]) % block_length)
    padded = F.pad(ids, sides, value=pad_id), F.pad(mask, sides)
    return Blocks(*(x.unflatten(1, (-1, block_length)) for x in padded))


@provides("15-block-transformer")
def pack_documents(
    documents: Iterable[Sequence[int] | Tensor],
    block_length: int,
    blocks: int,
    *,
    pad_id: int = 0,
    eos_id: int | None = None,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Blocks:
    """Pack documents into rows of `blocks` blocks, each document beginning a new block.

    The first block of a document gets 0 to L - 1 pad tokens in front, drawn anew for every document, and the last block is
    filled up with padding. Documents follow one another, and are cut where a row ends; the last row is filled with blocks of
    padding. A document sees those before it in its row. Where rows are cut is heed's own choice.

    Args:
        documents: token ids of each.
        block_length: L.
        blocks: N.
        pad_id: fills blocks.
        eos_id: put after each document; None for nothing.
        random_start: whether to pad in front at all.
        generator: of the random padding.

    Returns:
        ids and mask (rows, N, L).

    Raises:
        ValueError: no tokens at all, or lengths below 1.
    """
    if block_length < 1 or blocks < 1:
        raise ValueError(f"block_length={block_length} and blocks={blocks} must be at least 1")
    ids, mask = [], []
    for document in documents:
        tokens = torch.as_tensor(document, dtype=torch.long)
        if eos_id is not None:
            tokens = F.pad(tokens, (0, 1), value=eos_id)
        front = int(torch.randint(block_length, (), generator=generator)) if random_start else 0
        if len(tokens):
            cut = to_blocks(tokens[None], None, block_length, front, pad_id)
            ids.append(cut.ids[0])
            mask.append(cut.mask[0])
    if not ids:
        raise ValueError("the documents hold no tokens; give at least one that does")
    short = -sum(map(len, ids)) % blocks
    rows = F.pad(torch.cat(ids), (0, 0, 0, short), value=pad_id), F.pad(torch.cat(mask), (0, 0, 0, short))
    return Blocks(*(x.unflatten(0, (-1, blocks)) for x in rows))
