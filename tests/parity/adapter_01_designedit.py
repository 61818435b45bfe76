"""DesignEdit against the authors' image helpers, key masking, layer fusion and whole denoising loop."""

from __future__ import annotations

import torch
from case import Case
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from heed.checkpoint import load_weights
from heed.diffusion import pictures
from heed.diffusion.denoise import Conditioning, Denoiser, Position, denoise
from heed.diffusion.designedit import (
    DesignEditSettings,
    KeyMaskedAttnProcessor,
    LayerFusion,
    ProximalGuidance,
    shift,
)
from heed.diffusion.inversion import invert, invertible
from heed.diffusion.masks import binarised, grow_mask, reduce_mask
from heed.diffusion.processors import self_attention

_FLIPS = {"lr": "left-right", "ud": "up-down", "both": "both"}


def run(case: Case) -> dict[str, Tensor]:
    kinds = {
        "image_ops": _image_ops,
        "key_masked_attention": _attention,
        "layer_fusion": _fusion,
        "pipeline": _pipeline,
    }
    if case.kind not in kinds:
        raise ValueError(f"unknown kind {case.kind!r}")
    with torch.no_grad():
        return kinds[case.kind](case)


def _image_ops(case: Case) -> dict[str, Tensor]:
    c = case.config
    image, mask, big = (case.inputs[name].numpy() for name in ("image", "mask", "big_mask"))
    pairs = {"zoom": pictures.zoom_out(image, *c["zoom"])}
    for name in ("pan", "pan2"):
        pairs[name] = pictures.pan(image, *_moves(c[name]))
    for name, scale in zip(("shrink", "grow"), c["resize"], strict=True):
        pairs[name] = pictures.resize_object(image, mask, scale)
    for name, flip in _FLIPS.items():
        pairs[f"flip_{name}"] = pictures.flip_object(image, mask, flip)  # type: ignore[arg-type]
    results = {"output.centroid": torch.tensor(pictures.centroid(mask))}
    for name, (moved, left) in pairs.items():
        results[f"output.{name}_image"] = torch.from_numpy(moved.copy())
        results[f"output.{name}_mask"] = torch.from_numpy(left.copy())
    for name, wanted in case.wanted().items():
        if name.startswith("output.attend_"):
            pixels = int(name.removeprefix("output.attend_").replace("m", "-"))
            reduced = reduce_mask(grow_mask(big, pixels), tuple(wanted.shape))
            results[name] = torch.from_numpy(reduced)
    return results


def _moves(operations: list[list]) -> tuple[float, float]:
    """[["left", 0.2], ["up", 0.1]] -> dx, dy"""
    signs = {"right": (1, 0), "left": (-1, 0), "up": (0, 1), "down": (0, -1)}
    dx = sum(signs[direction][0] * fraction for direction, fraction in operations)
    dy = sum(signs[direction][1] * fraction for direction, fraction in operations)
    return dx, dy


def _settings(case: Case, steps: int, **more: object) -> DesignEditSettings:
    windows = {
        name: tuple(case.config[name]) for name in ("mask_time", "blend_time", "refine_time") if name in case.config
    }
    return DesignEditSettings(steps=steps, **windows, **more)  # type: ignore[arg-type]


def _attention(case: Case) -> dict[str, Tensor]:
    c, x, text = case.config, case.inputs["hidden_states"], case.inputs["encoder_hidden_states"]
    sizes = {"query_dim": c["dim"], "heads": c["heads"], "dim_head": c["dim_head"], "bias": False}
    own, cross = Attention(**sizes), Attention(**sizes, cross_attention_dim=text.shape[-1])
    load_weights(own, case.group("state.self"), case.name)
    load_weights(cross, case.group("state.cross"), case.name)
    settings = _settings(case, max(c["mask_time"][1], c["refine_time"][1]), blend_time=(0, 0))
    position = Position(rows=range(len(x)))
    row = c["cfg_batch"] // 2 + c["background_index"]
    masks = case.inputs["remove_mask"], settings.mask_steps, case.inputs.get("refine_mask"), settings.refine_steps
    latent_grid = (c["mask_res"], c["mask_res"] * c["W"] // c["H"])
    own.set_processor(KeyMaskedAttnProcessor(position, row, *masks, latent_grid))
    results = {}
    for name in case.wanted():
        kind, call = name.removeprefix("output.").rsplit("_call", 1)
        position.step = int(call)
        results[name] = own(x) if kind == "self_attn" else cross(x, text)
    return results


def _fusion(case: Case) -> dict[str, Tensor]:
    c, given = case.config, case.inputs
    fusion = LayerFusion(
        given["remove_mask"],
        range(c["blend_time"][0], c["blend_time"][1] + 1),
        [given[f"fg_mask{j}"] for j in range(c["n_fg"])],
        [_moves(operations) for operations in c["op_list"]],
    )
    by = c["shift_scale"]
    ways = {"right": (by, 0.0), "left": (-by, 0.0), "up": (0.0, by), "down": (0.0, -by)}
    results = {f"output.shift_{way}": shift(given["shift"], *move) for way, move in ways.items()}
    for name in case.wanted():
        if name.startswith("output.latents_step"):
            step = int(name.removeprefix("output.latents_step"))
            results[name] = fusion(given[f"latents_step{step}"], step)
    return results


def _pipeline(case: Case) -> dict[str, Tensor]:
    c, given = case.config, case.inputs
    unet = UNet2DConditionModel(**c["unet"]).eval()
    load_weights(unet, case.group("state.unet"), case.name)
    scheduler = DDIMScheduler(**{k: v for k, v in c["scheduler"].items() if k != "cls"})
    settings = _settings(
        case,
        c["steps"],
        guidance_scale=c["guidance_scale"],
        quantile=c["quantile"],
        recon_t=c["recon_t"],
        recon_lr=c["recon_lr"],
        dilate_radius=c["dilate_radius"],
        prox=c["prox"] if c["prox"] in ("l0", "l1") else None,
    )
    scheduler = invertible(scheduler, settings.steps)
    time_ids = torch.tensor([c["time_ids"]], dtype=torch.float32)
    source = Conditioning(given["prompt_embeds"], given["pooled"], time_ids)
    target = Conditioning(given["edit_prompt_embeds"], given["edit_pooled"], time_ids)
    images = len(given["latents0"])
    path = invert(Denoiser(unet), scheduler, given["latents0"], source.rows([0] * images))
    results = {"output.inversion": path}

    reference = [c["sample_ref_match"][str(row)] for row in range(len(c["sample_ref_match"]))]
    rows, inverted, remove = len(reference), path[:, reference], binarised(given["remove_mask"])
    layers = [given[f"fg_mask{j}"] for j in range(rows - 3)]
    fusion = LayerFusion(remove, settings.blend_steps, layers, [_moves(x) for x in c["op_list"] or ()])
    guidance, denoiser = ProximalGuidance(settings, inverted, remove), Denoiser(unet)
    windows = settings.mask_steps, given.get("refine_mask"), settings.refine_steps

    def after(z: Tensor, step: int, timestep: int) -> Tensor:
        z = fusion(guidance.pull(z, step, timestep), step + 1)
        if f"output.step{step + 1}" in case.tensors:
            results[f"output.step{step + 1}"] = z
        return z

    with self_attention(unet, lambda: KeyMaskedAttnProcessor(denoiser.position, rows + 1, remove, *windows)):
        conditionings = source.rows([0] * rows), target.rows([0] * rows)
        denoise(denoiser, scheduler, inverted[-1], *conditionings, guide=guidance.guide, after=after)
    return results
