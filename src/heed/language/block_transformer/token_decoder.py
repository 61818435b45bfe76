"""Token decoders: the tokens of one block, told what the blocks before it hold by a few vectors only (card 15).

    c = W_x e + b, as r tokens per embedding          (M, n, D_b) -> (M, r n, D_t)    M blocks, r expansion ratio
    prefix           [c_1 ... c_rn, t_1 ... t_{L-1}]      outputs r n - 1 ... predict t_1 ... t_L
    summation        [bos, t_1 ... t_{L-1}] + c           r n = L, MEGABYTE's way
    cross-attention  T5 decoder on [bos, t_1 ...], keys and values of its cross-attention from c
    logits = W_out h

Positions start at 0 in every block, and no block sees another one here. `start` gives what decodes block after block while
generating: memory of r n + L - 1 positions, reserved once and written over for every block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import MissingExtra
from heed.language.block_transformer.config import BlockTransformerConfig
from heed.language.block_transformer.neox import Stepper, neox_stack

if TYPE_CHECKING:
    from transformers import GPTNeoXModel
    from transformers.models.t5.modeling_t5 import T5Stack

PrefixPositions = Literal["trained", "authors"]


@dataclass
class TokenOutput:
    """What a token decoder says about M blocks.

    Attributes:
        content: (M, L) True where a token is predicted.
        logits: (C, V) for those, in order.
        losses: (C,) cross entropies, or None without labels.
    """

    content: Tensor
    logits: Tensor
    losses: Tensor | None


class BlockSteps(ABC):
    """Decodes one block after another, token by token: `begin(conditions)`, then L times `next(ids)`."""

    @abstractmethod
    def begin(self, conditions: Float[Tensor, "M c D"]) -> None:
        """Turn to new blocks; what is known of the last ones is forgotten."""

    @abstractmethod
    def next(self, ids: Int[Tensor, " M"]) -> Float[Tensor, "M V"]:
        """Logits of the next token, given the one before it (bos first)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Of keys and values."""


class TokenDecoder(nn.Module, ABC):
    """Common to all: expansion, checks, and logits for content alone."""

    def __init__(self, config: BlockTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.expansion_layer: nn.Conv1d | None = None
        if config.expansion_method is not None:
            self.expansion_layer = nn.Conv1d(config.block_width, config.ratio * config.token_width, 1)
            nn.init.normal_(self.expansion_layer.weight, std=config.block_width**-0.5)
            nn.init.zeros_(self.expansion_layer.bias)  # type: ignore[arg-type]

    @property
    @abstractmethod
    def table(self) -> nn.Embedding:
        """Token embeddings, V of width D_t."""

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """Of the stack."""

    @abstractmethod
    def states(
        self, conditions: Float[Tensor, "M c D"], ids: Int[Tensor, "M L"], mask: Int[Tensor, "M L"]
    ) -> Float[Tensor, "M L D"]:
        """States that predict t_1 ... t_L from [bos, t_1 ... t_{L-1}] and its mask."""

    @abstractmethod
    def head(self, states: Float[Tensor, "*M D"]) -> Float[Tensor, "*M V"]:
        """Logits."""

    @abstractmethod
    def start(self, prefix_positions: PrefixPositions = "trained") -> BlockSteps:
        """What decodes blocks token by token; see `heed.language.block_transformer.generate` for the positions."""

    def expand(self, embeddings: Float[Tensor, "M n D"]) -> Float[Tensor, "M c D2"]:
        """What the decoder is told: (M, n, D_b) to (M, r n, D_t)."""
        if self.expansion_layer is None:
            return embeddings.repeat_interleave(self.config.ratio, 1)
        x = F.linear(embeddings, self.expansion_layer.weight.squeeze(-1), self.expansion_layer.bias)
        return x.view(x.shape[0], self.config.conditions, self.config.token_width)

    def forward(
        self,
        embeddings: Float[Tensor, "M n D"],
        ids: Int[Tensor, "M T"],
        mask: Int[Tensor, "M T"] | None = None,
        labels: Int[Tensor, "M T"] | None = None,
    ) -> TokenOutput:
        """Predict the tokens of M blocks.

        Args:
            embeddings: (M, n, D_b), of the block decoder, or of the embedder for auto-encoding.
            ids: (M, 1 + L), [bos, t_1 ... t_L].
            mask: (M, 1 + L), 1 for tokens and for bos; None for tokens everywhere. A token counts as content where it is
                not padding or its mask is 1.
            labels: (M, 1 + L), -100 in front and wherever nothing is to be learnt.

        Raises:
            ValueError: shapes, a first token that is not bos, or a first label or mask that is wrong.
        """
        c = self.config
        mask = torch.ones_like(ids) if mask is None else mask
        wanted = (embeddings.shape[0], 1 + c.block_length)
        for name, value in (("ids", ids), ("mask", mask), ("labels", ids if labels is None else labels)):
            if value.shape != wanted:
                raise ValueError(f"{name} {tuple(value.shape)} must be {wanted}: bos and the tokens of each block")
        for name, value, first in (("ids", ids, c.start_id), ("mask", mask, 1), ("labels", labels, -100)):
            if value is not None and bool((value[:, 0] != first).any()):
                raise ValueError(
                    f"{name}[:, 0] must be {first} in every block, and holds {value[:, 0].unique().tolist()}"
                )
        content: Bool[Tensor, "M L"] = (ids[:, 1:] != c.pad_id) | (mask[:, 1:] == 1)
        if len(ids):
            states = self.states(self.expand(embeddings), ids[:, :-1], mask[:, :-1])
        else:  # which the library's layers do not take
            states = embeddings.new_zeros(0, c.block_length, c.token_width)
        logits = self.head(states[content])
        losses = None
        if labels is not None:
            losses = F.cross_entropy(logits.float(), labels[:, 1:][content].long(), reduction="none")
        return TokenOutput(content, logits, losses)


@provides("15-block-transformer")
class NeoXTokenDecoder(TokenDecoder):
    """A GPT-NeoX stack with prefix tokens or summation."""

    gpt_neox: GPTNeoXModel

    def __init__(self, config: BlockTransformerConfig) -> None:
        super().__init__(config)
        self.gpt_neox = neox_stack(
            config.vocab_size,
            config.token_width,
            config.token_layers,
            config.heads("token"),
            config.token_rotary_pct,
            config.dropout,
        )
        self.embed_out = nn.Linear(config.token_width, config.vocab_size, bias=False)
        nn.init.normal_(self.embed_out.weight, std=0.02)

    @property
    def table(self) -> nn.Embedding:
        return self.gpt_neox.embed_in  # type: ignore[return-value]

    @property
    def layers(self) -> nn.ModuleList:
        return self.gpt_neox.layers

    def head(self, states: Float[Tensor, "*M D"]) -> Float[Tensor, "*M V"]:
        return self.embed_out(states)

    def states(
        self, conditions: Float[Tensor, "M c D"], ids: Int[Tensor, "M L"], mask: Int[Tensor, "M L"]
    ) -> Float[Tensor, "M L D"]:
        x = self.table(ids)
        if self.config.strategy == "prefix":
            x = torch.cat([conditions, x[:, 1:]], 1)
            mask = F.pad(mask[:, 1:], (conditions.shape[1], 0), value=1)
        else:
            x = x + conditions
        x = self.gpt_neox(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
        return x[:, -ids.shape[1] :]

    def start(self, prefix_positions: PrefixPositions = "trained") -> BlockSteps:
        return _NeoXSteps(self, prefix_positions)


class _NeoXSteps(BlockSteps):
    def __init__(self, decoder: NeoXTokenDecoder, prefix_positions: PrefixPositions) -> None:
        c = decoder.config
        self.decoder, self.prefix = decoder, c.strategy == "prefix"
        self.authors = self.prefix and prefix_positions == "authors"
        positions = c.block_length + (c.conditions - 1 if self.prefix else 0)
        self.stepper = Stepper(decoder.gpt_neox, positions)

    def begin(self, conditions: Float[Tensor, "M c D"]) -> None:
        self.stepper.restart()
        self.conditions, self.place = conditions, 0

    def next(self, ids: Int[Tensor, " M"]) -> Float[Tensor, "M V"]:
        if self.prefix and self.place == 0:
            x = self.conditions
        else:
            x = self.decoder.table(ids)[:, None]
            if not self.prefix:
                x = x + self.conditions[:, self.place, None]
        states = self.stepper(x, place=self.place if self.authors else None)
        self.place += 1
        return self.decoder.head(states[:, -1])

    @property
    def nbytes(self) -> int:
        return self.stepper.cache.nbytes


@provides("15-block-transformer")
class T5TokenDecoder(TokenDecoder):
    """A T5 decoder whose cross-attention sees the expanded block embedding."""

    decoder: T5Stack

    def __init__(self, config: BlockTransformerConfig) -> None:
        super().__init__(config)
        try:
            from transformers import T5Config
            from transformers.models.t5.modeling_t5 import T5Stack
        except ImportError as error:
            raise MissingExtra("transformers", "language") from error
        t5 = T5Config(
            vocab_size=config.vocab_size,
            d_model=config.token_width,
            d_kv=config.token_width // config.heads("token"),
            d_ff=4 * config.token_width,
            num_layers=config.token_layers,
            num_heads=config.heads("token"),
            dropout_rate=config.dropout,
            is_decoder=True,
            is_encoder_decoder=True,
        )
        self.decoder = T5Stack(t5)
        # One table under one name, which T5 has under three.
        self.decoder.embed_tokens = None  # type: ignore[assignment]
        self.shared = nn.Embedding(config.vocab_size, config.token_width)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.token_width, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight)

    @property
    def table(self) -> nn.Embedding:
        return self.shared

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.block

    def head(self, states: Float[Tensor, "*M D"]) -> Float[Tensor, "*M V"]:
        if self.lm_head is not None:
            return self.lm_head(states)
        return F.linear(states * self.config.token_width**-0.5, self.shared.weight)

    def states(
        self, conditions: Float[Tensor, "M c D"], ids: Int[Tensor, "M L"], mask: Int[Tensor, "M L"]
    ) -> Float[Tensor, "M L D"]:
        return self.decoder(
            inputs_embeds=self.shared(ids), attention_mask=mask, encoder_hidden_states=conditions, use_cache=False
        ).last_hidden_state

    def start(self, prefix_positions: PrefixPositions = "trained") -> BlockSteps:
        return _T5Steps(self)


class _T5Steps(BlockSteps):
    def __init__(self, decoder: T5TokenDecoder) -> None:
        from transformers.cache_utils import EncoderDecoderCache

        from heed.language.block_transformer.reserved import ReservedCache

        c = decoder.config
        self.decoder = decoder
        own, cross = (ReservedCache(c.token_layers, size) for size in (c.block_length, c.conditions))
        self.cache = EncoderDecoderCache(own, cross)

    def begin(self, conditions: Float[Tensor, "M c D"]) -> None:
        self.cache.reset()
        self.cache.is_updated = dict.fromkeys(self.cache.is_updated, False)
        self.conditions = conditions

    def next(self, ids: Int[Tensor, " M"]) -> Float[Tensor, "M V"]:
        states = self.decoder.decoder(
            inputs_embeds=self.decoder.shared(ids[:, None]),
            encoder_hidden_states=self.conditions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return self.decoder.head(states[:, -1])

    @property
    def nbytes(self) -> int:
        return self.cache.self_attention_cache.nbytes + self.cache.cross_attention_cache.nbytes  # type: ignore[attr-defined]


def token_decoder(config: BlockTransformerConfig) -> TokenDecoder:
    """The token decoder that the strategy asks for."""
    return T5TokenDecoder(config) if config.strategy == "cross_attention" else NeoXTokenDecoder(config)
