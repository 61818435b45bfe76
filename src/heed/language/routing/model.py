"""Routing Transformer (card 08): a language model whose layers attend locally and, by content, inside clusters of tokens.

    x_t = E[id_t] W_e + b_e (+ sinusoids)            (B, T, D), E (V, e)
    x = blocks(x)                                    `stack.py`, attention by `layer.py`
    logits = (x W_1 + b_1) W_2 + b_2                 (B, T, V); without W_1 where e = D

`model(ids)` predicts what follows each id. `score(targets)` is the authors' form: targets are moved right by one, id 0
first, and 0 is padding in the loss. Either way `auxiliary_loss`, the summed clustering losses, belongs to the training
loss.

Roy, Saffar, Vaswani, Grangier, "Efficient Content-Based Sparse Attention with Routing Transformers", TACL 2021, arXiv
2003.05997; google-research/routing_transformer. The encoder and the encoder-decoder are heed's reading of its parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.checkpoint import load_weights
from heed.language.routing.cache import LayerCache
from heed.language.routing.checkpoint import from_tensorflow
from heed.language.routing.config import NAMED, RoutingConfig
from heed.language.routing.stack import AuxiliaryLoss, RoutingStack, init_linear, sinusoids
from heed.models import HeedModel, register_models


@provides("08-routing")
class Score(NamedTuple):
    """What `RoutingTransformerLM.score` gives.

    Args:
        logits: (B, T, V), row t for target t.
        cross_entropy: mean over targets that are not 0, nats.
        clustering: summed losses of k-means.
    """

    logits: Tensor
    cross_entropy: Tensor
    clustering: Tensor

    @property
    def total(self) -> Float[Tensor, ""]:
        return self.cross_entropy + self.clustering


class TokenEmbedding(nn.Module):
    """Ids to (B, T, D): a table of its own width, a map, and sinusoids where asked for."""

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__()
        width = config.embed_dim or config.dim
        self.vocab, self.timing = config.vocab, config.timing
        self.embed = nn.Embedding(config.vocab, width)
        self.embed_map = nn.Linear(width, config.dim)
        self.drop = nn.Dropout(config.embed_dropout)
        init_linear(self)

    def forward(self, ids: Int[Tensor, "B T"], first: int = 0) -> Float[Tensor, "B T D"]:
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(f"ids must be integers (B, T), not {ids.dtype} {tuple(ids.shape)}")
        if not ids.is_meta and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab:
            raise ValueError(f"ids range from {int(ids.min())} to {int(ids.max())}, but vocab={self.vocab}")
        x = self.embed_map(self.drop(self.embed(ids)))
        if self.timing:
            positions = torch.arange(first, first + ids.shape[1], device=x.device, dtype=torch.float32)
            x = x + sinusoids(positions, x.shape[-1]).to(x.dtype)
        return x


class _Text(AuxiliaryLoss, HeedModel):
    """What the models of this file share: reading the authors' variables."""

    config: RoutingConfig

    def load_authors(self, weights: dict[str, Tensor], source: str = "the authors' weights") -> Self:
        """Load the variables of a TensorFlow checkpoint, by their names, see `heed.language.routing.checkpoint`."""
        load_weights(self, from_tensorflow(weights), source)
        return self


@provides("08-routing")
class RoutingTransformerLM(_Text):
    """The language model; `heed.create_model("routing_enwik8_8k")` builds a configuration of the authors'.

    Args:
        config: see `RoutingConfig`.
    """

    Config = RoutingConfig

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        if not config.masked:
            raise ValueError("a language model needs masked=True; RoutingEncoder takes masked=False")
        width = config.embed_dim or config.dim
        self.tokens = TokenEmbedding(config)
        self.blocks = RoutingStack(config)
        self.unembed_map = nn.Linear(config.dim, width) if width != config.dim else nn.Identity()
        self.head = nn.Linear(width, config.vocab)
        init_linear(self.unembed_map)
        init_linear(self.head)

    def forward(self, ids: Int[Tensor, "B T"], *, caches: Sequence[LayerCache] | None = None) -> Float[Tensor, "B T V"]:
        """Logits of the id after each position; `auxiliary_loss` holds the clustering losses of this pass.

        Args:
            ids: (B, T); T at least the window, after zeros are added up to a multiple of the block.
            caches: empty, from `caches()`; filled for `step`.

        Raises:
            ValueError: ids outside the vocabulary, or fewer than a cluster takes.
        """
        x, self.auxiliary_loss = self.blocks(self.tokens(ids), caches=caches)
        return self.head(self.unembed_map(x))

    def score(self, targets: Int[Tensor, "B T"]) -> Score:
        """Predict every target from those before it, and 0 before the first; targets of 0 count for nothing.

        In training mode `target_dropout` of the ids that are read become 0.
        """
        read = shift_right(targets)
        if self.training and self.config.target_dropout:
            read = read * (torch.rand(read.shape, device=read.device) >= self.config.target_dropout)
        logits = self(read)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), reduction="none", ignore_index=0)
        return Score(logits, losses.sum() / (targets != 0).sum().clamp(min=1), self.auxiliary_loss)

    def caches(self, limit: int | None = None) -> list[LayerCache]:
        """Empty caches for texts of at most `limit` tokens, default `config.length`."""
        return [LayerCache(limit or self.config.length) for _ in range(self.config.layers)]

    def step(self, ids: Int[Tensor, " B"], caches: Sequence[LayerCache]) -> Float[Tensor, "B V"]:
        """Logits of the id after these, given what the caches hold; see `heed.language.routing.decode`."""
        x = self.blocks.step(self.tokens(ids[:, None], caches[0].length), caches)
        return self.head(self.unembed_map(x))[:, 0]


@provides("08-routing")
class RoutingEncoder(_Text):
    """Text to features: unmasked, queries and keys of their own.

    Args:
        config: with masked=False and share_qk=False.
    """

    Config = RoutingConfig

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__(config)
        if config.masked or config.share_qk:
            raise ValueError(f"masked={config.masked}, share_qk={config.share_qk}: an encoder needs both to be False")
        self.tokens = TokenEmbedding(config)
        self.blocks = RoutingStack(config)

    def forward(self, ids: Int[Tensor, "B T"], padding: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "B T D"]:
        """Features; `padding` is True where an id is none."""
        x, self.auxiliary_loss = self.blocks(self.tokens(ids), padding=padding)
        return x


@provides("08-routing")
@dataclass(frozen=True)
class RoutingSeq2SeqConfig(RoutingConfig):
    """The decoder's settings, and

    Args:
        source_vocab: ids of the encoder.
        encoder_layers: depth of the encoder; its other settings are the decoder's.
    """

    source_vocab: int = 256
    encoder_layers: int = 4


@provides("08-routing")
class RoutingSeq2Seq(_Text):
    """Encoder and decoder; the decoder's blocks attend to what the encoder gives, by routing heads.

    Args:
        config: see `RoutingSeq2SeqConfig`.
    """

    Config = RoutingSeq2SeqConfig

    def __init__(self, config: RoutingSeq2SeqConfig) -> None:
        super().__init__(config)
        c = config
        inside = dataclasses.replace(
            c, masked=False, share_qk=False, vocab=c.source_vocab, layers=c.encoder_layers,
            skip_first=min(c.skip_first, c.encoder_layers),
        )  # fmt: skip
        self.encoder = RoutingEncoder(inside)
        self.tokens = TokenEmbedding(config)
        self.blocks = RoutingStack(config, cross=True)
        self.head = nn.Linear(c.dim, c.vocab)
        init_linear(self.head)

    def forward(
        self,
        source: Int[Tensor, "B S"],
        ids: Int[Tensor, "B T"],
        padding: Bool[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the id after each of `ids`, given the source; `padding` is True where a source id is none."""
        memory = self.encoder(source, padding)
        x, loss = self.blocks(self.tokens(ids), memory, memory_padding=padding)
        self.auxiliary_loss = loss + self.encoder.auxiliary_loss
        return self.head(x)


@provides("08-routing")
def shift_right(ids: Int[Tensor, "B T"], start: int = 0) -> Int[Tensor, "B T"]:
    """The same ids one place later, after `start`, without the last."""
    return F.pad(ids[:, :-1], (1, 0), value=start)


register_models(RoutingTransformerLM, **NAMED)
