"""Edge-augmented graph transformer (EGT) with random loss of sources or of connections, as its authors train it (card 41).

    Q, K, V = Linear(LN(h))                 (B, N, d, H): channels before heads       E, G = Linear(LN(e))  (B, N, N, H)
    A_ij = softmax_j(H_ij + mask) * sigmoid(G_ij + mask),     H_ij = clip(q_i . k_j / sqrt(d)) + E_ij
    o_i = log(1 + sum_j sigmoid(G_ij + mask)) * sum_j A_ij v_j
    h = h + Linear(o),   e = e + Linear(H),   then each  x + W_2 act(W_1 LN(x))

Source dropout hides whole nodes from all others for one pass of a layer; connection dropout hides single pairs from the
softmax, but not from the gates. Neither saves work by itself, for every edge is updated; with `sources`, only the edges to
chosen nodes are computed and updated, which is another model (heed's own option). A node without any source gives 0 where
the authors' code gives NaN. Hussain et al., EGT, KDD 2022 (arXiv 2108.03348), and their repositories tgt and egt_pytorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.layers import DropPath
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown
from heed.layers.attention import check_heads
from heed.layers.subsampling import Subsampling

Activation = Literal["gelu", "elu", "relu"]
_LOST = -1e9  # what the authors add to the score of a lost connection


@provides("41-subsampled-ssa")
@dataclass(frozen=True)
class EGTConfig:
    """Settings of an EGT layer; the defaults are those of the authors' TGT.

    Args:
        node_width, edge_width: channels of nodes h and edges e.
        num_heads: heads; must divide node_width.
        activation: of the feed-forward parts: "gelu", "elu" or "relu".
        node_multiplier, edge_multiplier: hidden width of the feed-forward parts over the width.
        scale_degree: multiply by log(1 + sum of gates).
        clip: bounds of the scaled scores before the edges are added; None for none. egt_pytorch: (-5, 5).
        source_dropout: probability of a node being no source, in [0, 1).
        connection_dropout: probability of losing a (target, source, head), in [0, 1).
        dropout: on the hidden channels of the feed-forward parts.
        virtual_nodes: first nodes whose degree counts as 1.
    """

    node_width: int
    edge_width: int
    num_heads: int
    activation: Activation = "gelu"
    node_multiplier: float = 1.0
    edge_multiplier: float = 1.0
    scale_degree: bool = True
    clip: tuple[float, float] | None = None
    source_dropout: float = 0.0
    connection_dropout: float = 0.0
    dropout: float = 0.0
    virtual_nodes: int = 0

    def __post_init__(self) -> None:
        check_heads(self.node_width, self.num_heads)
        if self.activation not in get_args(Activation):
            raise ValueError(unknown("activation", self.activation, get_args(Activation)))
        for name in ("source_dropout", "connection_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a probability in [0, 1)")


class _FeedForward(nn.Module):
    """W_2 act(W_1 LN(x)); the layer adds x."""

    def __init__(self, width: int, multiplier: float, activation: str, dropout: float) -> None:
        super().__init__()
        hidden = round(multiplier * width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = getattr(F, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.activation(self.up(self.norm(x)))))


@provides("41-subsampled-ssa")
class EGTLayer(nn.Module):
    """One layer: nodes (B, N, D) and edges (B, N, N, De) to the same shapes.

    Args:
        config: see `EGTConfig`.
        drop_path: stochastic depth.

    Attributes:
        generator: a `torch.Generator` for the draws; None for torch's own.
        always: whether eval mode draws, too, as a member of an ensemble does.
    """

    def __init__(self, config: EGTConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        c = self.config = config
        self.norm_h, self.norm_e = nn.LayerNorm(c.node_width), nn.LayerNorm(c.edge_width)
        self.qkv = nn.Linear(c.node_width, 3 * c.node_width)
        self.bias_gate = nn.Linear(c.edge_width, 2 * c.num_heads)
        self.out_h, self.out_e = nn.Linear(c.node_width, c.node_width), nn.Linear(c.num_heads, c.edge_width)
        self.node_ffn = _FeedForward(c.node_width, c.node_multiplier, c.activation, c.dropout)
        self.edge_ffn = _FeedForward(c.edge_width, c.edge_multiplier, c.activation, c.dropout)
        self.drop_path = DropPath(drop_path)
        self.generator: torch.Generator | None = None
        self.always = False

    @property
    def draws(self) -> bool:
        """Whether sources or connections drop out."""
        return self.config.source_dropout > 0 or self.config.connection_dropout > 0

    def forward(
        self,
        h: Float[Tensor, "B N D"],
        e: Float[Tensor, "B N N De"],
        node_mask: Bool[Tensor, "B N"] | None = None,
        *,
        dropped: Bool[Tensor, "B N"] | None = None,
        lost: Bool[Tensor, "B N N H"] | None = None,
        sources: Int[Tensor, "B S"] | None = None,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N N De"]]:
        """One layer.

        Args:
            h: (B, N, node_width) nodes.
            e: (B, N, N, edge_width) edges, e[b, target, source].
            node_mask: (B, N) bool, False where a node is padding; default all are real.
            dropped: (B, N) bool, nodes that are no sources; default drawn in train mode where source_dropout > 0.
            lost: (B, N, N, H) bool, connections hidden from the softmax; default drawn where connection_dropout > 0.
            sources: (B, S) the only sources, whose edges alone are computed and updated; the others stay as they are.

        Raises:
            ValueError: shapes that do not fit, or `sources` together with `dropped` or `lost`.
        """
        c, (batch, nodes, _) = self.config, h.shape
        if h.shape[-1] != c.node_width or e.shape != (batch, nodes, nodes, c.edge_width):
            raise ValueError(
                f"nodes {tuple(h.shape)} and edges {tuple(e.shape)} do not fit: (B, N, {c.node_width}) and "
                f"(B, N, N, {c.edge_width}) are expected"
            )
        allowed = torch.ones(batch, nodes, nodes, dtype=torch.bool, device=h.device)
        if node_mask is not None:
            allowed = node_mask[:, :, None] & node_mask[:, None]
        if sources is not None:
            if dropped is not None or lost is not None:
                raise ValueError("sources are what is kept already; give them without dropped and lost")
            return self._some_sources(h, e, allowed, sources.long())
        if self.training or self.always:
            if dropped is None and c.source_dropout:
                dropped = _draw_dropped(c.source_dropout, batch, nodes, h.device, self.generator, node_mask)
            if lost is None and c.connection_dropout:
                chance = torch.rand(batch, nodes, nodes, c.num_heads, generator=self.generator, device=self._home(h))
                lost = chance.to(h.device) < c.connection_dropout
        if dropped is not None:
            allowed = allowed & ~dropped[:, None]
        mixed, scores = self._attend(h, self.norm_h(h), e, allowed, lost)
        return self._update(h, e, mixed, scores)

    def _home(self, h: Tensor) -> torch.device:
        return h.device if self.generator is None else self.generator.device

    def _attend(
        self, h: Tensor, normed: Tensor, e: Tensor, allowed: Tensor, lost: Tensor | None, sources: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, D) mixed nodes and (B, N, S, H) scores, for edges e (B, N, S, De) to all nodes or some sources."""
        c = self.config
        q, k, v = (x.unflatten(-1, (-1, c.num_heads)) for x in self.qkv(normed).chunk(3, -1))
        if sources is not None:
            k, v = (x.take_along_dim(sources[..., None, None], 1) for x in (k, v))
        bias, gate = self.bias_gate(self.norm_e(e)).chunk(2, -1)
        scores = torch.einsum("bidh,bjdh->bijh", q * q.shape[2] ** -0.5, k)
        if c.clip is not None:
            scores = scores.clamp(*c.clip)
        scores = scores + bias
        hidden = ~allowed[..., None]
        gates = gate.sigmoid().masked_fill(hidden, 0.0)
        # The lowest finite value: a target without sources has even weights, which its gates turn to 0.
        logits = scores if lost is None else scores + lost * _LOST
        weights = logits.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(2) * gates
        mixed = torch.einsum("bijh,bjdh->bidh", weights, v)
        if c.scale_degree:
            scaler = torch.log1p(gates.sum(2))
            virtual = torch.arange(len(scaler[0]), device=h.device) < c.virtual_nodes
            mixed = mixed * torch.where(virtual[:, None], 1.0, scaler)[:, :, None]
        return mixed.flatten(2), scores

    def _update(self, h: Tensor, e: Tensor, mixed: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        h = h + self.drop_path(self.out_h(mixed))
        e = e + self.drop_path(self.out_e(scores))
        return h + self.drop_path(self.node_ffn(h)), e + self.drop_path(self.edge_ffn(e))

    def _some_sources(self, h: Tensor, e: Tensor, allowed: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        column = sources[:, None]
        some = e.take_along_dim(column[..., None], 2)
        pairs = allowed.take_along_dim(column, 2)
        mixed, scores = self._attend(h, self.norm_h(h), some, pairs, None, sources)
        h, some = self._update(h, some, mixed, scores)
        index = column[..., None].expand(-1, e.shape[1], -1, e.shape[3])
        return h, e.scatter(2, index, some)


@provides("41-subsampled-ssa")
class EGT(nn.Module):
    """Layers of an edge-augmented graph transformer: nodes (B, N, D) and edges (B, N, N, De) to the same shapes.

    Args:
        config: of every layer.
        depth: layers.
        drop_path: stochastic depth of the last layer, linear from 0.
    """

    def __init__(self, config: EGTConfig, depth: int, drop_path: float = 0.0) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        self.layers = nn.ModuleList(EGTLayer(config, drop_path * i / max(1, depth - 1)) for i in range(depth))

    def forward(
        self,
        h: Float[Tensor, "B N D"],
        e: Float[Tensor, "B N N De"],
        node_mask: Bool[Tensor, "B N"] | None = None,
        dropped: Sequence[Bool[Tensor, "B N"]] | None = None,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N N De"]]:
        """All layers; `dropped` has one draw per layer, see `EGTLayer.forward`."""
        if dropped is not None and len(dropped) != len(self.layers):
            raise ValueError(f"{len(dropped)} draws for {len(self.layers)} layers; give one for each")
        for i, layer in enumerate(self.layers):
            h, e = layer(h, e, node_mask, dropped=None if dropped is None else dropped[i])
        return h, e


def _draw_dropped(
    p: float,
    batch: int,
    nodes: int,
    device: torch.device,
    generator: torch.Generator | None,
    real: Tensor | None,
) -> Tensor:
    settings = Subsampling("source_dropout", p=p)
    draw = settings.draw(batch, nodes, device=device, generator=generator, real=real)
    return draw.dropped  # type: ignore[attr-defined]


_PARTS = {
    "mha_ln_h": "norm_h", "mha_ln_e": "norm_e", "lin_QKV": "qkv", "lin_EG": "bias_gate", "lin_O_h": "out_h",
    "lin_O_e": "out_e", "node_ffn.ffn_ln": "node_ffn.norm", "node_ffn.lin_W1": "node_ffn.up",
    "node_ffn.lin_W2": "node_ffn.down", "edge_ffn.ffn_ln": "edge_ffn.norm", "edge_ffn.lin_W1": "edge_ffn.up",
    "edge_ffn.lin_W2": "edge_ffn.down", "ffn_ln_h": "node_ffn.norm", "ffn_ln_e": "edge_ffn.norm",
    "lin_W_h_1": "node_ffn.up", "lin_W_h_2": "node_ffn.down", "lin_W_e_1": "edge_ffn.up", "lin_W_e_2": "edge_ffn.down",
}  # fmt: skip


@provides("41-subsampled-ssa")
def egt_from_authors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the authors' tgt encoder (without triplets) or of one egt_pytorch layer, under heed's names.

    Args:
        weights: `TGT_layers.L.update.*`, `.node_ffn.*`, `.edge_ffn.*` for `EGT`; or `mha_ln_h.*`, `lin_E.*`, ... for
            `EGTLayer`. Both have their heads in the same order; only lin_E and lin_G are joined.

    Raises:
        ValueError: a name that is neither (the triplet part of TGT is not part of heed).
    """
    weights = dict(weights)
    for key in [key for key in weights if "lin_E." in key]:
        gate = weights.pop(key.replace("lin_E.", "lin_G."))
        weights[key.replace("lin_E.", "lin_EG.")] = torch.cat([weights.pop(key), gate])
    renamed = {}
    for key, value in weights.items():
        start, name = "", key
        if key.startswith("TGT_layers."):
            _, number, name = key.split(".", 2)
            start = f"layers.{number}."
        part, _, leaf = name.removeprefix("update.").rpartition(".")
        if part not in _PARTS:
            raise ValueError(f"{key!r} is no weight of an edge-augmented graph transformer that heed knows")
        renamed[f"{start}{_PARTS[part]}.{leaf}"] = value
    return renamed
