"""Vision transformers with grouped-query attention (card 46), and how a trained one with multi-head attention becomes one.

    x = [class token; patches(image)] + positions                          (B, N + 1, C)
    x = x + attention(LN(x));  x = x + MLP(LN(x))                          depth times, attention from heed.layers.grouped
    logits = head(LN(x)[0])

The layout is timm's, so timm's weights fit but for qkv, whose keys and values are pooled: ViT -> converted ViT ->
up-training on general data -> fine-tuning on one's own.

Khan et al., "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention", 2024 (arXiv 2408.08454).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torchvision.transforms import v2

from heed.catalogue import provides
from heed.checkpoint import load_weights
from heed.layers.allocation import uniform_allocation
from heed.layers.attention import check_heads
from heed.layers.grouped import DGQA, KDGQA, SCHEMES, check_groups, grouped_layers, grouped_scheme, grouped_weights
from heed.models import register_models
from heed.vision.backbone import ClassTokenBackbone
from heed.vision.parts import drop_path_rates, init_linear


@provides("46-kdgqa")
@dataclass(frozen=True)
class GroupedViTConfig:
    """Settings of `GroupedViT`; the defaults are ViT-S/16 with half its key-value heads.

    Args:
        img_size: side of the square input image in pixels; a multiple of patch_size.
        patch_size: side of a patch in pixels.
        in_chans: image channels.
        num_classes: outputs; 0 for features only.
        dim: channels C.
        depth: blocks.
        num_heads: query heads per block.
        num_kv_heads: key-value heads per block, 1 to num_heads; "mhsa" has num_heads whatever this says.
        att_scheme: "mhsa", "gqa", "kdgqa", "dgqa_diff", "dgqa_ema" or "pgqa", see `heed.layers.grouped`.
        window: training steps between the splits of "dgqa_*".
        mlp_ratio: hidden width of the MLP over dim.
        qkv_bias: whether queries, keys and values have biases.
        drop_path: stochastic depth of the last block, linear from 0.
        frozen: keep the allocations that the weights hold; `freeze_allocation` sets it.
    """

    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    num_kv_heads: int = 3
    att_scheme: str = "kdgqa"
    window: int = 10
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path: float = 0.0
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size={self.img_size} is not a multiple of patch_size={self.patch_size}")
        if self.att_scheme not in ("mhsa", *SCHEMES):
            raise ValueError(f"unknown att_scheme {self.att_scheme!r}; known: mhsa, {', '.join(SCHEMES)}")
        check_heads(self.dim, self.num_heads)
        check_groups(self.num_heads, self.num_kv_heads)


@provides("46-kdgqa")
class GroupedViT(ClassTokenBackbone):
    """(B, in_chans, img_size, img_size) images to (B, num_classes) logits; see the module for the equations.

    With "kdgqa" and "dgqa_*" results depend on the batch, as in the authors' code, until `freeze_allocation`; with
    "pgqa" they are random. Biases of keys are idle: they add the same to all scores of a query.
    """

    Config = GroupedViTConfig

    def __init__(self, config: GroupedViTConfig) -> None:
        super().__init__(config)
        c = config
        self.num_classes = c.num_classes
        self.num_features = c.dim
        self.feature_info = [
            {"num_chs": c.dim, "reduction": c.patch_size, "module": f"blocks.{i}"} for i in range(c.depth)
        ]
        self.patch_embed = PatchEmbed(c.img_size, c.patch_size, c.in_chans, c.dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.dim))
        self.pos_embed = nn.Parameter(torch.empty(1, (c.img_size // c.patch_size) ** 2 + 1, c.dim))
        (rates,) = drop_path_rates(c.drop_path, [c.depth])
        self.blocks = nn.ModuleList(_block(c, rate) for rate in rates)
        self.norm = nn.LayerNorm(c.dim, eps=1e-6)
        self.head = self.classifier(c.num_classes)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)
        if c.frozen:
            self.freeze_allocation()

    @classmethod
    def describe_input(cls, config: Any) -> dict[str, Any]:
        half = (0.5,) * config.in_chans  # how the authors normalise
        return super().describe_input(config) | {"mean": half, "std": half}

    def idle_parameters(self) -> set[str]:
        """Names of the parameters whose gradient is 0 but for rounding."""
        return {f"{name}.k.bias" for name, layer in grouped_layers(self).items() if layer.k.bias is not None}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that timm's optimiser factory should not decay."""
        return {"pos_embed", "cls_token"}

    def embed(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """What the blocks start from: the class token and patches, with positions."""
        return torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1) + self.pos_embed

    def maps_and_token(self, x: Float[Tensor, "B C H W"]) -> tuple[list[Tensor], Tensor]:
        tokens, side = self.embed(x), self.config.img_size // self.config.patch_size
        maps = []
        for block in self.blocks:
            tokens = block(tokens)
            maps.append(tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side)))
        return maps, self.norm(tokens[:, 0])

    def allocations(self) -> Int[Tensor, "depth G"]:
        """Query heads per key-value head in every block, as they are now."""
        found = list(grouped_layers(self).values())
        if not found:
            raise ValueError(f"att_scheme={self.config.att_scheme!r} has no groups to report")
        return torch.stack([layer.allocation for layer in found])

    def freeze_allocation(self) -> None:
        """Keep the allocations of the last forward pass in every block; saved with the model."""
        for layer in grouped_layers(self).values():
            if isinstance(layer, KDGQA | DGQA):
                layer.freeze_allocation()
        self.config = replace(self.config, frozen=True)

    def load_authors(self, weights: dict[str, Tensor], source: str = "the authors' weights") -> Self:
        """Load a state dict of the authors' model, which has no allocations: they start uniform."""
        c = self.config
        even = uniform_allocation(c.num_heads, c.num_kv_heads)
        return super().load_authors({k: even for k in self.state_dict() if k.endswith(".split")} | weights, source)

    def load_timm(
        self,
        weights: dict[str, Tensor],
        source: str = "timm's weights",
        *,
        load_final_norm: bool = True,
        load_head: bool = False,
        pool: str = "mean",
    ) -> Self:
        """Load a timm `VisionTransformer`'s state dict; keys and values are pooled.

        Args:
            weights: by timm's names, of the same size.
            source: what errors call them.
            load_final_norm: take the final norm; the authors' code leaves it untrained, by a slip.
            load_head: take the classifier; the authors leave it, since they go on to other classes.
            pool: see `heed.layers.grouped.pool_heads`.

        Raises:
            ValueError: weights for images of other channels, weights that this model has no place for (norms of q and
                k, layer scale, ...), or lacks.
        """
        c = self.config
        stem = weights.get("patch_embed.proj.weight")
        if stem is not None and stem.shape[1] != c.in_chans:
            raise ValueError(
                f"in_chans={c.in_chans}, but {source} are for images of {stem.shape[1]} channels; create the model with "
                f"in_chans={stem.shape[1]}"
            )
        own = self.state_dict()
        kept = {key for key in own if key.endswith((".split", ".cache"))}
        kept |= set() if load_final_norm else {"norm.weight", "norm.bias"}
        kept |= set() if load_head else {"head.weight", "head.bias"}
        taken = {key: value for key, value in weights.items() if key not in kept}
        if c.att_scheme != "mhsa":
            for i in range(c.depth):
                start = f"blocks.{i}.attn."
                fused = {key.removeprefix(start): taken.pop(key) for key in list(taken) if key.startswith(start)}
                grouped = grouped_weights(fused, c.num_heads, c.num_kv_heads, pool)
                taken |= {start + key: value for key, value in grouped.items()}
        load_weights(self, {key: own[key] for key in kept if key in own} | taken, source)
        return self

    @classmethod
    def from_timm(
        cls, vit: VisionTransformer, att_scheme: str = "kdgqa", num_kv_heads: int = 3, *, window: int = 10, **load: Any
    ) -> Self:
        """A grouped model of the size of a timm `VisionTransformer`, with its weights.

        Args:
            vit: with a class token and square images, such as timm.create_model("vit_small_patch16_224", pretrained=True).
            att_scheme, num_kv_heads, window: of the new model.
            load: options of `load_timm`.
        """
        block, embed = cast(Any, vit.blocks[0]), cast(Any, vit.patch_embed)
        config = GroupedViTConfig(
            img_size=embed.img_size[0],
            patch_size=embed.patch_size[0],
            in_chans=embed.proj.in_channels,
            num_classes=vit.num_classes,
            dim=vit.embed_dim,
            depth=len(vit.blocks),
            num_heads=block.attn.num_heads,
            num_kv_heads=num_kv_heads,
            att_scheme=att_scheme,
            window=window,
            mlp_ratio=block.mlp.fc1.out_features / vit.embed_dim,
            qkv_bias=block.attn.qkv.bias is not None,
        )
        return cls(config).load_timm(vit.state_dict(), "the ViT's weights", **load).eval()


def _block(config: GroupedViTConfig, drop_path: float) -> Block:
    """timm's block; for "mhsa" with timm's attention."""
    c = config
    norm = cast(Any, lambda dim, **options: nn.LayerNorm(dim, eps=1e-6, **options))
    block = Block(c.dim, c.num_heads, c.mlp_ratio, c.qkv_bias, drop_path=drop_path, norm_layer=norm)
    if c.att_scheme != "mhsa":
        kind, options = grouped_scheme(c.att_scheme, c.window)
        block.attn = cast(Any, kind(c.dim, c.num_heads, c.num_kv_heads, qkv_bias=c.qkv_bias, **options))
    return block


@provides("46-kdgqa")
def group_heads(
    model: nn.Module, scheme: str = "kdgqa", num_kv_heads: int = 3, *, window: int = 10, pool: str = "mean"
) -> list[str]:
    """Replace the multi-head attention of every block of a timm `VisionTransformer`, in place, keeping its weights.

    Args:
        model: has blocks with attn, as timm's ViTs do.
        scheme: "gqa", "kdgqa", "dgqa_diff", "dgqa_ema" or "pgqa".
        num_kv_heads: must divide the heads.
        window: training steps between the splits of "dgqa_*".
        pool: see `heed.layers.grouped.pool_heads`.

    Returns:
        The names of the layers that were replaced.

    Raises:
        ValueError: no such blocks, or attention with parts that would be lost; the model is then as it was.
    """
    kind, options = grouped_scheme(scheme, window)
    blocks = {name: module for name, module in model.named_modules() if hasattr(getattr(module, "attn", None), "qkv")}
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks with fused multi-head attention (attn.qkv)")
    new = {
        name: kind.from_attention(cast(Any, block).attn, num_kv_heads, pool=pool, **options)
        for name, block in blocks.items()
    }
    for name, block in blocks.items():
        block.attn = new[name]
    return [f"{name}.attn" for name in blocks]


# -- training after conversion

# What the authors use for both stages, up-training and fine-tuning: no schedule of the learning rate.
RECIPE: dict[str, Any] = {"epochs": 5, "batch_size": 32, "learning_rate": 1e-5, "weight_decay": 0.01, "seed": 42}


@provides("46-kdgqa")
def grouped_transform(train: bool, img_size: int = 224) -> Callable[[Any], Tensor]:
    """The authors' preparation of pictures: resized to a square, RandAugment for training, values in [-1, 1].

    Args:
        train: whether to augment.
        img_size: side in pixels.
    """
    augment: list[nn.Module] = [v2.RandAugment()] if train else []
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    return v2.Compose([v2.Resize((img_size, img_size)), *augment, *to_tensor])


@provides("46-kdgqa")
def uptrain(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int = 5,
    learning_rate: float = 1e-5,
    weight_decay: float = 0.01,
    after_step: Callable[[int], None] | None = None,
) -> list[float]:
    """Train a converted model with AdamW and cross-entropy at a constant learning rate; the defaults are the authors'.

    Both stages are this function: up-train on general data, exchange the classifier (`model.reset_classifier`), and
    fine-tune on the data that matter.

    Args:
        model: images to logits; with DGQA its steps begin anew every epoch.
        batches: (images, labels) on the model's device; iterated once per epoch.
        epochs: passes over the batches.
        learning_rate, weight_decay: of AdamW.
        after_step: called with the number of steps so far, for instance an `AllocationLog`.

    Returns:
        The loss of every step. The model is left in eval mode.
    """
    if isinstance(batches, Sequence) and not batches:
        raise ValueError("batches is empty; give at least one pair of images and labels")
    optimiser = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    losses: list[float] = []
    model.train()
    for _ in range(epochs):
        for layer in grouped_layers(model).values():
            if isinstance(layer, DGQA):
                layer.start_epoch()
        for images, labels in batches:
            optimiser.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            if after_step is not None:
                after_step(len(losses))
    model.eval()
    return losses


_SMALL = GroupedViTConfig()
_BASE = replace(_SMALL, dim=768, num_heads=12)
_LARGE = replace(_SMALL, dim=1024, depth=24, num_heads=16, num_kv_heads=4)

# Key-value heads of the authors' model functions; every scheme and number of heads of their tables is an override away.
register_models(
    GroupedViT,
    # For images of 8 to 32 pixels a side: the size of `vit_micro`, with more heads for the groups to
    # differ, and patches of 2 x 2 pixels: with single pixels it learned digits far worse.
    grouped_vit_micro=GroupedViTConfig(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        dim=64,
        depth=4,
        num_heads=8,
        num_kv_heads=4,
        mlp_ratio=2.0,
    ),
    grouped_vit_small=_SMALL,
    grouped_vit_base=_BASE,
    grouped_vit_base_kv6=replace(_BASE, num_kv_heads=6, window=300),  # the example of the authors' README
    grouped_vit_large=_LARGE,
)
