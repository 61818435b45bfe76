"""FocalNet (card 68): a pyramid, or one resolution, of blocks with focal modulation in the place of self-attention.

    x = LN(conv(image))                                             (B, H/4, W/4, C), patch embedding
    pre-norm:   x = x + g1 * FM(LN(x));   x = x + g2 * MLP(LN(x))   FM is focal modulation, g1 and g2 layer scale or 1
    post-norm:  x = x + g1 * LN(FM(x));   x = x + g2 * LN(MLP(x))
    between:    x = LN(conv(x))                                     sides halved, channels doubled
    logits = head(mean(LN(x)))

Yang, Li, Dai, Yuan, Gao, "Focal Modulation Networks", NeurIPS 2022, arXiv 2203.11926. The defaults compute what the
authors' classification code does, `dense=True` what their detection and segmentation code does.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

from jaxtyping import Float
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from heed.catalogue import provides
from heed.checkpoint import load_weights
from heed.layers.focal import TRANSFORMERS_NAMES, FocalModulation, FocalParts, refocus
from heed.models import models, register_models
from heed.vision.backbone import Backbone
from heed.vision.parts import PatchEmbed, drop_path_rates, init_linear, pyramid_info


@provides("68-focalnet")
@dataclass(frozen=True)
class FocalNetConfig:
    """Settings of `FocalNet`; the defaults are FocalNet-T with the small receptive field.

    Args:
        img_size: side in pixels that `flops` counts for; the model takes images of any size.
        patch_size: side of a patch, and the stem's stride, in pixels.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        dim: channels of the first stage; each later stage has twice as many as the one before.
        depths: blocks per stage; one entry makes an isotropic model.
        levels: focal levels per stage.
        windows: side of the first level's kernel per stage, in tokens, odd; each further level adds 2.
        mlp_ratio: hidden width of the MLP over the stage's channels.
        conv_embed: overlapping convolutions embed the patches, 7 x 7 with stride 4 and 3 x 3 with stride 2.
        patch_norm: LayerNorm after the stem; the embeddings between stages always have one.
        stem_padding: zeros around the image for the 7 x 7 stem. None for what the authors have: 2, or 3 where `dense`.
        layer_scale: initial value of learnable factors on both branches of a block; None for no factors.
        post_norm: LayerNorm after modulation and MLP instead of before.
        post_norm_in_modulation: LayerNorm inside the modulation, before its output projection.
        normalize_modulator: divide the gathered context by the number of levels plus 1.
        drop: dropout of tokens, and after modulation and MLP.
        drop_path: stochastic depth of the last block, linear from 0.
        dense: for detection and segmentation. Sides that a stride does not divide are filled with zeros at the bottom
            and right, else the rest is dropped as the authors do in classification; each map has a LayerNorm.
        out_indices: stages whose maps are returned where `dense`; None for all.
        frozen_stages: -1 trains all; 0 and 1 freeze the stem, k > 1 the stem and the first k - 1 stages, which is how
            the authors' detection code counts.
    """

    img_size: int = 224
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 1000
    dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    levels: tuple[int, ...] = (2, 2, 2, 2)
    windows: tuple[int, ...] = (3, 3, 3, 3)
    mlp_ratio: float = 4.0
    conv_embed: bool = False
    patch_norm: bool = True
    stem_padding: int | None = None
    layer_scale: float | None = None
    post_norm: bool = False
    post_norm_in_modulation: bool = False
    normalize_modulator: bool = False
    drop: float = 0.0
    drop_path: float = 0.2
    dense: bool = False
    out_indices: tuple[int, ...] | None = None
    frozen_stages: int = -1

    def __post_init__(self) -> None:
        if not len(self.depths) == len(self.levels) == len(self.windows) > 0:
            raise ValueError(
                f"depths={self.depths}, levels={self.levels} and windows={self.windows} need one entry per stage"
            )
        if self.conv_embed and self.patch_size != 4:
            raise ValueError(f"patch_size={self.patch_size}: conv_embed has stride 4; set patch_size=4")
        if self.out_indices is not None and not self.dense:
            raise ValueError(f"out_indices={self.out_indices} needs dense=True; without it all stages give maps")
        stages = range(len(self.depths))
        outs = self.outs
        if not outs or list(outs) != sorted(set(outs)) or any(i not in stages for i in outs):
            raise ValueError(f"out_indices={outs} must be rising stage numbers from 0 to {len(stages) - 1}")
        if not -1 <= self.frozen_stages <= len(stages) + 1:
            raise ValueError(f"frozen_stages={self.frozen_stages} must lie in -1 .. {len(stages) + 1}")

    @property
    def outs(self) -> tuple[int, ...]:
        """The stages whose maps are returned."""
        return tuple(range(len(self.depths))) if self.out_indices is None else self.out_indices


@provides("68-focalnet")
class FocalBlock(nn.Module):
    """Focal modulation and MLP with residual connections, (B, H, W, C) -> (B, H, W, C).

    Args:
        modulation: mixes the tokens; it has the block's number of channels as `dim`.
        mlp_ratio: hidden width of the MLP over the channels.
        post_norm: LayerNorm after modulation and MLP instead of before.
        layer_scale: initial value of a learnable factor per channel on both branches; None for no factors.
        drop: dropout in the MLP.
        drop_path: probability of skipping a branch while training, per image.
    """

    def __init__(
        self,
        modulation: FocalModulation,
        mlp_ratio: float = 4.0,
        *,
        post_norm: bool = False,
        layer_scale: float | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        dim = modulation.dim
        self.post_norm = post_norm
        self.norm1 = nn.LayerNorm(dim)
        self.modulation = modulation
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        x = x + self.drop_path(self.ls1(self._normed(self.norm1, self.modulation, x)))
        return x + self.drop_path(self.ls2(self._normed(self.norm2, self.mlp, x)))

    def parts(self, x: Float[Tensor, "B H W C"]) -> FocalParts:
        """The contexts, gates and modulator that the block computes on its input x."""
        return self.modulation.parts(x if self.post_norm else self.norm1(x))

    def flops(self, height: int, width: int) -> int:
        per_token = 2 * self.modulation.dim + self.mlp.fc1.weight.numel() + self.mlp.fc2.weight.numel()
        return self.modulation.flops(height, width) + height * width * per_token

    def _normed(self, norm: nn.Module, branch: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return norm(branch(x)) if self.post_norm else branch(norm(x))


class Stage(nn.Module):
    """The blocks of one resolution, and the embedding that leads to the next."""

    def __init__(self, blocks: list[FocalBlock], downsample: PatchEmbed | nn.Identity) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Float[Tensor, "B H W C"]) -> tuple[Float[Tensor, "B H W C"], Float[Tensor, "B h w D"]]:
        """The stage's map, and what the next stage starts from."""
        x = self.blocks(x)
        return x, self.down(x)

    def down(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w D"]:
        return self.downsample(x.permute(0, 3, 1, 2)) if isinstance(self.downsample, PatchEmbed) else x


# The authors' and transformers' names, and ours.
_RENAMES = (
    (r"^backbone\.|^focalnet\.", ""),
    (r"^layers\.", "stages."),
    (r"\.gamma_(\d)$", r".ls\1.gamma"),
    (r"^norm(\d)\.", r"norms.\1."),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", "patch_embed."),
    (r"^encoder\.stages\.(\d+)\.layers\.", r"stages.\1.blocks."),
    (r"^encoder\.", ""),
    (r"\.downsample\.projection\.", ".downsample.proj."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    *((rf"\.modulation\.{theirs}\.", f".modulation.{ours}.") for theirs, ours in TRANSFORMERS_NAMES.items()),
)
# What surrounds the backbone in the authors' detection and segmentation checkpoints.
_TASK_PARTS = ("neck.", "rpn_head.", "roi_head.", "bbox_head.", "decode_head.", "auxiliary_head.")


@provides("68-focalnet")
class FocalNet(Backbone):
    """(B, in_chans, H, W) images of any size to (B, num_classes) logits; see the module for the equations.

    `forward_intermediates` gives the pyramid: one map per stage, before its down-sampling. `parts` gives contexts,
    gates and modulators. `from_authors` reads the authors' checkpoints, timm's and transformers'.
    """

    Config = FocalNetConfig
    takes_any_size = True

    def __init__(self, config: FocalNetConfig) -> None:
        super().__init__(config)
        count = len(config.depths)
        dims = [config.dim * 2**i for i in range(count)]
        rates = drop_path_rates(config.drop_path, config.depths)
        self.num_classes = config.num_classes
        self.num_features = dims[config.outs[-1]]
        info = pyramid_info(dims, config.patch_size, "norms.{}" if config.dense else "stages.{}.blocks")
        self.feature_info = [info[i] for i in config.outs]
        stem_padding = config.stem_padding if config.stem_padding is not None else 3 if config.dense else 2
        kernel, padding = (7, stem_padding) if config.conv_embed else (config.patch_size, 0)
        self.patch_embed = PatchEmbed(
            config.in_chans, dims[0], config.patch_size, kernel, padding, norm=config.patch_norm, fill=config.dense
        )
        self.drop = nn.Dropout(config.drop)
        self.stages = nn.ModuleList(
            Stage([_block(config, i, dim, rate) for rate in rates[i]], _downsample(config, i, dim))
            for i, dim in enumerate(dims)
        )
        if config.dense:
            self.norms = nn.ModuleDict({str(i): nn.LayerNorm(dims[i]) for i in config.outs})
        else:
            self.norm = nn.LayerNorm(dims[-1])
        self.head = self.classifier(config.num_classes)
        self.apply(init_linear)
        for module in self._frozen():
            module.requires_grad_(False)
        self.train()

    def stage_maps(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        tokens = self.drop(self.patch_embed(x))
        outs = self.config.outs
        maps = []
        for i, stage in enumerate(self.stages[: outs[-1] + 1]):
            found, tokens = stage(tokens)
            if i in outs:
                maps.append((self.norms[str(i)](found) if self.config.dense else found).permute(0, 3, 1, 2))
        return maps

    def finish(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return x if self.config.dense else self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def parts(self, x: Float[Tensor, "B C H W"]) -> list[list[FocalParts]]:
        """Contexts, gates and modulator of every block, by stage; modulations are computed twice for it.

        The authors draw `parts(x)[stage][-1].strength()` and the gates of the last block of all.
        """
        self.check_images(x)
        tokens = self.drop(self.patch_embed(x))
        found = []
        for stage in self.stages:
            found.append([])
            for block in stage.blocks:  # type: ignore[union-attr]
                found[-1].append(block.parts(tokens))
                tokens = block(tokens)
            tokens = stage.down(tokens)  # type: ignore[operator]
        return found

    def flops(self, height: int | None = None, width: int | None = None) -> int:
        """Multiply-adds for one image of height x width pixels (default img_size), counted as the authors do.

        They count norms, biases of h and gating, but no activations and no layer scale.
        """
        sides = (height or self.config.img_size, width or self.config.img_size)
        total, sides = _embed_flops(self.patch_embed, sides)
        for stage in self.stages:
            total += sum(block.flops(*sides) for block in stage.blocks)  # type: ignore[union-attr]
            if isinstance(stage.downsample, PatchEmbed):
                more, sides = _embed_flops(stage.downsample, sides)
                total += more
        return total + self.num_features * (sides[0] * sides[1] + self.num_classes)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        if key.startswith(_TASK_PARTS):
            return None
        for theirs, ours in _RENAMES:
            key = re.sub(theirs, ours, key)
        return key

    def load_authors(self, weights: dict[str, Tensor], source: str = "the authors' weights") -> Self:
        """Load a state dict with the authors' names, with timm's, or with transformers'."""
        return super().load_authors(self._from_libraries(weights), source)

    def start_from(self, weights: dict[str, Tensor], source: str = "the pre-trained weights") -> Self:
        """Start fine-tuning from the weights of a FocalNet with other windows, fewer levels or another task.

        Kernels and gates are changed by `heed.layers.focal.refocus`. Norms at the end and a classifier of another size
        that this model lacks are left out, those that only this model has keep their initial values. So weights of
        kernels 3, 5, 7, trained on 224 pixels, become a detection backbone with kernels 9, 11, 13:

            model = heed.create_model("focalnet_tiny_lrf", windows=(9,) * 4, dense=True, num_classes=0)
            model.start_from(read_weights(path))

        Args:
            weights: a state dict with the names that `load_authors` takes.
            source: what to call it in errors.

        Raises:
            NotImplementedError: the weights have more levels than the model.
            ValueError: weights that do not fit otherwise.
        """
        pairs = ((self.authors_key(key), value) for key, value in self._from_libraries(weights).items())
        renamed = refocus({key: value for key, value in pairs if key is not None}, self)
        ends = ("norm.", "norms.", "head.")
        own = {key: value for key, value in self.state_dict().items() if key.startswith(ends)}
        fitting = {
            key: value
            for key, value in renamed.items()
            if not key.startswith(ends) or (key in own and own[key].shape == value.shape)
        }
        load_weights(self, own | fitting, source)
        return self

    def _from_libraries(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's names turned into the authors', and a warning where a library computes something else."""
        timm = "stem.proj.weight" in weights
        if (timm or any(".projection_in." in key for key in weights)) and self.config.normalize_modulator:
            warnings.warn(
                "the authors' configuration divides modulators by the number of levels plus 1, the models of timm and "
                "transformers do not: for their numbers create the model with normalize_modulator=False",
                stacklevel=4,
            )
        return {_from_timm(key): _flat(key, value) for key, value in weights.items()} if timm else weights

    def _frozen(self) -> list[nn.Module]:
        stages = self.config.frozen_stages
        stem = [self.patch_embed] if stages >= 0 else []
        return [*stem, *([self.drop, *self.stages[: stages - 1]] if stages >= 2 else [])]

    @property
    def least_side(self) -> int:
        # Without filling, patches that do not overlap need two tokens a side wherever the map is halved.
        c = self.config
        return c.patch_size * (1 if c.dense or c.conv_embed else 2 ** (len(c.depths) - 1))


def _block(config: FocalNetConfig, stage: int, dim: int, drop_path: float) -> FocalBlock:
    modulation = FocalModulation(
        dim,
        config.windows[stage],
        config.levels[stage],
        post_norm=config.post_norm_in_modulation,
        normalize_modulator=config.normalize_modulator,
        drop=config.drop,
    )
    return FocalBlock(
        modulation,
        config.mlp_ratio,
        post_norm=config.post_norm,
        layer_scale=config.layer_scale,
        drop=config.drop,
        drop_path=drop_path,
    )


def _downsample(config: FocalNetConfig, stage: int, dim: int) -> PatchEmbed | nn.Identity:
    if stage == len(config.depths) - 1:
        return nn.Identity()
    kernel, padding = (3, 1) if config.conv_embed else (2, 0)
    return PatchEmbed(dim, 2 * dim, 2, kernel, padding, fill=config.dense)


def _embed_flops(embed: PatchEmbed, sides: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Multiply-adds of an embedding with its norm, and the sides of its map."""
    conv = embed.proj
    (kernel, _), (stride, _), padding = conv.kernel_size, conv.stride, int(conv.padding[0])
    filled = (side + -side % stride if embed.fill else side for side in sides)
    rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in filled)
    return rows * columns * (conv.weight.numel() + conv.out_channels), (rows, columns)


def _from_timm(key: str) -> str:
    """The authors' name for timm's; timm starts a stage with the down-sampling that ends the one before."""
    key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
    key = re.sub(r"^stem\.", "patch_embed.", key)
    key = re.sub(r"\.norm(\d)_post\.", r".norm\1.", key)
    key = key.replace(".modulation.norm.", ".modulation.ln.")
    return key.replace("head.fc.", "head.")


def _flat(key: str, value: Tensor) -> Tensor:
    """timm's 1 x 1 convolutions as the matrices they are; h is a convolution for all."""
    linear = re.search(r"\.(f|proj|fc1|fc2)\.weight$", key) and value.shape[2:] == (1, 1)
    return value.flatten(1) if linear else value


@provides("68-focalnet")
def recipe(name: str, batch: int = 1024, *, paper: bool = False) -> dict[str, Any]:
    """How the authors train a model from scratch on ImageNet-1K, as options of timm's training script.

    Args:
        name: a FocalNet, for its stochastic depth.
        batch: images per step, over all devices.
        paper: the paper's learning rate (1e-3 for 1024 images) and warm-up (20 epochs) instead of those of the
            authors' configuration (1e-4 for 512 images, 5 epochs).
    """
    entry = models.get(name)
    if not issubclass(entry.cls, FocalNet):
        raise ValueError(f"{name!r} is a {entry.cls.__name__}; the recipe is for FocalNets")
    return {
        "model": f"heed_{name}",
        "opt": "adamw",
        "opt_betas": (0.9, 0.999),
        "lr": 1e-3 * batch / 1024 if paper else 1e-4 * batch / 512,
        "weight_decay": 0.05,
        "sched": "cosine",
        "epochs": 300,
        "warmup_epochs": 20 if paper else 5,
        "clip_grad": 5.0,
        "aa": "rand-m9-mstd0.5-inc1",
        "mixup": 0.8,
        "cutmix": 1.0,
        "reprob": 0.25,
        "smoothing": 0.1,
        "drop_path": entry.config.drop_path,
    }


_SMALL_FIELD = FocalNetConfig()
_LARGE_FIELD = replace(_SMALL_FIELD, levels=(3, 3, 3, 3))
_ISOTROPIC = FocalNetConfig(patch_size=16, dim=192, depths=(12,), levels=(3,), windows=(3,))
_LARGE = FocalNetConfig(
    img_size=384,
    num_classes=21842,
    dim=192,
    depths=(2, 2, 18, 2),
    levels=(3, 3, 3, 3),
    windows=(5, 5, 5, 5),
    conv_embed=True,
    layer_scale=1e-4,
    post_norm=True,
    drop_path=0.5,
)
_FOUR = {"levels": (4, 4, 4, 4), "windows": (3, 3, 3, 3)}
_HUGE = replace(_LARGE, img_size=224, dim=352, windows=(3, 3, 3, 3), post_norm_in_modulation=True)

register_models(
    FocalNet,
    # For images of 8 to 32 pixels a side: the size of `vit_micro`, two stages.
    focalnet_micro=FocalNetConfig(
        img_size=8,
        patch_size=1,
        in_chans=1,
        num_classes=10,
        dim=32,
        depths=(2, 4),
        levels=(2, 2),
        windows=(3, 3),
        mlp_ratio=2.0,
        drop_path=0.0,
    ),
    focalnet_tiny_srf=_SMALL_FIELD,
    focalnet_tiny_lrf=_LARGE_FIELD,
    focalnet_small_srf=replace(_SMALL_FIELD, depths=(2, 2, 18, 2), drop_path=0.3),
    focalnet_small_lrf=replace(_LARGE_FIELD, depths=(2, 2, 18, 2), drop_path=0.3),
    focalnet_base_srf=replace(_SMALL_FIELD, dim=128, depths=(2, 2, 18, 2), drop_path=0.5),
    focalnet_base_lrf=replace(_LARGE_FIELD, dim=128, depths=(2, 2, 18, 2), drop_path=0.5),
    focalnet_tiny_iso=_ISOTROPIC,
    focalnet_small_iso=replace(_ISOTROPIC, dim=384),
    focalnet_base_iso=replace(_ISOTROPIC, dim=768, layer_scale=1e-4, post_norm=True),
    # Released with ImageNet-22K's classes.
    focalnet_large_fl3=_LARGE,
    focalnet_large_fl4=replace(_LARGE, **_FOUR, normalize_modulator=True),
    focalnet_xlarge_fl3=replace(_LARGE, dim=256),
    focalnet_xlarge_fl4=replace(_LARGE, dim=256, **_FOUR),
    focalnet_huge_fl3=_HUGE,
    focalnet_huge_fl4=replace(_HUGE, **_FOUR),
)
