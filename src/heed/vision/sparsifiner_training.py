"""How a Sparsifiner (card 17) is trained: objectives against a dense teacher, and the two-phase schedule.

Phase 1, "attn_recon", fits the predictors alone; phase 2, "cls_distill", trains the rest with the predictors frozen:

    attn_recon        = 0.01  / depth * sum over layers |scores - teacher attention|^2        (rows of patches)
    attn_self_distill = 0.002 / depth * sum over layers |scores - own unmasked attention|^2
    cls_distill       = 0.5 * KL(teacher || student)          token_distill = 0.5 * mean |student - teacher tokens|^2

Wei et al., CVPR 2023, arXiv 2303.13755. `ratio`, `least` and `basis_l1` are optional; the last two are heed's reading of
their names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.engine.attend import attend
from heed.engine.patterns import Full
from heed.errors import unknown
from heed.layers.sparsifiner import run_means
from heed.vision.sparsifiner import Run, Sparsifiner, predictors

_PHASES = ("attn_recon", "cls_distill")


class Teaching(NamedTuple):
    """What a teacher says: logits (B, classes), normed patch tokens (B, P, C), attention (B, h, N, N) per layer."""

    logits: Tensor
    tokens: Tensor
    attention: list[Tensor]


@provides("17-sparsifiner")
@dataclass(frozen=True)
class LossWeights:
    """Factors of the terms; a term with factor 0 is not computed.

    Args:
        cls: cross-entropy with the labels (class numbers, or probabilities).
        cls_distill: Kullback-Leibler divergence from the teacher's logits.
        token_distill: mean squared difference of the normed patch tokens that are left.
        attn_recon: scores against the teacher's attention.
        attn_self_distill: scores against the model's own unmasked attention; gradients reach both.
        ratio: share of kept pairs against `keep`; the choice is detached, so it only reports, as in the authors' code.
        least: mean score of the pairs that are not kept.
        keep: target of `ratio`.
        distance: of attention terms: "mse" (summed), or "kl" or "ce" of the sizes of the scores, normalised.
    """

    cls: float = 1.0
    cls_distill: float = 0.5
    token_distill: float = 0.5
    attn_recon: float = 0.01
    attn_self_distill: float = 0.002
    ratio: float = 0.0
    least: float = 0.0
    keep: float = 0.25
    distance: str = "mse"

    def __post_init__(self) -> None:
        if self.distance not in ("mse", "kl", "ce"):
            raise ValueError(unknown("distance", self.distance, ("mse", "kl", "ce")))

    def for_phase(self, phase: str) -> LossWeights:
        """The same with the terms of other phases set to 0."""
        if phase not in _PHASES:
            raise ValueError(unknown("phase", phase, _PHASES))
        if phase == "attn_recon":
            return replace(self, cls=0.0, cls_distill=0.0, token_distill=0.0, attn_self_distill=0.0)
        return replace(self, attn_recon=0.0)


@provides("17-sparsifiner")
@dataclass(frozen=True)
class Phase:
    """A phase of the schedule: its name, and learning rates over its epochs (cosine after a linear warm-up)."""

    name: str
    epochs: int
    peak: float
    floor: float
    warmup: int = 0

    def learning_rate(self, epoch: float) -> float:
        """The learning rate at a moment, in epochs from the phase's start."""
        if epoch < self.warmup:
            return self.floor + (self.peak - self.floor) * epoch / self.warmup
        done = min(1.0, (epoch - self.warmup) / max(1e-9, self.epochs - self.warmup))
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * done)) / 2


# The authors' schedule, for batches of 8 x 168 images, weight decay 0.05.
SCHEDULE = (Phase("attn_recon", 5, 3e-4, 2e-4, warmup=3), Phase("cls_distill", 45, 8e-5, 2e-6))


@provides("17-sparsifiner")
def enter_phase(model: nn.Module, phase: str) -> list[nn.Parameter]:
    """Set a model up for a phase: who learns, and whether the predictors reconstruct.

    Args:
        model: a `Sparsifiner` or a timm ViT after `sparsify`.
        phase: "attn_recon" trains the predictors alone, "cls_distill" everything else.

    Returns:
        The parameters that learn, for the optimiser.
    """
    if phase not in _PHASES:
        raise ValueError(unknown("phase", phase, _PHASES))
    first = phase == "attn_recon"
    for parameter in model.parameters():
        parameter.requires_grad_(not first)
    for predictor in predictors(model):
        predictor.reconstructing = first
        predictor.requires_grad_(first)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@provides("17-sparsifiner")
@torch.no_grad()
def teach(teacher: nn.Module, images: Float[Tensor, "B C H W"]) -> Teaching:
    """Logits, normed patch tokens and the attention of every layer of a dense timm ViT (or a `Sparsifiner` unmasked).

    Args:
        teacher: a timm VisionTransformer with one class token, or a `Sparsifiner`, whose masks are then left out.
        images: (B, C, H, W).
    """
    training = teacher.training
    if isinstance(teacher, Sparsifiner):
        with _unmasked(teacher):
            run = teacher.run(images, trace=True)
        return Teaching(run.logits, run.tokens, [trace.unmasked for trace in run.traces])
    blocks: Any = getattr(teacher, "blocks", None)
    if blocks is None or not hasattr(teacher, "forward_head"):
        raise ValueError(f"{type(teacher).__name__} is no timm ViT; a teacher has blocks[i].attn and forward_head")
    attention: list[Tensor] = []

    def record(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        q, k, v = layer.qkv(x).view(*x.shape[:2], 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
        attention.append(attend(layer.q_norm(q), layer.k_norm(k), v, Full(), return_weights=True)[1])

    hooks = [block.attn.register_forward_pre_hook(record) for block in blocks]
    try:
        tokens = teacher.eval().forward_features(images)  # type: ignore[operator]
        logits = teacher.forward_head(tokens)  # type: ignore[operator]
    finally:
        teacher.train(training)
        for hook in hooks:
            hook.remove()
    return Teaching(logits, tokens[:, getattr(teacher, "num_prefix_tokens", 1) :], attention)


@contextmanager
def _unmasked(model: Sparsifiner) -> Iterator[None]:
    """All pairs kept, without dropped paths."""
    modules = [(module, module.training) for module in model.modules()]
    flags = [(predictor, predictor.reconstructing) for predictor in predictors(model)]
    model.eval()
    for predictor, _ in flags:  # a predictor that reconstructs leaves attention unmasked
        predictor.reconstructing = predictor.training = True
    try:
        yield
    finally:
        for module, training in modules:
            module.training = training
        for predictor, flag in flags:
            predictor.reconstructing = flag


@provides("17-sparsifiner")
def losses(run: Run, labels: Tensor | None, teaching: Teaching | None, weights: LossWeights) -> dict[str, Tensor]:
    """The weighted terms of the objective and their sum, "loss".

    Args:
        run: `model.run(images, trace=True)`.
        labels: (B,) class numbers or (B, classes) probabilities; may be None when `weights.cls` is 0.
        teaching: what the teacher says of the same images; may be None when no term needs it.
        weights: factors; `weights.for_phase(...)` leaves out the terms of other phases.

    Returns:
        "loss", and per term "cls_loss", "cls_distill_loss" and so on, 0 for terms with factor 0.
    """
    w, zero = weights, run.logits.new_zeros(())
    if labels is None and w.cls:
        raise ValueError("cls needs labels; give them, or weights with cls=0")
    if teaching is None and (w.cls_distill or w.token_distill or w.attn_recon):
        raise ValueError("cls_distill, token_distill and attn_recon need a teacher; give teaching, or set them to 0")
    terms: dict[str, Tensor] = dict.fromkeys(
        ("cls", "cls_distill", "token_distill", "attn_recon", "attn_self_distill"), zero
    )
    if labels is not None and w.cls:
        terms["cls"] = w.cls * F.cross_entropy(run.logits, labels)
    if teaching is not None:
        if w.cls_distill:
            student, teacher = run.logits.log_softmax(-1), teaching.logits.log_softmax(-1)
            terms["cls_distill"] = w.cls_distill * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        if w.token_distill:
            left = run.visits[-1].token_mask
            own, wanted = (t if left is None else t[left] for t in (run.tokens, teaching.tokens))
            terms["token_distill"] = w.token_distill * F.mse_loss(own, wanted)
        if w.attn_recon:
            terms["attn_recon"] = w.attn_recon * _layers(run, teaching.attention, w.distance)
    if w.attn_self_distill:
        own = [trace.unmasked for trace in run.traces]
        terms["attn_self_distill"] = w.attn_self_distill * _layers(run, own, w.distance)
    traces = run.traces
    if w.ratio:
        shares = [(trace.mask[:, :, 1:].float().mean(-1) - w.keep).square().mean() for trace in traces]
        terms["ratio"] = w.ratio * 2 * torch.stack(shares).mean()
    if w.least:
        rest = [(trace.connectivity.scores * ~trace.connectivity.kept).mean() for trace in traces]
        terms["least"] = w.least * torch.stack(rest).mean()
    total = torch.stack(list(terms.values())).sum()
    return {"loss": total, **{f"{name}_loss": term for name, term in terms.items()}}


@provides("17-sparsifiner")
def basis_l1(model: nn.Module) -> Tensor:
    """Mean size of the entries of W_up over all predictors, to add to a loss: small entries drop out of the basis."""
    return torch.stack([predictor.up.abs().mean() for predictor in predictors(model)]).mean()


def _layers(run: Run, wanted: list[Tensor], distance: str) -> Tensor:
    """The distance between scores and attention (B, h, N, N) without its class row, averaged over layers."""
    scores = [trace.connectivity.scores for trace in run.traces]
    if len(scores) != len(wanted):
        raise ValueError(f"attention of {len(wanted)} layers for {len(scores)} traced ones; run with trace=True")
    rows = [run_means(a[:, :, 1:], trace.connectivity.share) for a, trace in zip(wanted, run.traces, strict=True)]
    return torch.stack([_distance(s, a, distance) for s, a in zip(scores, rows, strict=True)]).mean()


def _distance(scores: Tensor, attention: Tensor, distance: str) -> Tensor:
    if scores.shape != attention.shape:
        raise ValueError(f"attention rows {tuple(attention.shape)} do not fit scores {tuple(scores.shape)}")
    if distance == "mse":
        return F.mse_loss(scores, attention, reduction="sum")
    sizes = scores.abs() + 1e-6
    logs = (sizes / sizes.sum(-1, keepdim=True)).log().flatten(0, 2)
    target = attention.flatten(0, 2)
    return F.kl_div(logs, target, reduction="batchmean") if distance == "kl" else -(target * logs).sum(-1).mean()
