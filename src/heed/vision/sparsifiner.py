"""Sparsifiner (card 17): vision transformers in which every query attends to the keys that a small predictor picks for it.

    x = [class token, patches(image)] + positions                     (B, N, C)
    x = x + attention(LN(x)) / skip;  x = x + MLP(LN(x)) / skip       depth times, see heed.layers.sparsifiner
    after the attention of a pruning layer, patches that the class token attends to least are set to 0 for good
    logits = head(LN(x) of the class token)

Wei, Duke, Jiang, Aarabi, Taylor, Shkurti, "Sparsifiner", CVPR 2023, arXiv 2303.13755. Parameter names are the authors'
(and DeiT's). The LV-ViT based model follows Jiang et al., "All Tokens Matter", NeurIPS 2021, as heed reads it; it has not
been compared with the authors' code. Objectives and schedule are in `heed.vision.sparsifiner_training`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Bool, Float
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn

from heed.catalogue import provides
from heed.layers.sparsifiner import AttentionTrace, ConnectivityPredictor, SparsifinerAttention
from heed.models import register_models
from heed.vision.backbone import ClassTokenBackbone
from heed.vision.parts import PatchEmbed, drop_path_rates, init_linear

M = TypeVar("M", bound=nn.Module)


@provides("17-sparsifiner")
@dataclass(frozen=True)
class SparsifinerConfig:
    """Settings of `Sparsifiner`; the defaults are Sparsifiner-S.

    Args:
        img_size: side of the square images in pixels; a multiple of patch_size.
        patch_size: side of a patch in pixels.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        dim: channels.
        depth: blocks.
        num_heads: heads per block.
        mlp_ratio: hidden width of the MLP over dim.
        qkv_bias: whether the query, key and value projections have biases.
        keep: share of keys that a query keeps, one for all blocks or one per block; None selects by score_threshold.
        score_threshold, reduce_n, reduce_c, coef_topk, coef_threshold, basis_threshold, shared_projection, prune_rows,
            share: of the `ConnectivityPredictor`.
        prune_at: blocks that prune tokens, counted from 0.
        token_keep: share of the patches left after the first of them, p; p^2 after the second and so on. Or the shares
            themselves, one per block.
        stem: "patch", a convolution of patch_size, or "conv", LV-ViT's three convolutions before one of patch_size / 2.
        skip: residual branches are divided by this (LV-ViT).
        norm_eps: of the LayerNorms.
        drop_path: stochastic depth of the last block, linear from 0.
    """

    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    keep: float | tuple[float, ...] | None = 0.25
    score_threshold: float | None = None
    reduce_n: int = 6
    reduce_c: int = 2
    coef_topk: int | None = 8
    coef_threshold: float = 0.05
    basis_threshold: float = 0.02
    shared_projection: bool = False
    prune_rows: bool = False
    share: int = 1
    prune_at: tuple[int, ...] = ()
    token_keep: float | tuple[float, ...] = 0.7
    stem: str = "patch"
    skip: float = 1.0
    norm_eps: float = 1e-6
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size={self.img_size} is not a multiple of patch_size={self.patch_size}")
        if self.stem not in ("patch", "conv"):
            raise ValueError(f"unknown stem {self.stem!r}; 'patch' or 'conv'")
        if self.stem == "conv" and self.patch_size % 2:
            raise ValueError(f"patch_size={self.patch_size} must be even for stem='conv', which halves the sides first")
        for name in ("keep", "token_keep"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.depth:
                raise ValueError(
                    f"{name} has {len(value)} shares for depth={self.depth}; give one share, or one per block"
                )
        shares = self.token_keep if isinstance(self.token_keep, tuple) else (self.token_keep,)
        if not all(0 < share <= 1 for share in shares):
            raise ValueError(f"token_keep={self.token_keep} must lie in (0, 1]; it is the share of patches that stay")
        if not all(0 <= i < self.depth for i in self.prune_at):
            raise ValueError(f"prune_at={self.prune_at} must name blocks 0..{self.depth - 1}")
        if self.prune_at and self.share > 1:
            raise ValueError(f"prune_at={self.prune_at} with share={self.share}: token pruning needs share=1")

    @property
    def patches(self) -> int:
        return (self.img_size // self.patch_size) ** 2

    def left(self, block: int) -> int:
        """Patches that are left after a block."""
        times = sum(i <= block for i in self.prune_at)
        if not times:
            return self.patches
        share = self.token_keep[block] if isinstance(self.token_keep, tuple) else self.token_keep**times
        return math.ceil(share * self.patches)

    def attention(self, block: int) -> SparsifinerAttention:
        """The attention of a block."""
        return SparsifinerAttention(
            self.dim,
            self.num_heads,
            self.patches + 1,
            qkv_bias=self.qkv_bias,
            keep=self.keep[block] if isinstance(self.keep, tuple) else self.keep,
            score_threshold=self.score_threshold,
            reduce_n=self.reduce_n,
            reduce_c=self.reduce_c,
            coef_topk=self.coef_topk,
            coef_threshold=self.coef_threshold,
            basis_threshold=self.basis_threshold,
            shared_projection=self.shared_projection,
            prune_rows=self.prune_rows,
            share=self.share,
        )


class ConvStem(nn.Module):
    """LV-ViT's patch embedding (B, in_chans, H, W) -> (B, h, w, dim): 7x7 of stride 2, two 3x3, then patch_size / 2."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, dim, patch_size // 2, patch_size // 2)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w dim"]:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(conv(x)).relu()
        return self.proj(x).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Pre-norm block on (B, N, C); `left` patches stay after it, None for all that came."""

    def __init__(self, config: SparsifinerConfig, index: int, drop_path: float) -> None:
        super().__init__()
        c = config
        self.norm1 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.attn = c.attention(index)
        self.norm2 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.mlp = Mlp(c.dim, int(c.dim * c.mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.skip = c.skip
        self.left = c.left(index) if index in c.prune_at else None

    def forward(
        self, x: Float[Tensor, "B N C"], token_mask: Bool[Tensor, "B P"] | None = None, *, trace: bool = False
    ) -> Visit:
        """Mix tokens; with `trace` densely, keeping masks and weights."""
        found, first = None, None
        prunes = self.left is not None and not self.attn.mask_predictor.reconstructs
        if trace:
            found = self.attn.trace(self.norm1(x), token_mask)
            y, first = found.output, found.masked[:, :, :1]
        else:
            y, first = self.attn.attend(self.norm1(x), token_mask, weights=prunes)
        if prunes and first is not None and self.left is not None:
            token_mask = most_attended(first[:, :, 0, 1:], self.left, token_mask)
        x = x + self.drop_path(y) / self.skip
        x = x + self.drop_path(self.mlp(self.norm2(x))) / self.skip
        if token_mask is not None:
            x = torch.cat([x[:, :1], x[:, 1:] * token_mask[..., None]], 1)
        return Visit(x, token_mask, found)


class Visit(NamedTuple):
    """What a block leaves: tokens (B, N, C), the patches that stay (B, N - 1) bool, and its attention in full."""

    tokens: Tensor
    token_mask: Tensor | None
    trace: AttentionTrace | None


class Run(NamedTuple):
    """A forward pass in full: logits, normed patch tokens (B, N - 1, C), and one visit per block."""

    logits: Tensor
    tokens: Tensor
    visits: list[Visit]

    @property
    def traces(self) -> list[AttentionTrace]:
        return [visit.trace for visit in self.visits if visit.trace is not None]


@provides("17-sparsifiner")
def most_attended(
    weights: Float[Tensor, "B h P"], count: int, token_mask: Bool[Tensor, "B P"] | None = None
) -> Bool[Tensor, "B P"]:
    """The `count` patches that the class token attends to most, on average over heads, among those that are left."""
    score = weights.detach().mean(1)
    if token_mask is not None:
        score = score.masked_fill(~token_mask, -torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order, True)


@provides("17-sparsifiner")
class Sparsifiner(ClassTokenBackbone):
    """(B, in_chans, img_size, img_size) images to (B, num_classes) logits; see the module for the equations."""

    Config = SparsifinerConfig

    def __init__(self, config: SparsifinerConfig) -> None:
        super().__init__(config)
        c = config
        self.num_classes = c.num_classes
        self.num_features = c.dim
        self.feature_info = [
            {"num_chs": c.dim, "reduction": c.patch_size, "module": f"blocks.{i}"} for i in range(c.depth)
        ]
        if c.stem == "conv":
            self.patch_embed = ConvStem(c.in_chans, c.dim, c.patch_size)
        else:
            self.patch_embed = PatchEmbed(c.in_chans, c.dim, c.patch_size, norm=False, fill=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.dim))
        self.pos_embed = nn.Parameter(torch.empty(1, c.patches + 1, c.dim))
        (rates,) = drop_path_rates(c.drop_path, [c.depth])
        self.blocks = nn.ModuleList(Block(c, i, rate) for i, rate in enumerate(rates))
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.head = self.classifier(c.num_classes)
        self.apply(init_linear)
        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)

    def run(self, x: Float[Tensor, "B C H W"], *, trace: bool = False) -> Run:
        """The whole network with what happened inside; with `trace` densely, masks and weights included."""
        self.check_images(x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x).flatten(1, 2)], 1)
        tokens, token_mask, visits = tokens + self.pos_embed, None, []
        for block in self.blocks:
            visits.append(block(tokens, token_mask, trace=trace))
            tokens, token_mask = visits[-1].tokens, visits[-1].token_mask
        tokens = self.norm(tokens)
        return Run(self.head(tokens[:, 0]), tokens[:, 1:], visits)

    def maps_and_token(self, x: Float[Tensor, "B C H W"]) -> tuple[list[Tensor], Tensor]:
        side = self.config.img_size // self.config.patch_size
        visits = self.run(x).visits
        maps = [visit.tokens[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2) for visit in visits]
        return maps, self.norm(visits[-1].tokens)[:, 0]

    def load_authors(self, weights: dict[str, Tensor], source: str = "the authors' weights") -> Sparsifiner:
        if self.config.shared_projection:  # they store the shared tensor twice
            weights = {key: value for key, value in weights.items() if not key.endswith(".proj_back_n")}
        return super().load_authors(weights, source)

    def idle_parameters(self) -> list[str]:
        """The predictors' parameters: no gradient passes through the choice of keys."""
        return [name for name, _ in self.named_parameters() if ".mask_predictor." in name]


@provides("17-sparsifiner")
def sparsify(model: M, **options: Any) -> M:
    """Replace every attention of a timm VisionTransformer (ViT, DeiT), in place; its weights stay in use.

    Args:
        model: has `blocks[i].attn` (with qkv and proj), `pos_embed` or `patch_embed.num_patches`, `num_prefix_tokens`.
        options: settings of the `ConnectivityPredictor`.

    Returns:
        The model. Its predictors are untrained: fit them with `heed.vision.sparsifiner_training`.

    Raises:
        ValueError: a model without such blocks, or attention that cannot be converted.
    """
    blocks, embed = getattr(model, "blocks", None), getattr(model, "patch_embed", None)
    if blocks is None or not hasattr(embed, "num_patches"):
        raise ValueError(
            f"{type(model).__name__} has no blocks[i].attn and patch_embed.num_patches, as timm's ViTs have"
        )
    prefix = getattr(model, "num_prefix_tokens", 1)
    tokens = prefix + embed.num_patches  # type: ignore[union-attr,operator]
    converted = [SparsifinerAttention.from_attention(b.attn, tokens, prefix=prefix, **options) for b in blocks]  # type: ignore[union-attr]
    for block, attention in zip(blocks, converted, strict=True):  # type: ignore[arg-type]
        block.attn = attention.train(block.training)
    return model


@provides("17-sparsifiner")
def predictors(model: nn.Module) -> Iterator[ConnectivityPredictor]:
    """The connectivity predictors of a model, first to last."""
    return (module for module in model.modules() if isinstance(module, ConnectivityPredictor))


@provides("17-sparsifiner")
def sparsity_report(model: Sparsifiner, *, density: float | None = None) -> list[dict[str, float]]:
    """Multiply-adds of the attention products of one image, per block.

    Token pruning counts as if pruned tokens were left out, as the paper counts it.

    Args:
        model: any Sparsifiner.
        density: share of basis entries that are not 0; default the measured one.

    Returns:
        Per block: "tokens" that take part, "kept" share of all N x N pairs, "density", "dense", "predictor", "up" and
        "attention" multiply-adds, and "reduction", the share of the dense ones that is saved.
    """
    rows = []
    for i, block in enumerate(model.blocks):
        layer = cast(SparsifinerAttention, block.attn)
        left = (model.config.left(i - 1) if i else model.config.patches) + 1
        own = (layer.mask_predictor.basis() != 0).float().mean().item() if density is None else density
        macs = layer.macs(density=own, active=left)
        work = macs["predictor"] + macs["up"] + macs["attention"]
        shares = {"kept": macs["attention"] / macs["dense"], "density": own, "reduction": 1 - work / macs["dense"]}
        rows.append({"tokens": left, **shares, **macs})
    return rows


register_models(
    Sparsifiner,
    # For images of 8 to 32 pixels: the size of `vit_micro`. So small a network spreads its attention thinly, and a
    # basis fitted to it has small entries.
    sparsifiner_micro=SparsifinerConfig(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        dim=64,
        depth=4,
        num_heads=4,
        mlp_ratio=2.0,
        reduce_n=2,
        basis_threshold=0.001,
    ),
    sparsifiner_small=SparsifinerConfig(),
    sparsifiner_small_pruned=SparsifinerConfig(prune_at=(3, 6, 9)),
    sparsifiner_lvvit_small=SparsifinerConfig(
        depth=16, mlp_ratio=3.0, qkv_bias=False, stem="conv", skip=2.0, norm_eps=1e-5, drop_path=0.1
    ),
)
