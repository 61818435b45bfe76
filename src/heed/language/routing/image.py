"""Images as sequences of channel values, one after the other: the authors' image model.

    x = E_c[value] + C[c] (+ sinusoids)       one table of 256 and one vector per channel c, moved by one place
    x = blocks(x);  logits = x W + b          (B, C, H, W, 256);  bits per dimension = mean cross-entropy / ln 2

A one-dimensional block takes the values row by row, a pixel's channels side by side: (H W C). A two-dimensional block
(rows, columns) is a box of the grid (H, W C), and values follow each other block by block: the blocked order, in which
"earlier" is meant. Roy et al., TACL 2021, arXiv 2003.05997; blocks as in Image Transformer (Parmar et al., ICML 2018),
arXiv 1802.05751. The sum of value and channel vectors and the order of boxes are heed's reading; no case holds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.language.routing.cache import LayerCache
from heed.language.routing.config import RoutingConfig
from heed.language.routing.local import from_blocks, grid_of, to_blocks
from heed.language.routing.stack import AuxiliaryLoss, RoutingStack, init_linear, sinusoids
from heed.models import HeedModel, register_models


@provides("08-routing")
@dataclass(frozen=True)
class RoutingImageConfig(RoutingConfig):
    """Settings of the blocks, relative positions being off by default, and

    Args:
        img_size: (H, W).
        in_chans: C, values per pixel.
    """

    vocab: int = 256
    relative: tuple[Any, ...] = ()
    max_relative: int | None = None
    ffn: Any = "relu"
    timing: bool = True
    img_size: tuple[int, int] = (32, 32)
    in_chans: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.block) not in (1, 2):
            raise ValueError(f"block={self.block} needs one side (values row by row) or two (rows, values of a row)")
        if not self.masked:
            raise ValueError("masked=False: an image model must not see the value it predicts")

    @property
    def grid(self) -> tuple[int, ...]:
        """Places per axis."""
        (rows, columns), values = self.img_size, self.in_chans
        return (rows * columns * values,) if len(self.block) == 1 else (rows, columns * values)


@provides("08-routing")
class RoutingImageModel(AuxiliaryLoss, HeedModel):
    """Predicts every channel value of an image from the values before it.

    Args:
        config: see `RoutingImageConfig`.
    """

    Config = RoutingImageConfig
    config: RoutingImageConfig

    def __init__(self, config: RoutingImageConfig) -> None:
        super().__init__(config)
        c = config
        width = c.embed_dim or c.dim
        self.embed = nn.Embedding(c.vocab * c.in_chans + 1, width)  # the last row stands before the first value
        self.channel = nn.Embedding(c.in_chans, width)
        self.embed_map = nn.Linear(width, c.dim) if width != c.dim else nn.Identity()
        self.drop = nn.Dropout(c.embed_dropout)
        self.blocks = RoutingStack(c)
        self.head = nn.Linear(c.dim, c.vocab)
        for part in (self.embed, self.channel, self.embed_map, self.head):
            init_linear(part)

    def forward(self, images: Int[Tensor, "B C H W"]) -> Float[Tensor, "B C H W V"]:
        """Logits of every value, given those before it in blocked order; `auxiliary_loss` holds the clustering losses.

        Args:
            images: integers 0 .. vocab - 1.
        """
        read = self._shifted(self._values(images))
        x, self.auxiliary_loss = self.blocks(self.drop(self.embed_map(read)))
        return self._pictures(self.head(x), images.shape)

    def bits_per_dim(self, images: Int[Tensor, "B C H W"]) -> Float[Tensor, ""]:
        """Mean bits per channel value."""
        logits = self(images)
        return F.cross_entropy(logits.flatten(0, -2), images.flatten().long()) / math.log(2)

    @torch.no_grad()
    def sample(
        self, count: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Int[Tensor, "B C H W"]:
        """Draw images value by value, with caches; evaluation mode is up to the caller.

        Raises:
            ValueError: blocks that do not tile the image: places without a value have no step.
        """
        c = self.config
        counts = grid_of(c.grid, c.block)
        if any(size % side for size, side in zip(c.grid, c.block, strict=True)):
            raise ValueError(f"blocks {c.block} do not tile the grid {c.grid}; sampling needs that")
        total, channels = math.prod(c.grid), self._channels()
        caches = [LayerCache(total, counts) for _ in range(c.layers)]
        device = self.head.weight.device
        values = torch.zeros(count, total, dtype=torch.long, device=device)
        extra = self._extra()[0]
        x = self.embed.weight[-1].expand(count, 1, -1)
        for at in range(total):
            features = self.blocks.step(self.embed_map(x + extra[at]), caches)
            logits = self.head(features)[:, 0].float() / temperature
            values[:, at] = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
            x = self.embed(values[:, at, None] + channels[at] * c.vocab)
        grid = from_blocks(values.view(count, math.prod(counts), -1, 1), c.grid, c.block)
        return self._pictures(grid, (count, c.in_chans, *c.img_size))[..., 0]

    def _values(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, *grid)."""
        c = self.config
        if images.shape[1:] != (c.in_chans, *c.img_size) or images.is_floating_point():
            raise ValueError(
                f"images must be integers (B, {c.in_chans}, {c.img_size[0]}, {c.img_size[1]}), not {images.dtype} "
                f"{tuple(images.shape)}"
            )
        return images.permute(0, 2, 3, 1).reshape(images.shape[0], *c.grid).long()

    def _pictures(self, grid: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(B, *grid, _) to (B, C, H, W, _)."""
        batch, channels, rows, columns = shape
        return grid.reshape(batch, rows, columns, channels, -1).permute(0, 3, 1, 2, 4)

    def _channels(self) -> Int[Tensor, " T"]:
        """Channel of every place in blocked order."""
        c = self.config
        channel = torch.arange(math.prod(c.grid)) % c.in_chans
        return to_blocks(channel.view(1, *c.grid, 1).float(), c.block).flatten().long().to(self.head.weight.device)

    def _extra(self) -> Float[Tensor, "1 T e"]:
        """Channel vectors and sinusoids of every place in blocked order."""
        c = self.config
        channels = self._channels()
        extra = self.channel(channels)
        if c.timing:
            places = torch.arange(len(channels), device=channels.device, dtype=torch.float32)
            extra = extra + sinusoids(places, extra.shape[-1]).to(extra.dtype)
        return extra[None]

    def _shifted(self, values: Tensor) -> Tensor:
        """What is read at every place: the value before in blocked order, (B, *grid, e)."""
        c = self.config
        offset = torch.arange(math.prod(c.grid), device=values.device).view(c.grid) % c.in_chans * c.vocab
        blocked = to_blocks(self.embed(values + offset), c.block).flatten(1, 2)
        first = self.embed.weight[-1].expand(len(values), 1, -1)
        moved = torch.cat([first, blocked[:, :-1]], 1) + self._extra()
        return from_blocks(moved.unflatten(1, (-1, math.prod(c.block))), c.grid, c.block)


# The released hparams for images; MNIST's is heed's.
register_models(
    RoutingImageModel,
    routing_imagenet64=RoutingImageConfig(
        dim=1024, layers=24, local_heads=12, cluster_heads=4, block=(256,), clusters=8, window=2048, ffn_dim=2048,
        length=12288, dropout=0.3, img_size=(64, 64),
    ),
    routing_cifar10=RoutingImageConfig(
        dim=1024, layers=12, local_heads=4, cluster_heads=4, block=(256,), clusters=6, window=512, ffn_dim=2048,
        length=3072, dropout=0.3, img_size=(32, 32),
    ),
    routing_mnist=RoutingImageConfig(
        dim=128, layers=4, local_heads=2, cluster_heads=2, block=(56,), clusters=8, window=98, ffn_dim=256,
        length=784, img_size=(28, 28), in_chans=1, initial_count=1.0,
    ),
)  # fmt: skip
