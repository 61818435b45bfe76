"""Embedders: from the L tokens of a block to its n embeddings, whatever the other blocks hold (card 15).

lookup       x = E[ids]                          (M, L, e)   M = B N blocks
RoBERTa      x = RoBERTa(ids, mask)              (M, L, e)   on each block by itself
RoBERTa CLS  x = RoBERTa([cls ... cls, ids])     (M, n_cls, e), the states of the CLS tokens
concat       e_i = (x_1 ... x_{L/n})             (M, n, D_b), D_b = (L/n) e
projection   e_i = b + sum_j W_j x_j             a convolution with kernel = stride = L/n
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import MissingExtra
from heed.language.block_transformer.config import BlockTransformerConfig

# RoBERTa's own ids: of padding, and of what begins a text.
_ROBERTA_PAD, _ROBERTA_BOS = 1, 0


class Embedder(nn.Module):
    """Tokens (B, N, L) to block embeddings (B, N, n, D_b); a subclass says what stands for the tokens of a block."""

    def __init__(self, config: BlockTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.projection_layer: nn.Conv1d | None = None
        if config.projection == "projection_layer":
            kernel = config.embedded_tokens // config.n_embedding_tokens
            self.projection_layer = nn.Conv1d(config.embedder_width, config.block_width, kernel, stride=kernel)
            nn.init.normal_(self.projection_layer.weight, std=(config.embedder_width * kernel) ** -0.5)
            nn.init.zeros_(self.projection_layer.bias)  # type: ignore[arg-type]

    def tokens(self, ids: Int[Tensor, "M L"], mask: Int[Tensor, "M L"]) -> Float[Tensor, "M T e"]:
        """What the projection sees of M blocks."""
        raise NotImplementedError

    def forward(self, ids: Int[Tensor, "B N L"], mask: Int[Tensor, "B N L"] | None = None) -> Float[Tensor, "B N n D"]:
        """Embeddings of blocks.

        Args:
            ids: (B, N, L).
            mask: (B, N, L), 1 for tokens and 0 for padding; None for tokens everywhere. The lookup ignores it.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        x = self.tokens(ids.flatten(0, 1), mask.flatten(0, 1))
        x = x.reshape(*ids.shape[:2], self.config.n_embedding_tokens, -1)
        if self.projection_layer is not None:  # the convolution's windows do not overlap: a matrix product
            weight = self.projection_layer.weight.transpose(1, 2).flatten(1)
            x = F.linear(x, weight, self.projection_layer.bias)
        return x


@provides("15-block-transformer")
class LookupEmbedder(Embedder):
    """A table of token embeddings, concatenated or projected; the main models' embedder."""

    def __init__(self, config: BlockTransformerConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedder_width)
        nn.init.normal_(self.embeddings.weight, std=0.02)

    @property
    def table(self) -> Tensor:
        """(vocab_size, e)."""
        return self.embeddings.weight

    def tokens(self, ids: Int[Tensor, "M L"], mask: Int[Tensor, "M L"]) -> Float[Tensor, "M T e"]:
        return self.embeddings(ids)


@provides("15-block-transformer")
class RobertaEmbedder(Embedder):
    """A RoBERTa encoder (transformers') over each block by itself.

    Token id 1 has no position of its own, as it is RoBERTa's padding.
    """

    def __init__(self, config: BlockTransformerConfig) -> None:
        super().__init__(config)
        try:
            from transformers import RobertaConfig, RobertaModel
        except ImportError as error:
            raise MissingExtra("transformers", "language") from error
        settings: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.embedder_width,
            "num_hidden_layers": config.embedder_layers,
            "num_attention_heads": config.heads("embedder"),
            "intermediate_size": 4 * config.embedder_width,
            "max_position_embeddings": config.embedder_positions,
            "type_vocab_size": 1,
            "pad_token_id": _ROBERTA_PAD,
            "bos_token_id": _ROBERTA_BOS,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.dropout,
            "attn_implementation": "sdpa",
        }
        roberta = RobertaModel(RobertaConfig(**settings), add_pooling_layer=False)
        self.embeddings, self.encoder = roberta.embeddings, roberta.encoder

    @property
    def table(self) -> Tensor:
        """(vocab_size, e)."""
        return self.embeddings.word_embeddings.weight

    def tokens(self, ids: Int[Tensor, "M L"], mask: Int[Tensor, "M L"]) -> Float[Tensor, "M T e"]:
        x = self.embeddings(input_ids=ids)
        # A number, not -inf, so that a block of nothing but padding is finite.
        added = torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask == 0, torch.finfo(x.dtype).min / 2)
        return self.encoder(x, attention_mask=added[:, None, None]).last_hidden_state


@provides("15-block-transformer")
class RobertaCLSEmbedder(RobertaEmbedder):
    """RoBERTa with `n_cls` tokens put before the block; their states alone make its embedding."""

    def tokens(self, ids: Int[Tensor, "M L"], mask: Int[Tensor, "M L"]) -> Float[Tensor, "M T e"]:
        count = self.config.n_cls
        ids, mask = F.pad(ids, (count, 0), value=_ROBERTA_BOS), F.pad(mask, (count, 0), value=1)
        return super().tokens(ids, mask)[:, :count]


EMBEDDERS: dict[str, type[LookupEmbedder] | type[RobertaEmbedder]] = {
    "lookup": LookupEmbedder,
    "roberta": RobertaEmbedder,
    "roberta_cls": RobertaCLSEmbedder,
}
