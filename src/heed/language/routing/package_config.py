"""Settings of the models of the PyTorch package (lucidrains/routing-transformer) under heed's names; its defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from heed.catalogue import provides
from heed.errors import unknown


@provides("08-routing")
@dataclass(frozen=True)
class PackageConfig:
    """Settings of `PackageLM` and `PackageSeq2Seq`; the package's own names stand in brackets.

    Args:
        vocab: ids [num_tokens].
        dim: channels.
        layers: depth.
        length: longest text [max_seq_len], a multiple of window; there are length / window clusters per head.
        heads, head_dim: of all kinds; head_dim defaults to dim / heads [dim_head].
        window: tokens per cluster, fewer in shorter texts [window_size].
        local_window, local_radius: of local heads [local_attn_window_size, local_attn_radius_blocks].
        local_heads: for all layers or one number per layer [n_local_attn_heads].
        causal: tokens see no later ones.
        share_qk: queries are keys, default for causal models [shared_qk].
        ffn_mult, glu: of the feed-forward network [ff_glu].
        decay, commitment: of k-means [kmeans_ema_decay, commitment_factor]. The package's language model takes
            commitment_factor and uses 1e-4 whatever it is; here it counts.
        rotary: rotary positions [rel_pos_emb].
        memory: learned keys and values per cluster [num_mem_kv].
        norm: "layer" and "scale" normalise before each part, "rezero" weighs its result [use_scale_norm, use_rezero].
        attn_dropout, dropout, ffn_dropout: of weights, of attention's and inside the network [attn_layer_dropout,
            ff_dropout].
        source_vocab, source_layers, source_length: of an encoder.
        context_window, context_share_qk: of attention to an encoder [context_window_size, context_shared_qk].

    Raises:
        ValueError: settings that do not fit each other.
    """

    vocab: int = 256
    dim: int = 512
    layers: int = 6
    length: int = 1024
    heads: int = 8
    head_dim: int | None = 64
    window: int = 64
    local_window: int = 256
    local_radius: int = 1
    local_heads: int | tuple[int, ...] = 0
    causal: bool = True
    share_qk: bool | None = None
    ffn_mult: int = 4
    glu: bool = False
    decay: float = 0.999
    commitment: float = 1e-4
    rotary: bool = True
    memory: int = 0
    norm: Literal["layer", "scale", "rezero"] = "layer"
    attn_dropout: float = 0.0
    dropout: float = 0.0
    ffn_dropout: float = 0.0
    source_vocab: int = 256
    source_layers: int = 6
    source_length: int = 1024
    context_window: int | None = None
    context_share_qk: bool = False

    def __post_init__(self) -> None:
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(
                f"dim={self.dim} is not divisible by heads={self.heads}; change one of them or give head_dim"
            )
        if self.length % self.window:
            raise ValueError(f"length={self.length} must be a multiple of window={self.window}")
        counts = self.local_heads if isinstance(self.local_heads, tuple) else (self.local_heads,)
        if isinstance(self.local_heads, tuple) and len(counts) != self.layers:
            raise ValueError(f"local_heads={self.local_heads} needs one number for each of the {self.layers} layers")
        if not all(0 <= count <= self.heads for count in counts):
            raise ValueError(f"local_heads={self.local_heads} must lie in 0 .. heads={self.heads}")
        if self.rotary and self.width % 2:
            raise ValueError(f"rotary positions need heads of even width, not {self.width}; or rotary=False")
        if self.norm not in ("layer", "scale", "rezero"):
            raise ValueError(unknown("norm", self.norm, ("layer", "scale", "rezero")))

    @property
    def width(self) -> int:
        """Of a head."""
        return self.head_dim or self.dim // self.heads

    @property
    def clusters(self) -> int:
        return self.length // self.window

    @property
    def shares(self) -> bool:
        return self.causal if self.share_qk is None else self.share_qk

    def local_at(self, layer: int) -> int:
        """Local heads of a layer."""
        return self.local_heads[layer] if isinstance(self.local_heads, tuple) else self.local_heads
