"""Settings of routing attention and of the models around it, and the authors' named configurations.

`RoutingSettings` is one attention layer, `RoutingConfig` a text model, and `NAMED` the table of the released hparams:
google-research/routing_transformer, `sparse_transformer.py`; Roy et al., TACL 2021, arXiv 2003.05997. The paper's tables
name other depths in places (10 layers for WikiText-103, where the hparams have 14).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, get_args

from heed.catalogue import provides
from heed.errors import unknown

HeadKind = Literal["cluster", "cluster_strided", "strided", "local"]
KINDS: tuple[HeadKind, ...] = get_args(HeadKind)


@provides("08-routing")
@dataclass(frozen=True)
class RoutingSettings:
    """One attention layer of mixed heads; heads stand in the order of these fields.

    Args:
        dim: channels D; the number of all heads divides it.
        cluster_heads: routing heads.
        cluster_strided_heads: routing heads whose members are spread over all distances, at most `cluster_heads`.
        strided_heads: heads that attend to every b-th token.
        local_heads: heads that attend inside blocks and to the blocks around.
        clusters: K, per routing head.
        window: w, tokens per cluster.
        block: b, tokens per block; one side per axis for n-d models.
        flange: m, how far the memory of a block reaches, a multiple of b on each axis; default b.
        relative: kinds of heads that have relative positions.
        max_relative: R, the farthest relative place with a vector of its own.
        share_qk: routing heads use their queries as keys.
        masked: tokens see no later ones.
        hash_items: routing by hashing instead of k-means.
        beta: weight of the commitment loss.
        decay, ema, fix_count, initial_count: of k-means, see `heed.language.routing.kmeans.OnlineKMeans`.
        attn_dropout: of attention weights.
        token_bias: whether routing heads weigh a bias per key that is given with the text: "none", "fixed" (by 1) or
            "trained".

    Raises:
        ValueError: settings that do not fit each other.
    """

    dim: int = 256
    cluster_heads: int = 2
    cluster_strided_heads: int = 0
    strided_heads: int = 0
    local_heads: int = 2
    clusters: int = 16
    window: int = 64
    block: tuple[int, ...] = (64,)
    flange: tuple[int, ...] | None = None
    relative: tuple[HeadKind, ...] = KINDS
    max_relative: int | None = 129
    share_qk: bool = True
    masked: bool = True
    hash_items: bool = False
    beta: float = 1e-4
    decay: float = 0.999
    ema: bool = True
    fix_count: bool = False
    initial_count: float = 0.0
    attn_dropout: float = 0.0
    token_bias: Literal["none", "fixed", "trained"] = "none"

    def __post_init__(self) -> None:
        counts = (self.cluster_heads, self.cluster_strided_heads, self.strided_heads, self.local_heads)
        if min(counts) < 0 or not sum(counts):
            raise ValueError(f"heads {dict(zip(KINDS, counts, strict=True))} must not be negative, and one is needed")
        if self.dim < 1 or self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not divisible by the {self.heads} heads in all; change one of them")
        if self.cluster_strided_heads > self.cluster_heads:
            raise ValueError(
                f"cluster_strided_heads={self.cluster_strided_heads} must be at most cluster_heads={self.cluster_heads}"
            )
        for name in ("clusters", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.block or min(self.block) < 1:
            raise ValueError(f"block={self.block} needs one side of at least 1 per axis")
        flange = self.memory_flange
        if len(flange) != len(self.block) or any(m < 0 or m % b for m, b in zip(flange, self.block, strict=False)):
            raise ValueError(f"flange={flange} must be a multiple of block={self.block} on every axis")
        for kind in self.relative:
            if kind not in KINDS:
                raise ValueError(unknown("kind of heads", kind, KINDS))
        if self.relative and (self.max_relative is None or self.max_relative < 0):
            raise ValueError(
                f"max_relative={self.max_relative}, but {', '.join(self.relative)} heads have relative positions: "
                "give the farthest place, or relative=()"
            )
        if self.token_bias not in ("none", "fixed", "trained"):
            raise ValueError(unknown("token_bias", self.token_bias, ("none", "fixed", "trained")))

    @property
    def heads(self) -> int:
        """All heads."""
        return self.cluster_heads + self.cluster_strided_heads + self.strided_heads + self.local_heads

    @property
    def head_dim(self) -> int:
        """d, the width of a head."""
        return self.dim // self.heads

    @property
    def memory_flange(self) -> tuple[int, ...]:
        return self.block if self.flange is None else self.flange

    def reach(self, kind: HeadKind) -> int | None:
        """R for heads that have relative positions."""
        return self.max_relative if kind in self.relative else None


@provides("08-routing")
@dataclass(frozen=True)
class RoutingConfig(RoutingSettings):
    """A text model: the settings of its attention layers, and

    Args:
        vocab: V, number of ids; id 0 is padding in the authors' loss.
        layers: depth.
        skip_first: the first layers whose heads are all local.
        embed_dim: width of the embedding table, mapped to dim; default dim.
        ffn_dim: hidden channels.
        ffn: "geglu", three maps without bias, or "relu", two with.
        length: longest text, in tokens; decoding reserves this much.
        timing: add sinusoids of the position to the embeddings.
        dropout: after attention and feed-forward network.
        ffn_dropout: inside the feed-forward network.
        embed_dropout: of embeddings.
        target_dropout: share of ids that training replaces by 0, in `RoutingTransformerLM.score`.
    """

    vocab: int = 256
    layers: int = 4
    skip_first: int = 0
    embed_dim: int | None = None
    ffn_dim: int = 1024
    ffn: Literal["geglu", "relu"] = "geglu"
    length: int = 1024
    timing: bool = False
    dropout: float = 0.1
    ffn_dropout: float = 0.0
    embed_dropout: float = 0.0
    target_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.skip_first <= self.layers:
            raise ValueError(f"skip_first={self.skip_first} must lie in 0 .. layers={self.layers}")
        if self.ffn not in ("geglu", "relu"):
            raise ValueError(unknown("ffn", self.ffn, ("geglu", "relu")))
        if self.vocab < 2 or self.layers < 1 or self.length < 1:
            raise ValueError(f"vocab={self.vocab}, layers={self.layers} and length={self.length} are too small")

    @classmethod
    def of(cls, block: int, heads: tuple[int, int], **settings: object) -> Self:
        """The authors' habits for text: (local, routing) heads, flange b, R = 2 b + 1."""
        local, routing = heads
        fixed = {"block": (block,), "max_relative": 2 * block + 1, "local_heads": local, "cluster_heads": routing}
        return cls(**fixed | settings)  # type: ignore[arg-type]


_WIKITEXT: dict[str, object] = {
    "vocab": 267_735, "dim": 1024, "embed_dim": 256, "ffn_dim": 3072, "window": 512, "attn_dropout": 0.4, "ffn_dropout":
    0.4, "embed_dropout": 0.4, "target_dropout": 0.25,
}  # fmt: skip
_ENWIK8: dict[str, object] = {"vocab": 256, "dim": 1024, "ffn_dim": 3072, "layers": 12}

# Trainable parameters, as counted in the authors' graph, are in tests/language/test_routing.py.
NAMED: dict[str, RoutingConfig] = {
    "routing_wikitext103_4k": RoutingConfig.of(256, (8, 8), **_WIKITEXT, layers=14, clusters=8, length=4096),
    "routing_wikitext103_1k": RoutingConfig.of(256, (8, 8), **_WIKITEXT, layers=20, clusters=2, length=1024),
    "routing_enwik8_8k": RoutingConfig.of(256, (4, 4), **_ENWIK8, clusters=16, window=512, length=8192),
    "routing_enwik8_12k": RoutingConfig.of(128, (4, 4), **_ENWIK8, clusters=48, window=256, length=12288),
    "routing_pg19_8k": RoutingConfig.of(
        256,
        (6, 2),
        vocab=98_304,
        dim=1032,
        ffn_dim=4096,
        layers=22,
        skip_first=21,
        clusters=16,
        window=512,
        length=8192,
    ),
    # heed's own, for tests and first steps: bytes, 512 at a time.
    "routing_tiny": RoutingConfig.of(
        32, (2, 2), vocab=256, dim=128, ffn_dim=256, layers=2, clusters=8, window=64, length=512, initial_count=1.0
    ),
}
