"""How much each head matters: what happens to the predictions when it is switched off.

    p = softmax(logits) of the whole model, p' with gamma[l, h] = 0; f, f' the inputs of the classifier     per image b
    prob        = mean_b p_y - p'_y                       jsd      = mean_b (KL(p || m) + KL(p' || m)) / 2,  m = (p + p') / 2
    flip        = mean_b [argmax p != argmax p']          acc_drop = mean_b [argmax p = y] - [argmax p' = y]
    loss        = mean_b CE(p', y) - CE(p, y)             cls_l2   = mean_b || f - f' ||_2
    sensitivity = mean_b | d CE_b / d gamma[l, h] | at gamma = 1
    keep_one_prob = prob with every other head of layer l switched off instead

After Li et al., "How Does Attention Work in Vision Transformers?" (TVCG 2023). There is no code of the authors, so the
formulas are heed's own reading. `prob` may be negative: such a head does harm. Without labels, y = argmax p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown
from heed.explain.attention import evaluating
from heed.explain.batches import Batch, Images, take_batches
from heed.explain.heads.watch import HeadGate
from heed.explain.vit import Classifier, Prediction, Vit
from heed.methods import apply

# Per image (B,): what a prediction loses from `full` to `pruned`, for labels (B,).
Loss = Callable[[Prediction, Prediction, Tensor], Tensor]

_LEAVE_ONE_OUT: dict[str, Loss] = {
    "prob": lambda full, pruned, y: _of_class(full, y) - _of_class(pruned, y),
    "jsd": lambda full, pruned, _: jensen_shannon(full.probabilities, pruned.probabilities),
    "flip": lambda full, pruned, _: _answer(full) != _answer(pruned),
    "acc_drop": lambda full, pruned, y: (_answer(full) == y).double() - (_answer(pruned) == y).double(),
    "loss": lambda full, pruned, y: _cross_entropy(pruned, y) - _cross_entropy(full, y),
    "cls_l2": lambda full, pruned, _: (full.feature - pruned.feature).float().norm(dim=-1),
}
METRICS = (*_LEAVE_ONE_OUT, "sensitivity", "keep_one_prob")
DEFAULT_METRICS = ("prob", "jsd", "cls_l2", "sensitivity")
_WITHOUT_CLASSES = ("cls_l2",)  # what a model without a classifier still has


@provides("51-vit-analytics")
def head_importance(
    model: nn.Module,
    images: Images,
    labels: Int[Tensor, " n"] | None = None,
    *,
    metrics: Sequence[str] | None = None,
    limit: int | None = 256,
    batch_size: int = 32,
    classifier: Classifier | None = None,
) -> dict[str, Float[Tensor, "L H"]]:
    """Importance of every head by several metrics.

    Args:
        model: a vision transformer, see `heed.explain.vit`.
        images: (n, C, H, W), or a loader of batches with or without labels, normalised as the model takes them.
        labels: (n,) classes; without labels, the model's own predictions stand for them.
        metrics: of `METRICS`; default prob, jsd, cls_l2 and sensitivity, or cls_l2 for a model without a classifier.
        limit: at most so many images.
        batch_size: images at once, for a tensor.
        classifier: (B, F) features to (B, C) logits, for a model without a classifier of its own.

    Returns:
        metric -> (layers, heads), float32. Larger is more important.

    Raises:
        TypeError: not a vision transformer whose heads can be reached.
        ValueError: unknown metric, a metric that needs classes for a model without, no images, labels out of range.
    """
    batches = take_batches(images, labels, limit=limit, batch_size=batch_size)
    vit = Vit(model, batches[0].images, classifier=classifier)
    return importance(vit, batches, check_metrics(vit, metrics))


def check_metrics(vit: Vit, metrics: Sequence[str] | None) -> tuple[str, ...]:
    """The metrics to compute; ValueError for those that do not exist or that the model cannot have."""
    if metrics is None:
        return DEFAULT_METRICS if vit.predicts else _WITHOUT_CLASSES
    for name in metrics:
        if name not in METRICS:
            raise ValueError(unknown("metric", name, METRICS))
        if not vit.predicts and name not in _WITHOUT_CLASSES:
            raise ValueError(
                f"metric {name!r} needs predictions, and {type(vit.model).__name__} has no classifier; pass "
                "classifier=, a function from features to logits, or ask for 'cls_l2'"
            )
    return tuple(metrics)


def importance(vit: Vit, batches: Sequence[Batch], metrics: Sequence[str]) -> dict[str, Float[Tensor, "L H"]]:
    """`head_importance` of checked arguments."""
    sums = {name: torch.zeros(vit.layers, vit.heads, dtype=torch.float64) for name in metrics}
    losses = {name: loss for name, loss in _LEAVE_ONE_OUT.items() if name in sums}
    with evaluating(vit.model), apply(vit.model, HeadGate()) as handle:
        gates: Tensor = handle.state
        for batch in batches:
            with torch.no_grad():
                full = vit.predict(batch.images)
                y = true_classes(full, batch.labels)
                if losses:
                    for layer, head, number in _every_head(vit):
                        pruned = _predict_without(vit, batch, gates[number], [head])
                        for name, loss in losses.items():
                            sums[name][layer, head] += loss(full, pruned, y).double().sum().cpu()
                if "keep_one_prob" in sums:
                    for layer, head, number in _every_head(vit):
                        others = [other for other in range(vit.heads) if other != head]
                        alone = _predict_without(vit, batch, gates[number], others)
                        sums["keep_one_prob"][layer, head] += (
                            _LEAVE_ONE_OUT["prob"](full, alone, y).double().sum().cpu()
                        )
    if "sensitivity" in sums:
        for batch in batches:
            sums["sensitivity"] += _sensitivity(vit, batch)
    count = sum(len(batch.images) for batch in batches)
    return {name: (total / count).float() for name, total in sums.items()}


def _every_head(vit: Vit) -> Iterator[tuple[int, int, int]]:
    """(layer, head, number of the layer in the host)."""
    for layer, number in enumerate(vit.numbers):
        for head in range(vit.heads):
            yield layer, head, number


def _predict_without(vit: Vit, batch: Batch, gates: Float[Tensor, " H"], heads: list[int]) -> Prediction:
    """The prediction with some heads of a layer switched off, which are on again afterwards."""
    gates[heads] = 0.0
    try:
        return vit.predict(batch.images)
    finally:
        gates[heads] = 1.0


def _sensitivity(vit: Vit, batch: Batch) -> Float[Tensor, "L H"]:
    """sum_b | d CE_b / d gamma | of a batch: every image has gates of its own, so one backward pass serves them all."""
    with apply(vit.model, HeadGate()) as handle:
        layers, heads = handle.state.shape
    gates = torch.ones(layers, len(batch.images), heads, device=vit.device, requires_grad=True)
    with evaluating(vit.model), apply(vit.model, HeadGate(gates=gates)), torch.enable_grad():
        prediction = vit.predict(batch.images)
        y = true_classes(prediction, batch.labels)
        (gradient,) = torch.autograd.grad(_cross_entropy(prediction, y).sum(), gates)
    return gradient[vit.numbers][..., : vit.heads].abs().double().sum(1).cpu()


def jensen_shannon(p: Float[Tensor, "B C"], q: Float[Tensor, "B C"]) -> Float[Tensor, " B"]:
    """Divergence of two predictions in nats, 0 to log 2; probabilities are clamped at 1e-12 inside the logarithms."""
    log_m = ((p + q) / 2).clamp_min(1e-12).log()
    return sum((a * (a.clamp_min(1e-12).log() - log_m)).sum(-1) / 2 for a in (p, q))  # type: ignore[return-value]


def true_classes(prediction: Prediction, labels: Int[Tensor, " B"] | None) -> Int[Tensor, " B"]:
    """The labels, or the predicted classes where there are none; ValueError for labels that are no classes."""
    if prediction.logits is None:
        return torch.zeros(len(prediction.feature), dtype=torch.long, device=prediction.feature.device)
    if labels is None:
        return _answer(prediction)
    classes = prediction.logits.shape[1]
    wrong = labels[(labels < 0) | (labels >= classes)].tolist()
    if wrong:
        raise ValueError(f"label {wrong[0]} is no class of the model, which has {classes}, 0 to {classes - 1}")
    return labels.to(prediction.logits.device)


def _answer(prediction: Prediction) -> Int[Tensor, " B"]:
    return prediction.probabilities.argmax(-1)


def _of_class(prediction: Prediction, y: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    return prediction.probabilities.gather(1, y[:, None])[:, 0]


def _cross_entropy(prediction: Prediction, y: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    if prediction.logits is None:
        raise ValueError("the model has no classifier; pass classifier=, a function from features to logits")
    return F.cross_entropy(prediction.logits.float(), y, reduction="none")
