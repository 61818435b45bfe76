"""A vision-language model of transformers as a host: its language part, the decoder layers there, its image tokens.

The language part is the module whose attention is steered: `model.language_model` of LLaVA, LLaVA-NeXT and Qwen2-VL,
the decoder inside `language_model` of InstructBLIP. A language model without a picture part is a host as well, for
those who put image features into `inputs_embeds` themselves; it needs to be told where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from heed.hosts.attach import is_transformers

# What configurations call the ids that stand in a prompt for image features; frames of a video count as images.
_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass(frozen=True, eq=False)
class VisionHost:
    """The parts of a host that steering needs.

    Args:
        model: what was given.
        language: the decoder whose attention is steered, a transformers model.
        layers: its decoder layers, in order.
        embedding: its embedding of token ids.
        image_ids: the ids of image tokens; empty when the configuration names none.
    """

    model: nn.Module
    language: Any
    layers: nn.ModuleList
    embedding: nn.Module
    image_ids: tuple[int, ...]

    @property
    def hidden_size(self) -> int:
        return self.language.config.hidden_size


def read_host(model: nn.Module) -> VisionHost:
    """Find the parts of a host.

    Args:
        model: a transformers model, such as `LlavaForConditionalGeneration`.

    Raises:
        TypeError: not a transformers model, or one whose image tokens are not in a decoder's sequence (its language
            part is an encoder-decoder, or sees the image by cross-attention).
    """
    name = type(model).__name__
    if not is_transformers(model):
        raise TypeError(
            f"{name} is not a model of transformers; steering needs one, such as LlavaForConditionalGeneration"
        )
    language: Any = model
    while (inner := language.get_decoder()) is not language:
        language = inner
    if language.config.is_encoder_decoder:
        raise TypeError(
            f"{name} has an encoder-decoder for text; steering needs a decoder whose sequence holds the image"
        )
    if any("CrossAttention" in type(part).__name__ for part in language.modules()):
        raise TypeError(f"{name} sees the image by cross-attention; steering needs image tokens among the text")
    found = (getattr(model.config, name, None) for name in _IDS)
    ids = tuple(dict.fromkeys(number for number in found if isinstance(number, int)))
    return VisionHost(model, language, _decoder_layers(language), language.get_input_embeddings(), ids)


def _decoder_layers(language: nn.Module) -> nn.ModuleList:
    """The first list of modules that each have attention."""
    for part in language.modules():
        if isinstance(part, nn.ModuleList) and len(part) and all(map(_has_attention, part)):
            return part
    raise TypeError(f"{type(language).__name__} has no list of decoder layers with attention that heed can find")


def _has_attention(layer: nn.Module) -> bool:
    return any("Attention" in type(part).__name__ for part in layer.modules())
