"""FFNet's blocks, a small FFNet, its super-resolution and forecasting models against the authors' modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from case import Case
from torch import Tensor

from heed.checkpoint import load_weights
from heed.layers.metamixer import FFNifiedAttention
from heed.layers.reparam import fuse
from heed.predict.ffnet_series import FFNetSeries, FFNetSeriesConfig
from heed.predict.ffnet_sr import FFNetSR, FFNetSRConfig, fft_loss
from heed.vision.ffnet import ChannelMixer, FFBlock, FFNet, FFNetConfig, channel_conv, flat_scale
from heed.vision.ffnet_seg import seg_block, seg_block_key


def run(case: Case) -> dict[str, Tensor]:
    kinds = {
        "ffnified_block": ffnified_block,
        "model_tiny": model,
        "seg_block": segmentation_block,
        "super_resolution": super_resolution,
        "time_series": time_series,
    }
    return kinds[case.kind](case)


def ffnified_block(case: Case) -> dict[str, Tensor]:
    c = case.config
    mixer = FFNifiedAttention(c["dim"], c["ks1"], c["ks2"])
    block = FFBlock(
        c["dim"],
        mixer,
        ChannelMixer(c["dim"], c["expansion_ratio"], channel_conv(c["dim"], c["kernel_size"])),
        layer_scale=c["layer_scale_init_value"] if c["use_layer_scale"] else None,
        drop_path=c["drop_path"],
        squeeze_excite=c["use_se"],
    )
    state = {str(FFNet.authors_key(key)): flat_scale(key, value) for key, value in case.state.items()}
    load_weights(block.eval(), state, case.name)
    x = case.inputs["x"].clone().requires_grad_()
    y = block(x)
    y.sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        results = {
            "output.query": mixer.query(x),
            "output.coeff": mixer.coefficients(x),
            "output.mixed": mixer(x),
            "output.token": block.token(x),
            "output.y": y.detach(),
            "grad.x": x.grad,
        }
        return results | {"output.fused_y": fuse(block)(x)}


@torch.no_grad()
def model(case: Case) -> dict[str, Tensor]:
    c = case.config
    config = FFNetConfig(
        in_chans=case.inputs["x"].shape[1],
        num_classes=c["num_classes"],
        stem_dim=c["in_dim"],
        dims=tuple(c["embed_dim"]),
        depths=tuple(c["depth"]),
        channel_kernels=tuple(c["kernel_sizes"]),
        key_kernels=tuple(c["kernel_sizes1"]),
        value_kernels=tuple(c["kernel_sizes2"]),
        mlp_ratios=tuple(c["expansion_ratios"]),
        layer_scale=c["layer_scale_init_value"] if c["use_layer_scale"] else None,
        drop_path=c["drop_path_rate"],
        mixers=("ffnified",) * len(c["depth"]),
    )
    net = FFNet(config).load_authors(case.state).eval()
    x = case.inputs["x"]
    results = {f"output.stage{i}": stage for i, stage in enumerate(net.stage_maps(x))}
    results |= {"output.stem": net.stem(x), "output.features": net.forward_features(x), "output.logits": net(x)}
    return results | {"output.fused_logits": net.fuse()(x)}


@torch.no_grad()
def segmentation_block(case: Case) -> dict[str, Tensor]:
    c = case.config
    # The head's blocks have one kernel throughout.
    assert c["kernel_size"] == c["ks1"] == c["ks2"]
    block = seg_block(c["dim"], c["kernel_size"], c["expansion_ratio"], drop_path=c["drop_path"], activate=True)
    load_weights(block.eval(), {seg_block_key(key): value for key, value in case.state.items()}, case.name)
    x = case.inputs["x"]
    results = {"output.token": block.token(x), "output.y": block(x)}
    return results | {"output.fused_y": fuse(block)(x)}


@torch.no_grad()
def super_resolution(case: Case) -> dict[str, Tensor]:
    c = case.config
    assert c["norm"] is None
    config = FFNetSRConfig(scale=c["scale"], dim=c["dim"], depth=c["depth"], ratio=c["expansion_ratio"])
    y = FFNetSR(config).load_authors(case.state).eval()(case.inputs["x"])
    target = case.inputs["target"]
    return {"output.y": y, "output.fft_loss": fft_loss(y, target), "output.l1_loss": F.l1_loss(y, target)}


@torch.no_grad()
def time_series(case: Case) -> dict[str, Tensor]:
    c = case.config
    stages = len(c["num_blocks"])
    config = FFNetSeriesConfig(
        length=c["seq_len"],
        horizon=c["pred_len"],
        variables=c["enc_in"],
        patch=c["patch_size"],
        stride=c["patch_stride"],
        dims=tuple(c["dims"][:stages]),
        depths=tuple(c["num_blocks"]),
        kernels=tuple(c["large_size"]),
        small_kernels=tuple(c["small_size"]),
        ratio=c["ffn_ratio"],
        drop=c["dropout"],
        head_drop=c["head_dropout"],
        downsample=c["downsample_ratio"],
        normalise=bool(c["revin"]),
        affine=bool(c["affine"]),
        subtract_last=bool(c["subtract_last"]),
        fused=c["small_kernel_merged"],
    )
    return {"output.y": FFNetSeries(config).load_authors(case.state).eval()(case.inputs["x"])}
