"""Up-training: a Block Transformer that begins with the weights of a vanilla GPT-NeoX (card 15).

    e_i = (1/L) sum_j E[t_j]                 projection: identity / L at every place
    c = [h_i, h_i, ...]                      expansion: r stacked identities

The authors train the result for a tenth of the steps of a training from scratch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown
from heed.language.block_transformer.config import BlockTransformerConfig
from heed.language.block_transformer.model import BlockTransformer

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM

Split = Literal["partition", "skip", "duplicate"]


@provides("15-block-transformer")
def from_vanilla(
    vanilla: GPTNeoXForCausalLM, split: Split = "partition", *, block_length: int = 4, expansion_ratio: int = 2
) -> BlockTransformer:
    """A Block Transformer that starts from a vanilla model of transformers, ready to be trained further.

    Args:
        vanilla: a GPT-NeoX (Pythia) model with its head.
        split: which layers go where. "partition": the lower half to the block decoder, the upper one to the token
            decoder. "skip": every second layer, beginning with the first, to both. "duplicate": all to both.
        block_length: L.
        expansion_ratio: r, prefix tokens.

    Raises:
        ValueError: an unknown split, an odd number of layers where halves are needed, or a model that is not of
            Pythia's kind (parallel residual, gelu, four times as wide inside, unscaled rotary base 10000).
    """
    if split not in get_args(Split):
        raise ValueError(unknown("split", split, get_args(Split)))
    c: Any = vanilla.config
    _check(c)
    layers = list(vanilla.gpt_neox.layers)
    if split == "partition" and len(layers) % 2:
        raise ValueError(f"partition needs an even number of layers, and this model has {len(layers)}; use 'duplicate'")
    half = len(layers) // 2
    lower, upper = {
        "partition": (layers[:half], layers[half:]),
        "skip": (layers[::2], layers[::2]),
        "duplicate": (layers, layers),
    }[split]
    width, heads = c.hidden_size, c.num_attention_heads
    rotary = c.rope_parameters["partial_rotary_factor"]
    eos = c.eos_token_id[0] if isinstance(c.eos_token_id, list) else c.eos_token_id
    model = BlockTransformer(
        BlockTransformerConfig(
            vocab_size=c.vocab_size,
            block_length=block_length,
            embedder_width=width,
            projection="projection_layer",
            block_layers=len(lower),
            block_width=width,
            block_heads=heads,
            token_layers=len(upper),
            token_width=width,
            token_heads=heads,
            expansion_ratio=expansion_ratio,
            block_rotary_pct=rotary,
            token_rotary_pct=rotary,
            pad_id=0 if c.pad_token_id is None else c.pad_token_id,
            bos_id=c.bos_token_id,
            eos_id=eos,
            generation_pad_id=min(1, c.vocab_size - 1),
        )
    )
    head: Any = vanilla.get_output_embeddings()
    table: Any = vanilla.gpt_neox.embed_in.weight
    weights: dict[str, Tensor] = {
        "embedder.embeddings.weight": table,
        "block_decoder.gpt_neox.embed_in.weight": table,
        "token_decoder.gpt_neox.embed_in.weight": table,
        "token_decoder.embed_out.weight": head.weight,
    }
    for part, chosen in (("block_decoder", lower), ("token_decoder", upper)):
        weights |= _named(f"{part}.gpt_neox.layers", nn.ModuleList(chosen))
    weights |= _named("token_decoder.gpt_neox.final_layer_norm", vanilla.gpt_neox.final_layer_norm)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
        identity = torch.eye(width)
        projection, expansion = model.embedder.projection_layer, model.token_decoder.expansion_layer
        projection.weight.copy_(identity[..., None] / block_length)  # type: ignore[union-attr]
        expansion.weight.copy_(identity.repeat(expansion_ratio, 1)[..., None])  # type: ignore[union-attr]
    return model


def _named(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in module.state_dict().items()}


def _check(config: Any) -> None:
    """Block Transformers have the one kind of GPT-NeoX that Pythia is."""
    wanted = {
        "model_type": "gpt_neox",
        "intermediate_size": 4 * config.hidden_size,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "attention_bias": True,
        "layer_norm_eps": 1e-5,
    }
    found = {name: getattr(config, name, None) for name in wanted}
    rope = getattr(config, "rope_parameters", None) or {}
    wanted |= {"rope_theta": 10000, "rope_type": "default"}
    found |= {"rope_theta": rope.get("rope_theta"), "rope_type": rope.get("rope_type")}
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(f"{name}={found[name]!r}: a Block Transformer can only start from a model with {value!r}")
