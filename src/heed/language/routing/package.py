"""The PyTorch package's models (lucidrains/routing-transformer), `variant="lucidrains"`: what many people trained.

    x = E[ids];   x <- x + attention(norm(x));   x <- x + ffn(norm(x));   logits = LN(x) W + b         (B, T, V)

Attention is in `package_attention.py`. Centroids move after each backward pass through the logits. Texts that local
windows do not tile are padded at the end and masked, as by the package's Autopadder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.language.routing.checkpoint import package_key
from heed.language.routing.package_attention import PackageAttention, UnitKMeans
from heed.language.routing.package_config import PackageConfig
from heed.language.routing.stack import AuxiliaryLoss
from heed.models import HeedModel, register_models


class _ScaleNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5) * self.g


class _FeedForward(nn.Module):
    def __init__(self, config: PackageConfig) -> None:
        super().__init__()
        hidden = config.dim * config.ffn_mult
        self.glu = config.glu
        self.w1 = nn.Linear(config.dim, hidden * (2 if config.glu else 1))
        self.w2 = nn.Linear(hidden, config.dim)
        self.drop = nn.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.glu:
            x, gate = self.w1(x).chunk(2, -1)
            return self.w2(self.drop(F.gelu(x) * gate))
        return self.w2(self.drop(F.gelu(self.w1(x))))


class _Block(nn.Module):
    """Attention, attention to a memory where there is one, network; each with its norm before it, or a weight after it."""

    def __init__(self, config: PackageConfig, local_heads: int, *, cross: bool = False) -> None:
        super().__init__()
        self.attn = PackageAttention(config, local_heads)
        self.cross = PackageAttention(dataclasses.replace(config, causal=False), 0, context=True) if cross else None
        self.ffn = _FeedForward(config)
        for part in ("attn", "cross", "ffn") if cross else ("attn", "ffn"):
            if config.norm == "rezero":
                self.register_parameter(f"{part}_g", nn.Parameter(torch.zeros(1)))
            else:
                norm = nn.LayerNorm(config.dim) if config.norm == "layer" else _ScaleNorm()
                self.add_module(f"{part}_norm", norm)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        y, loss = self.attn(self._before("attn", x), mask)
        x = x + self._after("attn", y)
        if self.cross is not None:
            y, more = self.cross(self._before("cross", x), mask, memory, memory_mask)
            x, loss = x + self._after("cross", y), loss + more
        return x + self._after("ffn", self.ffn(self._before("ffn", x))), loss

    def _before(self, part: str, x: Tensor) -> Tensor:
        norm = getattr(self, f"{part}_norm", None)
        return x if norm is None else norm(x)

    def _after(self, part: str, y: Tensor) -> Tensor:
        weight = getattr(self, f"{part}_g", None)
        return y if weight is None else y * weight


class _Package(AuxiliaryLoss, HeedModel):
    """What the models of this file share."""

    config: PackageConfig

    def update_kmeans(self) -> None:
        """Move the centroids by what the forward passes since the last update found; training does it by itself."""
        for module in self.modules():
            if isinstance(module, UnitKMeans):
                module.update()

    def _watch(self, logits: Tensor) -> Tensor:
        if self.training and logits.requires_grad:
            logits.register_hook(lambda _: self.update_kmeans())
        return logits

    @classmethod
    def authors_key(cls, key: str) -> str | None:
        return package_key(key)

    def load_authors(self, weights: dict[str, Tensor], source: str = "the package's weights") -> Self:
        """Load a state dict of the package's `RoutingTransformerLM`."""
        return super().load_authors(weights, source)


@provides("08-routing")
class PackageLM(_Package):
    """The package's `RoutingTransformerLM`; with causal=False a bidirectional one, and an encoder without `head`.

    Args:
        config: see `PackageConfig`.
        head: False for features (B, T, D) instead of logits.
    """

    Config = PackageConfig

    def __init__(self, config: PackageConfig, *, head: bool = True) -> None:
        super().__init__(config)
        c = config
        self.token_emb = nn.Embedding(c.vocab, c.dim)
        self.blocks = nn.ModuleList(_Block(c, c.local_at(i)) for i in range(c.layers))
        self.norm = nn.LayerNorm(c.dim)
        self.out = nn.Linear(c.dim, c.vocab) if head else nn.Identity()

    def forward(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "B T V"]:
        """Logits of the id after each position, and `auxiliary_loss`; `mask` is False for padding.

        Raises:
            ValueError: more ids than `config.length`.
        """
        windows = (self.config.local_window for i in range(self.config.layers) if self.config.local_at(i))
        x, mask = _padded(ids, mask, self.config.length, windows)
        x, self.auxiliary_loss = _run(self.blocks, self.token_emb(x), mask)
        return self._watch(self.out(self.norm(x[:, : ids.shape[1]])))


@provides("08-routing")
class PackageSeq2Seq(_Package):
    """The package's `RoutingTransformerEncDec`: an encoder, and a decoder that attends to it by routing heads.

    Args:
        config: the decoder's settings, and the encoder's under source_*; its other settings are the decoder's.
    """

    Config = PackageConfig

    def __init__(self, config: PackageConfig) -> None:
        super().__init__(config)
        c = config
        if not c.causal:
            raise ValueError("causal=False: the decoder must not see what it predicts")
        inside = dataclasses.replace(
            c, vocab=c.source_vocab, layers=c.source_layers, length=c.source_length, causal=False, share_qk=False,
            local_heads=c.local_at(0),
        )  # fmt: skip
        self.encoder = PackageLM(inside, head=False)
        self.token_emb = nn.Embedding(c.vocab, c.dim)
        self.blocks = nn.ModuleList(_Block(c, c.local_at(i), cross=True) for i in range(c.layers))
        self.norm = nn.LayerNorm(c.dim)
        self.out = nn.Linear(c.dim, c.vocab)

    def forward(
        self,
        source: Int[Tensor, "B S"],
        ids: Int[Tensor, "B T"],
        source_mask: Bool[Tensor, "B S"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the id after each of `ids`; `source_mask` is False for padding."""
        memory = self.encoder(source, source_mask)
        windows = (self.config.local_window for i in range(self.config.layers) if self.config.local_at(i))
        x, mask = _padded(ids, None, self.config.length, windows)
        x, loss = _run(self.blocks, self.token_emb(x), mask, memory, source_mask)
        self.auxiliary_loss = loss + self.encoder.auxiliary_loss
        return self._watch(self.out(self.norm(x[:, : ids.shape[1]])))


def _padded(ids: Tensor, mask: Tensor | None, length: int, windows: Iterable[int]) -> tuple[Tensor, Tensor | None]:
    if ids.ndim != 2 or ids.shape[1] > length:
        raise ValueError(f"ids {tuple(ids.shape)} must be (B, T) with T up to length={length}")
    missing = -ids.shape[1] % max(windows, default=1)
    if missing:
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        ids, mask = F.pad(ids, (0, missing)), F.pad(mask, (0, missing))
    return ids, mask


def _run(blocks: nn.ModuleList, x: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    loss = x.new_zeros(())
    for block in blocks:
        x, more = block(x, *given)
        loss = loss + more
    return x, loss


# The package's defaults, with the local heads of its README.
register_models(PackageLM, routing_package=PackageConfig(local_heads=4))
