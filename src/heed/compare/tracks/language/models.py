"""What is trained: a decoder of transformers with a method applied to it, or a model of heed's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from heed.compare.tracks.language.settings import LanguageSettings
from heed.errors import MissingExtra
from heed.hosts.saving import save_whole
from heed.language.patterned import Patterned
from heed.methods import Method, apply

BYTES = 256


class TextModel(nn.Module):
    """A language model of bytes, as this track sees it."""

    def forward(self, ids: Int64[Tensor, "B M"]) -> tuple[Float[Tensor, "B N"], Float[Tensor, ""]]:
        """Losses of the bytes after the first, N = M - 1, in nats (NaN where nothing is predicted), and what is added to
        their mean in training."""
        raise NotImplementedError

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
        if method is not None:
            apply(self.model, method)

    def forward(self, ids: Int64[Tensor, "B M"]) -> tuple[Float[Tensor, "B N"], Float[Tensor, ""]]:
        logits = self.model(ids[:, :-1], use_cache=False).logits
        losses = nn.functional.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")
        return losses, losses.new_zeros(())

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


def _decoder(settings: LanguageSettings) -> nn.Module:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MissingExtra("transformers", "language") from error
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=settings.width,
        intermediate_size=settings.width * 8 // 3 // 8 * 8,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)
