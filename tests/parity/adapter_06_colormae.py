"""ColorMAE against the paper's filters, the authors' masks, and their whole model with its gradients."""

from __future__ import annotations

import torch
from case import Case
from torch import Tensor

from heed.pretrain.color import ColorMask
from heed.pretrain.mae import MaskedViTConfig, masked_vit
from heed.pretrain.masks import count_visible, order_tokens
from heed.pretrain.noise import NoiseBank, filter_noise


def run(case: Case) -> dict[str, Tensor]:
    kinds = {"filters": _filters, "mask": _mask, "tiny_mae": _model}
    if case.kind not in kinds:
        raise ValueError(f"unknown kind {case.kind!r}")
    return kinds[case.kind](case)


def _filters(case: Case) -> dict[str, Tensor]:
    c, white = case.config, case.tensors["rand.white"]
    one, two = c["sigma_red_blue"], (c["sigma1_green_purple"], c["sigma2_green_purple"])
    sigmas = {"red": one, "blue": one, "green": two, "purple": two}
    return {f"output.{color}": filter_noise(white.double(), color, s).float() for color, s in sigmas.items()}


def _mask(case: Case) -> dict[str, Tensor]:
    c, side = case.config, case.config["W"]
    mask = ColorMask(NoiseBank(case.tensors["rand.bank"]), c["mask_ratio"])
    windows = mask.bank.windows(c["batch"], side, case.tensors["rand.draws"])
    order = order_tokens(windows.flatten(1), mask.visible((side, side)))
    return {
        "output.windows": windows,
        "output.mask": order.mask.float(),
        "output.ids_restore": order.restore,
        "output.ids_keep": order.keep,
    }


def _model(case: Case) -> dict[str, Tensor]:
    c = case.config
    config = MaskedViTConfig(
        img_size=c["img_size"],
        patch_size=c["patch_size"],
        in_chans=case.inputs["images"].shape[1],
        dim=c["embed_dims"],
        depth=c["num_layers"],
        num_heads=c["num_heads"],
        mlp_ratio=c["feedforward_channels"] / c["embed_dims"],
        decoder_dim=c["decoder_embed_dim"],
        decoder_depth=c["decoder_depth"],
        decoder_heads=c["decoder_num_heads"],
        norm_pix=c["norm_pix"],
    )
    window = case.tensors["rand.window"]
    mask = ColorMask(NoiseBank(window), c["mask_ratio"])
    order = order_tokens(window.flatten(1), count_visible(window[0].numel(), c["mask_ratio"]))
    results = {"output.mask": order.mask.float(), "output.ids_restore": order.restore}
    for detach, name in ((False, "grad.images"), (True, "grad.images_target_detached")):
        model = masked_vit(config, mask, detach_target=detach).load_authors(case.state)
        images = case.inputs["images"].clone().requires_grad_()
        latent = model.encoder(images, order.keep)
        prediction = model.decoder(latent, order.restore)
        loss = model.loss(prediction, images, order.mask)
        loss.backward()
        assert images.grad is not None
        results[name] = images.grad
        with torch.no_grad():
            everything = model.encoder(images)
        results |= {
            "output.latent": latent.detach(),
            "output.pred": prediction.detach(),
            "output.loss": loss.detach(),
            "output.features_unmasked": everything,
        }
    return results
