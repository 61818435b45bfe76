"""Trains a model whose layers each attend to a random part of the tokens, anew at every step, and runs it dense (card 41).

    train mode:   out_i = softmax(q_i k_S^T / sqrt(d)) v_S        S drawn for every layer and step, |S| = N / r
    eval mode:    out_i = softmax(q_i k^T / sqrt(d)) v

Attention costs r times less, and it is a regulariser. The same method works on transformers' models, timm's vision
transformers and heed's own; rules are in `heed.layers.subsampled`, settings in `heed.layers.subsampling`, and the averaging
of several draws in `heed.language.self_ensemble`. Hussain et al., "The Information Pathways Hypothesis", KDD 2023
(arXiv 2306.01705). That causal hosts get "local" and others "unbiased", and that the last tenth of training is dense, are
heed's own choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.hosts.attach import attach_rule, attention_layers, is_transformers
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.language.sparse import sparse_layers
from heed.layers.subsampled import Draw
from heed.layers.subsampling import SubsampledCost, Subsampling, subsampled_cost
from heed.methods import Handle, Method

_ROWS = 256  # targets whose distances are counted


@provides("41-subsampled-ssa")
@dataclass(frozen=True)
class StochasticSubsampling(Method):
    """Subsampled attention while a host is in train mode.

        with heed.apply(model, StochasticSubsampling(ratio=8)) as handle:
            for step in staged(handle, steps):
                ...

    The handle's `state` is a `SubsamplingState`. With a cache of earlier tokens, attention is dense.

    Args:
        subsampling: what is drawn; default "local" for causal hosts and "unbiased" for others, with `ratio`.
        ratio: r, for the default subsampling.
        ratios: one r for every attention layer, in place of the one above.
        layers: numbers of the layers that are subsampled; default all but a decoder's that have a sliding window.
        prefix: class token and registers, always sources; default what the host says (none for causal hosts).
        grid: rows and columns of the other tokens, for subsampling by windows.
        seed: makes the draws repeatable, with another one on every rank of a distributed run; default torch's own random
            state. With gradient checkpointing leave it out: the second forward pass then finds the same draws.
    """

    subsampling: Subsampling | None = None
    ratio: float = 4.0
    ratios: Sequence[float] | None = None
    layers: Sequence[int] | None = None
    prefix: int | None = None
    grid: tuple[int, int] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for ratio in (self.ratio, *(self.ratios or ())):
            Subsampling(ratio=ratio)  # says what is wrong with it

    def attach(self, host: nn.Module, handle: Handle) -> SubsamplingState:
        found = attention_layers(host)
        if self.ratios is not None and len(self.ratios) != len(found):
            raise ValueError(f"{len(self.ratios)} ratios for {len(found)} attention layers; give one for each")
        if self.layers is not None and not set(self.layers) <= set(range(len(found))):
            raise ValueError(f"layers={list(self.layers)}: the {len(found)} attention layers are numbered from 0")
        causal = any(bool(getattr(layer, "is_causal", False)) for layer in found)
        chosen = self.subsampling or Subsampling("local" if causal else "unbiased", self.ratio)
        prefix = self.prefix
        if prefix is None:
            prefix = chosen.prefix or (0 if causal else _prefix_tokens(host))
        if causal and prefix:
            raise ValueError(f"prefix={prefix}: causal attention has no tokens that all others see; prefix=0")
        chosen = replace(chosen, prefix=prefix)
        ratios = self.ratios or [chosen.ratio] * len(found)
        generator = None
        if self.seed is not None:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            generator = torch.Generator().manual_seed(self.seed + rank)
        state = SubsamplingState([replace(chosen, ratio=ratio) for ratio in ratios], self.grid, generator)
        layers = self.layers
        if layers is None and causal and is_transformers(host):
            layers = sparse_layers(host, "subsampled attention")
        attach_rule(host, SubsamplingRule(state), handle, layers)
        return state


@provides("41-subsampled-ssa")
@dataclass
class SubsamplingState:
    """What a host's subsampling is at present.

    Args:
        settings: of every attention layer.
        grid: rows and columns of the tokens.
        generator: of the draws.

    Attributes:
        dense: whether train mode is dense, too; `staged` sets it for the last steps.
        always: whether eval mode draws; an ensemble sets it.
        ratio: in the place of the layers' own, where an ensemble asks for another.
        last: the last draw of every layer, and the call that it was for.
    """

    settings: list[Subsampling]
    grid: tuple[int, int] | None
    generator: torch.Generator | None
    dense: bool = False
    always: bool = False
    ratio: float | None = None
    last: dict[int, _Drawn] = field(default_factory=dict)

    def of(self, layer: int) -> Subsampling:
        """What a layer draws now."""
        return self.settings[layer] if self.ratio is None else replace(self.settings[layer], ratio=self.ratio)


@dataclass
class _Drawn:
    """A draw, and the shape (B, H, N, d) of the queries and the causality that it was for."""

    draw: Draw
    shape: torch.Size
    itemsize: int
    causal: bool


class SubsamplingRule(AttentionRule):
    """Computes the attention of a layer from a draw of sources, where the state says so."""

    def __init__(self, state: SubsamplingState) -> None:
        self.state = state

    def core(self, call: AttentionCall) -> Tensor | None:  # type: ignore[override]
        state, (batch, heads, n, _) = self.state, call.query.shape
        drawing = call.module.training or state.always
        if not drawing or state.dense or n != call.key.shape[2] or n == 1:
            return None  # the host's own
        if call.softcap is not None or call.options.get("s_aux") is not None:
            raise ValueError(
                f"{type(call.module).__name__} caps its scores or has learned sinks, which subsampled attention cannot do"
            )
        causal = call.causal or (call.mask is not None and bool(getattr(call.module, "is_causal", False)))
        draw = state.of(call.layer).draw(
            batch,
            n,
            heads=heads,
            device=call.query.device,
            generator=state.generator,
            real=_real(call),
            grid=state.grid,
        )
        state.last[call.layer] = _Drawn(draw, call.query.shape, call.query.itemsize, causal)
        out = draw.attend(
            call.query, call.key, call.value, causal=causal, mask=call.mask, scale=call.scale, dropout=call.dropout
        )
        return out.transpose(1, 2)


def _real(call: AttentionCall) -> Tensor | None:
    """(B, M) False where a source is padding of its row; None where there is none."""
    if call.mask is None or len(call.mask) == 1:
        return None
    allowed = call.allowed()
    assert allowed is not None  # there is a mask
    return allowed.flatten(1, 2).any(1).expand(len(call.query), -1)


def _prefix_tokens(host: nn.Module) -> int:
    """Class token and registers: as timm counts them, or by the names that transformers' vision models have for them."""
    counted = getattr(host, "num_prefix_tokens", None)
    if isinstance(counted, int):
        return counted
    names = ("cls_token", "distillation_token", "register_tokens")
    return sum(parameter.shape[1] for name, parameter in host.named_parameters() if name.rpartition(".")[2] in names)


@provides("41-subsampled-ssa")
def staged(handle: Handle, steps: int, dense: float = 0.1) -> Iterator[int]:
    """The steps of a training, 0 ... steps - 1: subsampled, and dense for the last share of them.

    The learning rate goes on as it would; the dense part closes the gap between training and evaluation.

    Args:
        handle: of an applied `StochasticSubsampling`.
        steps: of the whole training.
        dense: share of the steps, the last ones, in [0, 1].

    Raises:
        ValueError: a share outside [0, 1], or no steps.
    """
    if steps < 1 or not 0 <= dense <= 1:
        raise ValueError(f"steps={steps} must be at least 1, and dense={dense} a share between 0 and 1")
    return _staged(handle.state, steps, steps - round(dense * steps))


def _staged(state: SubsamplingState, steps: int, first_dense: int) -> Iterator[int]:
    before = state.dense
    try:
        for step in range(steps):
            state.dense = step >= first_dense
            yield step
    finally:
        state.dense = before


@provides("41-subsampled-ssa")
@dataclass(frozen=True, eq=False)
class LayerReport:
    """What the last draw of a layer meant.

    Args:
        layer: its number.
        fraction: kept pairs over the pairs that dense attention has (the causal ones, for causal attention).
        cost: work and memory, of attention that is not causal.
        distances: (N,) how many pairs of target and kept source are 0, 1, ... N - 1 tokens apart, in some of the rows.
    """

    layer: int
    fraction: float
    cost: SubsampledCost
    distances: Int[Tensor, " N"]


@provides("41-subsampled-ssa")
def subsampling_report(handle: Handle) -> list[LayerReport]:
    """Reports of the layers that have drawn since the method was applied; forms one dense mask of N x N at a time.

    Args:
        handle: of an applied `StochasticSubsampling`.
    """
    state: SubsamplingState = handle.state
    reports = []
    for layer, drawn in sorted(state.last.items()):
        batch, heads, n, width = drawn.shape
        kept = drawn.draw.kept(n, n, drawn.causal)
        pairs = n * (n + 1) / 2 if drawn.causal else n * n
        cost = subsampled_cost(state.of(layer), n, heads, width, batch, drawn.itemsize)
        fraction = kept.float().sum((-2, -1)).mean().item() / pairs
        reports.append(LayerReport(layer, fraction, cost, source_distances(drawn.draw, n, drawn.causal)))
    return reports


@provides("41-subsampled-ssa")
def source_distances(draw: Draw, tokens: int, causal: bool = False) -> Int[Tensor, " N"]:
    """How many pairs of a target and a kept source are 0, 1, ... N - 1 tokens apart, in at most 256 of the targets.

    Args:
        draw: of one sequence of `tokens` tokens.
        causal: whether sources after the target are left out.
    """
    rows = torch.linspace(0, tokens - 1, min(tokens, _ROWS)).long()
    kept = draw.kept(tokens, tokens, causal)[0, 0, rows]
    apart = (rows[:, None] - torch.arange(tokens)).abs()
    return torch.bincount(apart[kept], minlength=tokens)
