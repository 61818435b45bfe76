"""Checkpoints of masked autoencoders: the keys of mmpretrain (ColorMAE), facebookresearch/mae and transformers.

All three hold the same tensors, tables of positions included; transformers keeps q, k and v apart. heed reads them into
timm's names for the encoder and its own for the decoder.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from heed.catalogue import provides
from heed.checkpoint import read_weights
from heed.pretrain.positions import First, sincos_positions

# Pattern and replacement, applied in turn; the result has the names of facebookresearch/mae.
_MMPRETRAIN = (
    (r"^backbone\.ln1\.", "norm."),
    (r"^backbone\.patch_embed\.projection\.", "patch_embed.proj."),
    (r"^backbone\.layers\.", "blocks."),
    (r"^neck\.ln1\.", "decoder_norm."),
    (r"^(backbone|neck)\.", ""),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)
_TRANSFORMERS = (
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"^decoder\.decoder_layers\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1."),
    (r"\.attention\.(q|k|v)\w*\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
_DECODER = {
    "decoder_embed.": "embed.",
    "decoder_pos_embed": "pos_embed",
    "decoder_blocks.": "blocks.",
    "decoder_norm.": "norm.",
    "decoder_pred.": "head.",
    "mask_token": "mask_token",
}


def _facebook_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if any(key.startswith("backbone.") for key in weights):
        return _rename(weights, _MMPRETRAIN)
    if any(key.startswith(("vit.", "embeddings.")) for key in weights):
        renamed = _rename(weights, _TRANSFORMERS)
        for key in [key for key in renamed if ".attn.q." in key]:
            parts = [renamed.pop(key.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
            renamed[key.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
        return renamed
    return weights


def _rename(weights: dict[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in weights.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def mae_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A pre-training checkpoint with the names of `MaskedAutoencoder` around timm's VisionTransformer."""
    found = {}
    for key, value in _facebook_names(weights).items():
        start = next((start for start in _DECODER if key.startswith(start)), None)
        name = f"encoder.backbone.{key}" if start is None else f"decoder.{_DECODER[start]}{key.removeprefix(start)}"
        found[name] = value
    return found


@provides("06-colormae")
def encoder_weights(weights: dict[str, Tensor] | str | Path) -> dict[str, Tensor]:
    """The encoder of a pre-training checkpoint with timm's names, decoder left out.

        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        vit.load_state_dict(encoder_weights("colormae.pth"))

    Args:
        weights: a state dict, or the path of a checkpoint, of mmpretrain, facebookresearch/mae or transformers.
    """
    weights = weights if isinstance(weights, dict) else read_weights(weights)
    prefix = "encoder.backbone."
    return {key.removeprefix(prefix): v for key, v in mae_weights(weights).items() if key.startswith(prefix)}


@provides("06-colormae")
def fill_vitmae_positions(model: nn.Module, first: First = "column") -> None:
    """Fill the tables of positions of transformers' `ViTMAEForPreTraining` with sinusoids.

    A model built from a configuration, and not loaded, has tables of zeros.

    Args:
        model: changed in place.
        first: order of the sinusoids; "column" is that of the released weights.
    """
    vit, decoder = getattr(model, "vit", None), getattr(model, "decoder", None)
    if vit is None or decoder is None:
        raise TypeError(f"a {type(model).__name__} is no ViTMAEForPreTraining")
    config = vit.config
    side = config.image_size // config.patch_size
    for table in (vit.embeddings.position_embeddings, decoder.decoder_pos_embed):
        fixed = sincos_positions((side, side), table.shape[-1], first=first, prefix=1)
        with torch.no_grad():
            table.copy_(fixed[None])
