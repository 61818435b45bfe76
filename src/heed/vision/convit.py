"""ConViT (card 16): a vision transformer whose first layers start as convolutions and are free to stop being so.

    x = patches(image) + positions                              (B, N, C)
    blocks 0 .. local_up_to_layer - 1:   x = x + GPSA(LN(x));  x = x + MLP(LN(x))
    the class token joins                                       (B, 1 + N, C)
    later blocks:                        x = x + MHSA(LN(x));  x = x + MLP(LN(x))
    logits = head(LN(x) of the class token)

d'Ascoli, Touvron, Leavitt, Morcos, Biroli, Sagun, "ConViT: Improving Vision Transformers with Soft Convolutional
Inductive Biases", ICML 2021, arXiv 2103.10697. Parameter names are the authors', and timm's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn

from heed.catalogue import provides
from heed.layers.gpsa import GPSA, MHSA
from heed.models import register_models
from heed.vision.backbone import ClassTokenBackbone
from heed.vision.parts import PatchEmbed, drop_path_rates, init_linear


@provides("16-convit")
@dataclass(frozen=True)
class ConViTConfig:
    """Settings of `ConViT`; the defaults are ConViT-Ti.

    Args:
        img_size: side of the square images in pixels; a multiple of patch_size. Without position embeddings, images may
            have any sides that are multiples of patch_size.
        patch_size: side of a patch in pixels.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        dim: channels C of all heads together (the authors' command line takes them per head).
        depth: blocks.
        num_heads: heads per block.
        local_up_to_layer: blocks with GPSA, from 0 to depth - 1, since the class token joins after them and has to attend
            somewhere; a negative number counts from the end.
        locality_strength, local_init, mode, freeze_gates, freeze_positions: of GPSA, see `heed.layers.gpsa.GPSA`.
        mlp_ratio: hidden width of the MLP over dim.
        qkv_bias: whether the query, key and value projections have biases.
        qk_scale: factor on q k^T, default (dim / num_heads) ** -0.5.
        norm_eps: of the LayerNorms.
        pos_embed: add learned absolute positions to the patches.
        drop: dropout in the MLPs and after the attention's output.
        attn_drop: dropout on attention weights.
        drop_path: stochastic depth of the last block, linear from 0.
    """

    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    dim: int = 192
    depth: int = 12
    num_heads: int = 4
    local_up_to_layer: int = 10
    locality_strength: float = 1.0
    local_init: bool = True
    mode: str = "gated"
    freeze_gates: bool = False
    freeze_positions: bool = False
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    qk_scale: float | None = None
    norm_eps: float = 1e-6
    pos_embed: bool = True
    drop: float = 0.0
    attn_drop: float = 0.0
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size={self.img_size} is not a multiple of patch_size={self.patch_size}")
        if not -self.depth <= self.local_up_to_layer < self.depth:
            raise ValueError(
                f"local_up_to_layer={self.local_up_to_layer} with depth={self.depth} leaves no block for the class token; "
                f"{self.depth - 1} is the most"
            )

    @property
    def local_blocks(self) -> int:
        """How many blocks have GPSA."""
        return self.local_up_to_layer % self.depth


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)), on (B, N, C)."""

    def __init__(self, config: ConViTConfig, attention: GPSA | MHSA, drop_path: float) -> None:
        super().__init__()
        c = config
        self.norm1 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.mlp = Mlp(c.dim, int(c.dim * c.mlp_ratio), drop=c.drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B N C"], *grid: int) -> Float[Tensor, "B N C"]:
        """Mix tokens; `grid` is (rows, columns) for GPSA."""
        x = x + self.drop_path(self.attn(self.norm1(x), *grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@provides("16-convit")
class ConViT(ClassTokenBackbone):
    """(B, in_chans, img_size, img_size) images to (B, num_classes) logits; see the module for the equations.

    `forward_intermediates` gives the patch tokens after every block.
    """

    Config = ConViTConfig

    def __init__(self, config: ConViTConfig) -> None:
        super().__init__(config)
        c = config
        self.num_classes = c.num_classes
        self.num_features = c.dim
        self.feature_info = [
            {"num_chs": c.dim, "reduction": c.patch_size, "module": f"blocks.{i}"} for i in range(c.depth)
        ]
        self.patch_embed = PatchEmbed(c.in_chans, c.dim, c.patch_size, norm=False, fill=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.dim))
        self.pos_embed = nn.Parameter(torch.empty(1, (c.img_size // c.patch_size) ** 2, c.dim)) if c.pos_embed else None
        (rates,) = drop_path_rates(c.drop_path, [c.depth])
        self.blocks = nn.ModuleList(Block(c, _attention(c, i), rate) for i, rate in enumerate(rates))
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.head = self.classifier(c.num_classes)
        self.apply(init_linear)
        for layer in self.gpsa_layers() if c.local_init else ():  # once more: it is what init_linear has undone
            layer.local_init()
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)

    def gpsa_layers(self) -> list[GPSA]:
        """The GPSA layers, first to last."""
        return [block.attn for block in self.blocks if isinstance(block.attn, GPSA)]

    def idle_parameters(self) -> list[str]:
        """Names of the parameters that get no gradient: softmax takes the positional bias out, and a mode or a frozen
        part may leave more of GPSA's parameters unused."""
        unused = {"gated": (), "position": ("qk.", "gating_param"), "content": ("pos_proj.", "gating_param")}
        return [
            name
            for name, parameter in self.named_parameters()
            if name.endswith("pos_proj.bias")
            or not parameter.requires_grad
            or any(f".attn.{part}" in name for part in unused[self.config.mode])
        ]

    def check_images(self, x: Tensor) -> None:
        c = self.config
        if x.ndim != 4 or x.shape[1] != c.in_chans:
            raise ValueError(f"input {tuple(x.shape)}: this model takes images (B, {c.in_chans}, H, W)")
        if self.pos_embed is not None and x.shape[2:] != (c.img_size, c.img_size):
            raise ValueError(
                f"images of {x.shape[2]} x {x.shape[3]} pixels given; this model's positions are those of {c.img_size} x "
                f"{c.img_size}: resize the images, or interpolate the positions with set_image_size()"
            )
        if any(side % c.patch_size or not side for side in x.shape[2:]):
            raise ValueError(f"images of {x.shape[2]} x {x.shape[3]} pixels hold no whole patches of {c.patch_size}")

    def maps_and_token(self, x: Float[Tensor, "B C H W"]) -> tuple[list[Tensor], Tensor]:
        visits = self._run(x)
        rows, columns = (side // self.config.patch_size for side in x.shape[2:])
        maps = [v.after[:, -rows * columns :].unflatten(1, (rows, columns)).permute(0, 3, 1, 2) for v in visits]
        return maps, self.norm(visits[-1].after[:, 0])

    def block_outputs(self, x: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B N C"]]:
        """The tokens after every block; from block `local_up_to_layer` on, the first one is the class token."""
        self.check_images(x)
        return [visit.after for visit in self._run(x)]

    @torch.no_grad()
    def attention_maps(self, x: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B h N N"]]:
        """The attention weights of every block, with the class token first where it takes part."""
        self.check_images(x)
        return [v.block.attn.attention(v.block.norm1(v.before), *v.grid) for v in self._run(x)]

    @torch.no_grad()
    def nonlocality(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "depth h"]:
        """Mean distance in patches between a query and what it attends to, per block and head, averaged over images."""
        self.check_images(x)
        rows, columns = (side // self.config.patch_size for side in x.shape[2:])
        return torch.stack([v.block.attn.nonlocality(v.block.norm1(v.before), rows, columns) for v in self._run(x)])

    @torch.no_grad()
    def gates(self) -> Float[Tensor, "layers h"]:
        """g per GPSA layer and head: 1 where only positions count, 0 where only content does."""
        layers = self.gpsa_layers()
        return torch.stack([layer.gates for layer in layers]) if layers else torch.empty(0, self.config.num_heads)

    def set_image_size(self, img_size: int) -> None:
        """Change the size of the images that the model takes; positions are interpolated bicubically (heed's choice).

        Args:
            img_size: side in pixels; a multiple of patch_size.
        """
        self.config = dataclasses.replace(self.config, img_size=img_size)
        if self.pos_embed is None:
            return
        _, tokens, dim = self.pos_embed.shape
        old, new = round(tokens**0.5), img_size // self.config.patch_size
        grid = self.pos_embed.detach().view(1, old, old, dim).permute(0, 3, 1, 2).float()
        resized = F.interpolate(grid, (new, new), mode="bicubic", antialias=new < old).permute(0, 2, 3, 1)
        self.pos_embed = nn.Parameter(resized.reshape(1, new * new, dim).to(self.pos_embed.dtype))

    def _run(self, x: Tensor) -> list[_Visit]:
        """Take the patches, and later the class token, through the blocks."""
        c = self.config
        patches = self.patch_embed(x)
        rows, columns = patches.shape[1:3]
        tokens = patches.flatten(1, 2)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        visits = []
        for i, block in enumerate(self.blocks):
            if i == c.local_blocks:
                tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)
            grid = (rows, columns) if i < c.local_blocks else ()
            visits.append(_Visit(block, grid, tokens, block(tokens, *grid)))  # type: ignore[arg-type]
            tokens = visits[-1].after
        return visits


class _Visit(NamedTuple):
    """The tokens (B, N, C) before and after a block, and the grid (rows, columns) where the block asks for it."""

    block: Block
    grid: tuple[int, ...]
    before: Tensor
    after: Tensor


@provides("16-convit")
class LocalityLog:
    """Records how local a ConViT is while it trains: call it after some steps, then look at `gates` and `nonlocality`.

    Args:
        model: the model that is trained.
        images: (B, C, H, W) images that the non-locality is measured on, always the same.
    """

    def __init__(self, model: ConViT, images: Float[Tensor, "B C H W"]) -> None:
        self.model = model
        self.images = images
        self.steps: list[Hashable] = []
        self.gates: list[Tensor] = []  # (GPSA layers, heads) each
        self.nonlocality: list[Tensor] = []  # (depth, heads) each, in patches

    def __call__(self, step: Hashable) -> None:
        """Record the model as it is now, under a name for the moment, such as the epoch."""
        training = self.model.training
        self.model.eval()
        self.steps.append(step)
        self.gates.append(self.model.gates().cpu())
        self.nonlocality.append(self.model.nonlocality(self.images).cpu())
        self.model.train(training)


@provides("16-convit")
def subsample_classes(labels: Sequence[int], ratio: float, names: Sequence[str] | None = None) -> list[int]:
    """The same share of every class, for experiments on sample efficiency: the first int(n * ratio) of its n samples.

    Args:
        labels: class of every sample.
        ratio: share to keep, in (0, 1].
        names: file names; samples of a class are taken in their alphabetical order, otherwise in the order given.

    Returns:
        Indices of the samples that are kept, class after class, as `torch.utils.data.Subset` takes them.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} must lie in (0, 1]")
    if names is not None and len(names) != len(labels):
        raise ValueError(f"{len(names)} names for {len(labels)} labels; one for each is needed")
    members: dict[int, list[int]] = {}
    for i in sorted(range(len(labels)), key=names.__getitem__) if names is not None else range(len(labels)):
        members.setdefault(labels[i], []).append(i)
    return [i for label in sorted(members) for i in members[label][: int(len(members[label]) * ratio)]]


def _attention(config: ConViTConfig, index: int) -> GPSA | MHSA:
    c = config
    if index >= c.local_blocks:
        return MHSA(
            c.dim, c.num_heads, qkv_bias=c.qkv_bias, qk_scale=c.qk_scale, attn_drop=c.attn_drop, proj_drop=c.drop
        )
    return GPSA(
        c.dim,
        c.num_heads,
        qkv_bias=c.qkv_bias,
        qk_scale=c.qk_scale,
        attn_drop=c.attn_drop,
        proj_drop=c.drop,
        locality_strength=c.locality_strength,
        local_init=c.local_init,
        mode=c.mode,
        freeze_gates=c.freeze_gates,
        freeze_positions=c.freeze_positions,
    )


register_models(
    ConViT,
    # For images of 8 to 32 pixels: the size of `vit_micro`, its last block with the class token.
    convit_micro=ConViTConfig(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        dim=64,
        depth=4,
        num_heads=4,
        local_up_to_layer=-1,
        mlp_ratio=2.0,
        drop_path=0.0,
    ),
    convit_tiny=ConViTConfig(),
    convit_tiny_plus=ConViTConfig(dim=256),
    convit_small=ConViTConfig(dim=432, num_heads=9),
    convit_small_plus=ConViTConfig(dim=576, num_heads=9),
    convit_base=ConViTConfig(dim=768, num_heads=16),
    convit_base_plus=ConViTConfig(dim=1024, num_heads=16),
)
