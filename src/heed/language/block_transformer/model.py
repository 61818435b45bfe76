"""Block Transformer: attention between blocks of L tokens below, inside a block above (card 15).

    e_i = embedder(t of block i)                                     (B, N, n, D_b)
    h = block decoder(e), causal over blocks                         (B, N n, D_b)
    p(t_j of block i + 1) = token decoder(t_1 ... t_{j-1} of it | h_i)    i = 0 ... N - 2
    loss = mean cross entropy of the tokens + w_b block loss + w_a auto-encoding loss

The first block is never predicted and the last state never used. The token decoder has no attention across blocks, so all
that later tokens know of a block goes through its embedding, and the KV cache has a position per block instead of per token.
Ho et al., "Block Transformer: Global-to-Local Language Modeling for Fast Inference", NeurIPS 2024, arXiv 2406.02657.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heed.catalogue import provides
from heed.language.block_transformer import generate as generation
from heed.language.block_transformer.block_decoder import BlockDecoder
from heed.language.block_transformer.config import CONFIGS, BlockTransformerConfig
from heed.language.block_transformer.embedders import EMBEDDERS
from heed.language.block_transformer.losses import block_loss, by_position
from heed.language.block_transformer.packing import to_blocks
from heed.language.block_transformer.token_decoder import TokenOutput, token_decoder
from heed.models import HeedModel, register_models

# Buffers that older versions of transformers wrote into checkpoints.
_BUFFERS = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq", "embeddings.position_ids")
_TIED = tuple(f"token_decoder.{name}.weight" for name in ("shared", "decoder.embed_tokens", "lm_head"))


@provides("15-block-transformer")
@dataclass
class BlockTransformerOutput:
    """What `BlockTransformer` returns.

    Attributes:
        block_embeddings: (B, N, n, D_b).
        block_hidden: (B, N n, D_b), after the final norm.
        logits: (B, N - 1, L, V) of blocks 1 ... N - 1; None with labels. Zeros where nothing is predicted in a block, and
            blocks of padding are filled with the value eos_id (0 without one), as in the authors' code.
        loss: sum of the three below; None without labels, as are they.
        token_loss: mean cross entropy of the predicted tokens.
        block_loss, auto_encoding_loss: with their weights; None where these are off.
        losses: (B, N - 1, L) cross entropies, NaN where nothing is predicted.
    """

    block_embeddings: Tensor
    block_hidden: Tensor
    logits: Tensor | None = None
    loss: Tensor | None = None
    token_loss: Tensor | None = None
    block_loss: Tensor | None = None
    auto_encoding_loss: Tensor | None = None
    losses: Tensor | None = None

    @property
    def loss_by_position(self) -> Tensor | None:
        """(L,) float64, the mean loss of each position in the block."""
        return None if self.losses is None else by_position(self.losses)


@provides("15-block-transformer")
class BlockTransformer(HeedModel):
    """A language model over blocks of tokens; see the module for the equations.

        model = heed.create_model("block_main_b4_5")
        loss = model(ids, labels=ids).loss                      # ids (B, N, L)
        losses = model.token_losses(text)                       # text (B, T), any T
        model.generate(prompt, max_new_tokens=64)               # prompt (B, P), any P

    Names begin with "block_": the paper's main models, MEGABYTE-like models, ablations, and a small one for bytes. The parts
    are `embedder`, `block_decoder` and `token_decoder`; names in the state dict are the authors'. Needs transformers.
    """

    Config = BlockTransformerConfig
    config: BlockTransformerConfig

    def __init__(self, config: BlockTransformerConfig) -> None:
        super().__init__(config)
        self.embedder = EMBEDDERS[config.embedder](config)
        self.block_decoder = BlockDecoder(config)
        self.token_decoder = token_decoder(config)

    def forward(
        self,
        ids: Int[Tensor, "B N L"],
        attention_mask: Int[Tensor, "B N L"] | None = None,
        block_mask: Int[Tensor, "B N"] | None = None,
        labels: Int[Tensor, "B N L"] | None = None,
    ) -> BlockTransformerOutput:
        """Predict every block but the first from those before it.

        Args:
            ids: (B, N, L), see `heed.language.block_transformer.packing` for how to get there.
            attention_mask: (B, N, L), 0 for padding; None for none.
            block_mask: (B, N), 0 for blocks of padding, which are neither seen nor predicted; None for those whose
                attention_mask is 0 throughout.
            labels: (B, N, L), usually the ids; -100 where nothing is to be learnt. Gives losses in the place of logits.

        Raises:
            ValueError: shapes that do not agree, or labels with nothing to predict.
        """
        self._check(ids, attention_mask, block_mask, labels)
        if block_mask is None and attention_mask is not None:
            block_mask = attention_mask.any(-1).long()
        embeddings = self.embedder(ids, attention_mask)
        hidden = self.block_decoder(embeddings, block_mask)
        out = BlockTransformerOutput(embeddings, hidden)
        before = hidden.unflatten(1, embeddings.shape[1:3])[:, :-1]
        if labels is None:
            out.logits = self._logits(before, ids, attention_mask, block_mask)
            return out

        losses, wanted = self._losses(before, ids, attention_mask, block_mask, labels)
        if not bool(wanted.any()):
            raise ValueError(
                f"ids {tuple(ids.shape)} leave nothing to predict: the first block never is, and the others hold only "
                "padding or labels of -100. Give more blocks"
            )
        out.losses = losses
        out.loss = out.token_loss = losses[wanted].mean()
        c = self.config
        if c.block_loss is not None:
            out.block_loss = c.block_loss_weight * block_loss(c.block_loss, hidden, embeddings, block_mask)
            out.loss = out.loss + out.block_loss
        if c.auto_encoding_weight:
            own, _ = self._losses(embeddings[:, 1:], ids, attention_mask, block_mask, labels)
            out.auto_encoding_loss = c.auto_encoding_weight * own[wanted].mean()
            out.loss = out.loss + out.auto_encoding_loss
        return out

    def token_losses(
        self,
        ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"] | None = None,
        *,
        padding: int | None = None,
    ) -> Float[Tensor, "B T"]:
        """Negative log-likelihoods in nats of plain token ids, of any length, with gradients: train on their `nanmean`.

            losses = model.token_losses(ids, padding=random.randrange(L))     # training
            model.token_losses(ids).nanmean()                                 # scoring: every token but the first

        Args:
            ids: (B, T).
            attention_mask: (B, T), 0 for padding, best on the left; None for none.
            padding: pad tokens put in front, which shift where blocks begin: 0 to L - 1. The first L - padding tokens are
                in the first block and not predicted. Default L - 1: all but the first token are, as in other language
                models. A model should be trained with random `padding` (or `pack_documents`) to expect that.

        Returns:
            (B, T), NaN where nothing is predicted: the first block of each row, and padding.

        Raises:
            ValueError: padding out of range, shapes that do not agree, or no more than one block.
        """
        length = self.config.block_length
        padding = length - 1 if padding is None else padding
        if not 0 <= padding < length:
            raise ValueError(f"padding={padding} must be 0 to {length - 1}, one less than a block")
        blocks = to_blocks(ids, attention_mask, length, padding, self.config.pad_id)
        labels = blocks.ids.masked_fill(blocks.mask == 0, -100)
        # A block after blocks of padding is the first of its row.
        follows = blocks.block_mask[:, :-1].cummax(1).values[..., None]
        labels[:, 1:] = labels[:, 1:].masked_fill(follows == 0, -100)
        out = self(blocks.ids, blocks.mask if attention_mask is not None or padding else None, None, labels)
        losses = torch.cat([out.losses.new_full((len(ids), length), torch.nan), out.losses.flatten(1)], 1)
        return losses[:, padding : padding + ids.shape[1]]

    def generate(
        self,
        ids: Int[Tensor, "B P"],
        attention_mask: Int[Tensor, "B P"] | None = None,
        **settings: Any,
    ) -> Int[Tensor, "B T"]:
        """Continue prompts of any length; see `heed.language.block_transformer.generate.generate` for the settings."""
        return generation.generate(self, ids, attention_mask, **settings)

    def layer_parameters(self) -> int:
        """Parameters in the two stacks of layers, what the paper calls non-embedding parameters."""
        stacks = self.block_decoder.gpt_neox.layers, self.token_decoder.layers
        return sum(p.numel() for stack in stacks for p in stack.parameters())

    def used_parameters(self) -> int:
        """All parameters but the block decoder's token table, which is there for the authors' checkpoints alone."""
        return sum(p.numel() for p in self.parameters()) - self.block_decoder.gpt_neox.embed_in.weight.numel()  # type: ignore[operator]

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        return None if key.endswith(_BUFFERS) else key

    def load_authors(self, weights: dict[str, Tensor], source: str = "the authors' weights") -> Self:
        """Load a state dict that uses the authors' names; the copies of a tied table are one here.

        Raises:
            ValueError: weights that do not fit, or copies that differ.
        """
        if self.config.strategy == "cross_attention":
            names = _TIED if self.config.tie_word_embeddings else _TIED[:2]
            copies = [weights[name] for name in names if name in weights]
            if any(not torch.equal(copy, copies[0]) for copy in copies):
                raise ValueError(f"{source}: {', '.join(names)} differ, but are one table in this model")
            weights = {key: value for key, value in weights.items() if key not in names}
            if copies:
                weights[_TIED[0]] = copies[0]
        return super().load_authors(weights, source)

    def _decode(
        self,
        embeddings: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        block_mask: Tensor | None,
        labels: Tensor | None,
    ) -> tuple[TokenOutput, Tensor]:
        """The token decoder on blocks 1 ... N - 1 without those of padding; also (B, N - 1) which blocks these are."""
        shape = ids[:, 1:].shape[:2]
        kept = torch.ones(shape, dtype=torch.bool, device=ids.device)
        if block_mask is not None:
            kept = block_mask[:, 1:] != 0

        def blocks(x: Tensor, first: int) -> Tensor:
            x = x[:, 1:][kept]
            return torch.cat([x.new_full((len(x), 1), first), x], 1)

        out = self.token_decoder(
            embeddings[kept],
            blocks(ids, self.config.start_id),
            None if mask is None else blocks(mask, 1),
            None if labels is None else blocks(labels, -100),
        )
        return out, kept

    def _logits(self, before: Tensor, ids: Tensor, mask: Tensor | None, block_mask: Tensor | None) -> Tensor:
        out, kept = self._decode(before, ids, mask, block_mask, None)
        inside = out.logits.new_zeros(*out.content.shape, out.logits.shape[-1])
        inside[out.content] = out.logits
        full = inside.new_full((*kept.shape, *inside.shape[1:]), self.config.eos_id or 0)
        full[kept] = inside
        return full

    def _losses(
        self, before: Tensor, ids: Tensor, mask: Tensor | None, block_mask: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross entropies (B, N - 1, L), NaN where nothing is predicted, and where something is."""
        out, kept = self._decode(before, ids, mask, block_mask, labels)
        wanted = kept[..., None].expand(*kept.shape, ids.shape[2]).clone()
        wanted[kept] = out.content
        full = torch.full(wanted.shape, torch.nan, dtype=torch.float32, device=ids.device)
        full[wanted] = out.losses  # type: ignore[assignment]
        wanted = wanted & (labels[:, 1:] != -100)
        return full.where(wanted, torch.nan), wanted

    def _check(self, ids: Tensor, mask: Tensor | None, block_mask: Tensor | None, labels: Tensor | None) -> None:
        length = self.config.block_length
        if ids.ndim != 3 or ids.shape[2] != length:
            raise ValueError(
                f"ids {tuple(ids.shape)} must be (B, N, {length}), whole blocks of block_length={length}; "
                "heed.language.block_transformer.to_blocks makes them, and token_losses takes plain ids"
            )
        for name, value, shape in (
            ("attention_mask", mask, ids.shape),
            ("labels", labels, ids.shape),
            ("block_mask", block_mask, ids.shape[:2]),
        ):
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} {tuple(value.shape)} must be {tuple(shape)} for ids {tuple(ids.shape)}")


register_models(BlockTransformer, **CONFIGS)
