"""DesignEdit (card 01): spatial image editing without training, by lifting objects into latent layers and pasting them.

    invert      picture -> x_stars                       (T + 1, B, C, h, w), DDIM, see heed.diffusion.inversion
    start       z[r] = x_stars[T][image of row r]        rows r: 0 source, 1 background, 2 canvas, 3.. layers
    attend      softmax(Q ((1 - m) K)^T / sqrt(d)) V     background row: keys under the mask m are blanked  keymask.py
    guide       eps_u + 7.5 d, d = eps_c - eps_u; unedited places are pulled towards x_stars                fusion.py
    blend       z[1] = M z[1] + (1 - M) z[0]             background equals the source outside the mask M    fusion.py
    paste       z[2] = (1 - m_j) z[2] + m_j shift(z[3 + j])   once, layer after layer                       fusion.py

The UNet then runs on unblended, which harmonises the seams. `plan.py` says what is asked for, `layers.py` turns it into
pictures and masks, `editor.py` runs it. Jia et al., "DesignEdit: Multi-Layered Latent Decomposition and Fusion for
Unified & Accurate Image Editing", AAAI 2025, arXiv 2403.14487.
"""

from heed.diffusion.designedit.editor import DesignEdit, Edited
from heed.diffusion.designedit.fusion import LayerFusion, ProximalGuidance, shift
from heed.diffusion.designedit.keymask import KeyMaskedAttnProcessor
from heed.diffusion.designedit.layers import Decomposition, decompose
from heed.diffusion.designedit.plan import Background, EditPlan, Layer
from heed.diffusion.designedit.settings import DesignEditSettings

__all__ = [
    "Background",
    "Decomposition",
    "DesignEdit",
    "DesignEditSettings",
    "EditPlan",
    "Edited",
    "KeyMaskedAttnProcessor",
    "Layer",
    "LayerFusion",
    "ProximalGuidance",
    "decompose",
    "shift",
]
