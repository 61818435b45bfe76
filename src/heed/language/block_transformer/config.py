"""Settings of Block Transformers, what is derived from them, and the configurations of the paper (card 15).

    intermediate = 4 width,   head width = 32 | 64 | 128 for width <= 256 | <= 1536 | above
    concat:  D_b = (L / n) e     L tokens of a block, n embeddings per block, e width of the embedder's table

Ho et al., "Block Transformer: Global-to-Local Language Modeling for Fast Inference", NeurIPS 2024, arXiv 2406.02657.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from heed.catalogue import provides
from heed.errors import unknown

Embedding = Literal["lookup", "roberta", "roberta_cls"]
Projection = Literal["concat", "projection_layer"]
Strategy = Literal["prefix", "summation", "cross_attention"]
Expansion = Literal["expansion_layer"]
BlockLoss = Literal["mse", "contrastive"]


def default_heads(width: int) -> int:
    """Heads of a stack of this width, as in the authors' configurations."""
    return max(1, width // (32 if width <= 256 else 64 if width <= 1536 else 128))


@provides("15-block-transformer")
@dataclass(frozen=True)
class BlockTransformerConfig:
    """Settings of `BlockTransformer`.

    Args:
        vocab_size: number of token ids.
        block_length: L, tokens of a block.
        n_embedding_tokens: n, embeddings per block; divides block_length. Generation needs 1.
        embedder: "lookup" (a table), "roberta" (an encoder over each block) or "roberta_cls" (the same, with CLS tokens).
        embedder_width: e, of the table or of the encoder.
        embedder_layers, embedder_heads: of the encoder; None for the heads that `default_heads` gives.
        embedder_positions: rows of the encoder's table of positions.
        n_cls: CLS tokens of "roberta_cls".
        projection: from the embedder's tokens to block embeddings: "concat", or "projection_layer", a strided convolution.
        block_layers, block_width, block_heads: of the block decoder.
        token_layers, token_width, token_heads: of the token decoder.
        strategy: how the token decoder is told the block: "prefix" tokens, "summation" or "cross_attention" (a T5 decoder).
        expansion_method: "expansion_layer", or None to repeat the block embedding, which needs block_width == token_width.
        expansion_ratio: r, tokens made of each block embedding. Needed by "prefix"; L/n for "summation" and L for
            "cross_attention" where None.
        block_loss: None, "mse" or "contrastive", between predicted and true block embeddings.
        block_loss_weight: its weight.
        auto_encoding_weight: weight of decoding a block from its own embedding; 0 for not at all.
        block_rotary_pct, token_rotary_pct: fraction of a head's features that rotate.
        dropout: everywhere in the three stacks.
        tie_word_embeddings: of the T5 token decoder.
        pad_id, bos_id, eos_id: of the tokenizer; with bos_id None, eos_id begins a block. eos_id None: no end of text.
        generation_pad_id: fills a generated block after its eos; 1 for Pythia's tokenizer.

    Raises:
        ValueError: settings that do not fit together.
    """

    vocab_size: int = 50304
    block_length: int = 4
    n_embedding_tokens: int = 1
    embedder: Embedding = "lookup"
    embedder_width: int = 64
    embedder_layers: int = 3
    embedder_heads: int | None = None
    embedder_positions: int = 514
    n_cls: int = 3
    projection: Projection = "concat"
    block_layers: int = 3
    block_width: int = 256
    block_heads: int | None = None
    token_layers: int = 3
    token_width: int = 256
    token_heads: int | None = None
    strategy: Strategy = "prefix"
    expansion_method: Expansion | None = "expansion_layer"
    expansion_ratio: int | None = 2
    block_loss: BlockLoss | None = None
    block_loss_weight: float = 1.0
    auto_encoding_weight: float = 0.0
    block_rotary_pct: float = 0.25
    token_rotary_pct: float = 0.25
    dropout: float = 0.0
    tie_word_embeddings: bool = True
    pad_id: int = 0
    bos_id: int | None = None
    eos_id: int | None = 0
    generation_pad_id: int = 1

    def __post_init__(self) -> None:
        for name, kinds in _CHOICES.items():
            if getattr(self, name) not in kinds:
                raise ValueError(unknown(name, getattr(self, name), map(str, kinds)))
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        tokens, n = self.embedded_tokens, self.n_embedding_tokens
        if self.block_length % n or tokens % n:
            raise ValueError(
                f"n_embedding_tokens={n} must divide {tokens} embedded and {self.block_length} block tokens"
            )
        if self.projection == "concat" and self.block_width != tokens // n * self.embedder_width:
            raise ValueError(
                f"concat makes block embeddings of {tokens}/{n} * embedder_width={self.embedder_width} = "
                f"{tokens // n * self.embedder_width}, not block_width={self.block_width}; set them equal or use "
                'projection="projection_layer"'
            )
        if self.strategy == "prefix" and self.expansion_ratio is None:
            raise ValueError("strategy='prefix' needs expansion_ratio, e.g. 2")
        if self.ratio < 1:
            raise ValueError(f"expansion_ratio={self.expansion_ratio} must be at least 1")
        if self.strategy == "summation" and self.ratio * n != self.block_length:
            raise ValueError(
                f"summation needs one expanded embedding per token: expansion_ratio={self.ratio} * "
                f"n_embedding_tokens={n} must be block_length={self.block_length}"
            )
        if self.expansion_method is None and self.block_width != self.token_width:
            raise ValueError(
                f"expansion_method=None repeats block embeddings of width {self.block_width}, and the token decoder has "
                f"width {self.token_width}; set them equal or use 'expansion_layer'"
            )
        for part in ("embedder", "block", "token"):
            width, heads = getattr(self, f"{part}_width"), self.heads(part)
            if (part != "embedder" or self.embedder != "lookup") and (heads < 1 or width % heads):
                raise ValueError(f"{part}_width={width} does not divide into {part}_heads={heads}")
        for part in ("block", "token")[: 1 if self.strategy == "cross_attention" else 2]:
            head, rate = getattr(self, f"{part}_width") // self.heads(part), getattr(self, f"{part}_rotary_pct")
            if int(head * rate) < 2 or int(head * rate) % 2:
                raise ValueError(
                    f"{part}_rotary_pct={rate} of a head of {head} features must be an even number of them"
                )
        if self.embedder_positions < self.block_length + self.n_cls + 2:
            raise ValueError(f"embedder_positions={self.embedder_positions} must be block_length + n_cls + 2 or more")
        for name in ("pad_id", "bos_id", "eos_id", "generation_pad_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(f"{name}={value} is not an id of a vocabulary of {self.vocab_size}")

    def heads(self, part: Literal["embedder", "block", "token"] | str) -> int:
        """Heads of the "embedder", "block" or "token" stack."""
        given = getattr(self, f"{part}_heads")
        return default_heads(getattr(self, f"{part}_width")) if given is None else given

    @property
    def embedded_tokens(self) -> int:
        """Tokens of a block that the projection sees."""
        return self.n_cls if self.embedder == "roberta_cls" else self.block_length

    @property
    def ratio(self) -> int:
        """r, with the default of the strategy."""
        if self.expansion_ratio is not None:
            return self.expansion_ratio
        return self.block_length // (self.n_embedding_tokens if self.strategy == "summation" else 1)

    @property
    def conditions(self) -> int:
        """r n, tokens that the token decoder is given for a block."""
        return self.ratio * self.n_embedding_tokens

    @property
    def start_id(self) -> int:
        """What stands before the first token of a block."""
        return next(i for i in (self.bos_id, self.eos_id, self.pad_id) if i is not None)


_CHOICES = {
    "embedder": get_args(Embedding),
    "projection": get_args(Projection),
    "strategy": get_args(Strategy),
    "expansion_method": (None, *get_args(Expansion)),
    "block_loss": (None, *get_args(BlockLoss)),
}
_COUNTS = (
    "vocab_size", "block_length", "n_embedding_tokens", "embedder_width", "embedder_layers", "n_cls", "block_layers",
    "block_width", "token_layers", "token_width",
)  # fmt: skip


def _main(layers: int, width: int, **other: Any) -> BlockTransformerConfig:
    """Both stacks alike, table of width/L, prefix of 2."""
    settings: dict[str, Any] = {"embedder_width": width // 4, "block_layers": layers, "block_width": width}
    settings |= {"token_layers": layers, "token_width": width}
    return BlockTransformerConfig(**(settings | other))


def _megabyte(block: tuple[int, int], token: tuple[int, int]) -> BlockTransformerConfig:
    """MEGABYTE's proportions: a larger block decoder, a smaller token decoder told by summation."""
    return _main(*block, token_layers=token[0], token_width=token[1], strategy="summation", expansion_ratio=4)


# The ablations keep the 85M model and change one part. The projection of the RoBERTa embedder, the name and the table
# width of the model with blocks of one token, and the byte model are heed's own.
CONFIGS: dict[str, BlockTransformerConfig] = {
    "block_main_b4_5": _main(3, 256),
    "block_main_b4_19": _main(3, 512),
    "block_main_b4_85": _main(6, 768),
    "block_main_b4_300": _main(12, 1024),
    "block_main_b4_800": _main(8, 2048),
    "block_main_b4_1.2b": _main(12, 2048),
    "block_megabyte_b4_5": _megabyte((5, 256), (4, 128)),
    "block_megabyte_b4_19": _megabyte((5, 512), (4, 256)),
    "block_megabyte_b4_85": _megabyte((11, 768), (4, 512)),
    "block_ablation_b4_85_roberta": _main(
        6, 768, embedder="roberta", embedder_width=256, projection="projection_layer"
    ),
    "block_ablation_b4_85_cls": _main(6, 768, embedder="roberta_cls", embedder_width=256),
    "block_ablation_b4_85_prefix1": _main(6, 768, expansion_ratio=1),
    "block_ablation_b4_85_summation": _main(6, 768, strategy="summation", expansion_ratio=4),
    "block_ablation_b4_85_cross_attention": _main(6, 768, strategy="cross_attention", expansion_ratio=None),
    "block_main_b1_85": _main(6, 768, block_length=1, embedder_width=768, expansion_ratio=1),
    "block_bytes_b4": _main(3, 128, vocab_size=256, eos_id=None, generation_pad_id=0),
}
# Layers and width of the Pythia shapes that the paper compares with; see `heed.language.block_transformer.vanilla`.
VANILLA: dict[str, tuple[int, int]] = {"31m": (6, 256), "70m": (6, 512), "160m": (12, 768), "410m": (24, 1024)}
