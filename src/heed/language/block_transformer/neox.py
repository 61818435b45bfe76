"""GPT-NeoX stacks of transformers: how they are built here, masked, and stepped through while generating (card 15).

    x <- x + attention(LN1 x) + MLP(LN2 x)         x (B, T, D), rotation of the first quarter of each head's features

`Stepper` runs the library's layers on new positions alone, over keys and values in memory reserved once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from heed.catalogue import provides
from heed.errors import MissingExtra, unknown
from heed.language.block_transformer.config import VANILLA, default_heads

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel


def neox_config(vocab_size: int, width: int, layers: int, **other: Any) -> GPTNeoXConfig:
    """A configuration of Pythia's kind; `other` are settings of GPTNeoXConfig."""
    try:
        from transformers import GPTNeoXConfig
    except ImportError as error:
        raise MissingExtra("transformers", "language") from error
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": default_heads(width),
        "intermediate_size": 4 * width,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "attn_implementation": "sdpa",
    }
    return GPTNeoXConfig(**(settings | other))


def neox_stack(vocab_size: int, width: int, layers: int, heads: int, rotary_pct: float, dropout: float) -> GPTNeoXModel:
    """A GPT-NeoX stack; its token table `embed_in` is there even where it is not used, as in the authors' models."""
    rates = {"hidden_dropout": dropout, "attention_dropout": dropout}
    config = neox_config(vocab_size, width, layers, num_attention_heads=heads, rotary_pct=rotary_pct, **rates)
    from transformers import GPTNeoXModel

    return GPTNeoXModel(config)


@provides("15-block-transformer")
def vanilla(name: str, **overrides: Any) -> GPTNeoXForCausalLM:
    """The vanilla baseline of the paper, a random GPTNeoXForCausalLM: "31m", "70m", "160m" or "410m".

    Args:
        name: of the shape.
        overrides: vocab_size, width, layers, or further settings of GPTNeoXConfig.

    Raises:
        ValueError: unknown name.
    """
    if name not in VANILLA:
        raise ValueError(unknown("vanilla baseline", name, VANILLA))
    layers, width = VANILLA[name]
    settings = {"vocab_size": 50304, "width": width, "layers": layers} | overrides
    config = neox_config(**settings)
    from transformers import GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(config)


def causal_mask(keep: Tensor, queries: int, group: int, like: Tensor) -> Tensor:
    """What is added to scores: -inf for later groups of keys, the lowest number for padding.

    A query whose keys are all padding then spreads evenly over those up to itself, as in the authors' code, and is finite.

    Args:
        keep: (B, T) True where a key is no padding.
        queries: M, the last positions of T that ask.
        group: positions that see each other whatever their order.
        like: gives dtype and device.

    Returns:
        (B, 1, M, T).
    """
    device, dtype = like.device, like.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    place = torch.arange(keep.shape[1], device=device) // group
    later = torch.zeros(queries, keep.shape[1], dtype=dtype, device=device)
    later = later.masked_fill(place > place[-queries:, None], -torch.inf)
    padding = torch.zeros(keep.shape, dtype=dtype, device=device).masked_fill(~keep, torch.finfo(dtype).min / 2)
    return later + padding[:, None, None]


class Stepper:
    """A GPT-NeoX stack that remembers: each call takes the next positions of its rows.

    Args:
        stack: the layers.
        capacity: positions to reserve memory for.
    """

    def __init__(self, stack: GPTNeoXModel, capacity: int) -> None:
        from heed.language.block_transformer.reserved import ReservedCache

        self.stack, self.capacity = stack, capacity
        self.cache = ReservedCache(len(stack.layers), capacity)
        parameter = stack.final_layer_norm.weight
        positions = torch.arange(capacity, device=parameter.device)[None]
        self.cos, self.sin = stack.rotary_emb(parameter, positions)

    @property
    def length(self) -> int:
        """Positions seen since the beginning or the last restart."""
        return self.cache.get_seq_length()

    def restart(self) -> None:
        """Forget everything, and keep the memory."""
        self.cache.reset()

    def __call__(
        self, x: Float[Tensor, "B M D"], mask: Tensor | None = None, place: int | None = None
    ) -> Float[Tensor, "B M D"]:
        """Outputs of the next M positions, after the final norm.

        Args:
            x: (B, M, D); several positions at a time only at the beginning, or with a mask.
            mask: (B, 1, M, T), added to the scores; None for plain causality.
            place: what the rotary embedding takes all M positions for; None for the next numbers.
        """
        begin, end = self.length, self.length + x.shape[1]
        if end > self.capacity:
            raise ValueError(f"{end} positions do not fit into the {self.capacity} reserved; make a larger Stepper")
        if place is not None:
            begin, end = place, place + 1
        turn = self.cos[:, begin:end], self.sin[:, begin:end]
        for layer in self.stack.layers:
            x = layer(x, attention_mask=mask, layer_past=self.cache, position_embeddings=turn)
        return self.stack.final_layer_norm(x)
