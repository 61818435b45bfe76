"""What is trained: a decoder of transformers with a method applied to it, or a model of heed's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from heed.compare.tracks.language.settings import LanguageSettings
from heed.errors import MissingExtra
from heed.hosts.saving import save_whole
from heed.language.block_transformer import BlockTransformer, BlockTransformerConfig
from heed.language.patterned import Patterned
from heed.language.routing import RoutingConfig, RoutingTransformerLM
from heed.language.subsampled import SubsamplingState
from heed.methods import Method, apply

BYTES = 256
DENSE = 0.1  # share of the training at its end in which subsampled attention is dense


_LOAD = 'import heed\n\nmodel = heed.from_pretrained("{}")'


class TextModel(nn.Module):
    """A language model of bytes, as this track sees it."""

    def forward(self, ids: Int64[Tensor, "B M"]) -> tuple[Float[Tensor, "B N"], Float[Tensor, ""]]:
        """Losses of the bytes after the first, N = M - 1, in nats (NaN where nothing is predicted), and what is added to
        their mean in training."""
        raise NotImplementedError

    def at(self, done: float) -> None:
        """Told before every step which share of the training is done."""

    def save(self, folder: Path) -> None:
        """Write the trained model."""
        raise NotImplementedError

    def recipe(self, path: str) -> str:
        """Lines of Python that load it again."""
        raise NotImplementedError


class Hosted(TextModel):
    """A small Llama, with a method applied to it for as long as it lives.

    Args:
        settings: its size.
        method: None for the decoder as it is.
    """

    def __init__(self, settings: LanguageSettings, method: Method | None) -> None:
        super().__init__()
        self.model: Any = _decoder(settings)
        self.method = method
        self.handle = None if method is None else apply(self.model, method)

    def forward(self, ids: Int64[Tensor, "B M"]) -> tuple[Float[Tensor, "B N"], Float[Tensor, ""]]:
        losses = _losses(self.model(ids[:, :-1], use_cache=False).logits, ids)
        return losses, losses.new_zeros(())

    def at(self, done: float) -> None:
        if self.handle is not None and isinstance(self.handle.state, SubsamplingState):
            self.handle.state.dense = done >= 1 - DENSE

    def save(self, folder: Path) -> None:
        save_whole(folder, self.model)

    def recipe(self, path: str) -> str:
        lines = ["import transformers", "", f'model = transformers.AutoModelForCausalLM.from_pretrained("{path}")']
        if self.method is not None:
            patterns = ["from heed.patterns import *"] if isinstance(self.method, Patterned) else []
            kind = type(self.method)
            imports = ["import heed", f"from {kind.__module__} import {kind.__name__}", *patterns]
            lines = [*imports, *lines, f"heed.apply(model, {self.method!r})"]
        return "\n".join(lines)


class Blocks(TextModel):
    """A Block Transformer with half the layers over blocks and half within them."""

    def __init__(self, settings: LanguageSettings) -> None:
        super().__init__()
        half = max(1, settings.layers // 2)
        self.model = BlockTransformer(
            BlockTransformerConfig(
                vocab_size=BYTES,
                embedder_width=settings.width // 4,
                block_layers=half,
                block_width=settings.width,
                block_heads=settings.heads,
                token_layers=max(1, settings.layers - half),
                token_width=settings.width,
                token_heads=settings.heads,
                bos_id=0,
                eos_id=None,
            )
        )

    def forward(self, ids: Int64[Tensor, "B M"]) -> tuple[Float[Tensor, "B N"], Float[Tensor, ""]]:
        # Where blocks begin is drawn in training, so that the model is ready for text of any length.
        length = self.model.config.block_length
        padding = int(torch.randint(length, ())) if self.training else None
        losses = self.model.token_losses(ids, padding=padding)[:, 1:]
        return losses, losses.new_zeros(())

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def recipe(self, path: str) -> str:
        return _LOAD.format(path)


class Routed(TextModel):
    """A Routing Transformer with half of its heads local and half routed, and local ones alone in its first layer."""

    def __init__(self, settings: LanguageSettings) -> None:
        super().__init__()
        some = settings.context // 8
        routed = settings.heads // 2
        self.model = RoutingTransformerLM(
            RoutingConfig(
                vocab=BYTES,
                dim=settings.width,
                ffn_dim=_feed_forward(settings),
                layers=settings.layers,
                length=settings.context,
                cluster_heads=routed,
                local_heads=settings.heads - routed,
                clusters=8,
                window=some,
                block=(some,),
                max_relative=some + 1,
                skip_first=1,
                initial_count=1.0,
                fix_count=True,
                decay=0.9,
                dropout=0.0,
            )
        )

    def forward(self, ids: Int64[Tensor, "B M"]) -> tuple[Float[Tensor, "B N"], Float[Tensor, ""]]:
        return _losses(self.model(ids[:, :-1]), ids), self.model.auxiliary_loss

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def recipe(self, path: str) -> str:
        return _LOAD.format(path)


def _feed_forward(settings: LanguageSettings) -> int:
    """Hidden width of gated feed-forward networks: three maps with the weights of two of four times the width."""
    return settings.width * 8 // 3 // 8 * 8


def _losses(logits: Float[Tensor, "B N V"], ids: Int64[Tensor, "B M"]) -> Float[Tensor, "B N"]:
    return nn.functional.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")


def _decoder(settings: LanguageSettings) -> nn.Module:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MissingExtra("transformers", "language") from error
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=settings.width,
        intermediate_size=_feed_forward(settings),
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)
