"""DiNAT_s (card 58): DiNAT's layers in Swin's frame, with patches that do not overlap and merging by 2x2.

    x = LN(conv4x4/4(image))                                         (B, H/4, W/4, C), image zero-padded to multiples of 4
    x = x + NA(LN(x));  x = x + MLP(LN(x))                           depth times, dilations as in DiNAT
    x = Linear(LN([x_00, x_10, x_01, x_11]))                         between levels: 4C -> 2C channels, x_ab the tokens of
                                                                     row parity a and column parity b
    logits = head(mean(LN(x)))

Hassani and Shi, "Dilated Neighborhood Attention Transformer", arXiv 2209.15001; the frame is that of Liu et al., "Swin
Transformer", ICCV 2021. The layer and its equation are in `heed.vision.nat`.
"""

from __future__ import annotations

from dataclasses import replace

from timm.models.swin_transformer import PatchMerging
from torch import nn

from heed.catalogue import provides
from heed.models import register_models
from heed.vision.nat import NAT, NATConfig, dilated
from heed.vision.parts import PatchEmbed


@provides("58-dinat")
class DiNATs(NAT):
    """(B, in_chans, H, W) images of any size to (B, num_classes) logits; settings, pyramid and methods are those of `NAT`."""

    @staticmethod
    def embedding(config: NATConfig) -> nn.Module:
        return PatchEmbed(config.in_chans, config.dim, config.stem_stride)

    @staticmethod
    def downsampler(dim: int) -> nn.Module:
        return PatchMerging(dim)


_TINY = NATConfig(dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), mlp_ratio=4.0)
_SMALL = replace(_TINY, depths=(2, 2, 18, 2), drop_path=0.3)
_LARGE = replace(_SMALL, dim=192, num_heads=(6, 12, 24, 48), drop_path=0.35)

register_models(
    DiNATs,
    # For images of 8 to 32 pixels a side: about the size of `vit_micro`, two levels.
    dinat_s_micro=NATConfig(
        img_size=8,
        in_chans=1,
        num_classes=10,
        dim=40,
        depths=(2, 2),
        num_heads=(4, 8),
        kernel_size=3,
        dilations="alternating",
        stem_stride=1,
        mlp_ratio=2.0,
        drop_path=0.0,
    ),
    dinat_s_tiny=dilated(_TINY),
    dinat_s_small=dilated(_SMALL),
    dinat_s_base=dilated(replace(_SMALL, dim=128, num_heads=(4, 8, 16, 32), drop_path=0.5)),
    dinat_s_large=dilated(_LARGE),
    dinat_s_large_384=dilated(replace(_LARGE, img_size=384)),
)
