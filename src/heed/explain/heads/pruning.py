"""Pruning curves: accuracy while heads are switched off one after another, in the order of a metric.

    order = stable ascending argsort of metric (L, H), flattened as l * H + h
    curve[k] = accuracy and mean p_y with the first k heads of the order off,   k = 0 .. L * H

A metric means something when pruning its least important heads first hurts later, and its most important first hurts
sooner, than pruning in random order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.explain.attention import evaluating
from heed.explain.batches import Batch, Images, take_batches
from heed.explain.heads.importance import true_classes
from heed.explain.heads.watch import HeadGate, check_head
from heed.explain.vit import Classifier, Vit
from heed.methods import apply


@provides("51-vit-analytics")
@dataclass(frozen=True)
class PruningCurve:
    """What a model can still do with ever fewer heads.

    Args:
        order: (L * H,) heads as l * H + h, in the order in which they were switched off.
        accuracy: (L * H + 1,) after 0, 1, ... heads; agreement with the whole model where there are no labels.
        true_prob: (L * H + 1,) mean probability of the true class.
    """

    order: Int[Tensor, " LH"]
    accuracy: Float[Tensor, " n"]
    true_prob: Float[Tensor, " n"]

    @property
    def area(self) -> float:
        """Mean accuracy over the curve: high for a good order, least important first."""
        return float(self.accuracy.mean())


@provides("51-vit-analytics")
def prune_order(metric: Float[Tensor, "L H"], *, most_important_first: bool = False) -> Int[Tensor, " LH"]:
    """Heads as l * H + h, least important first (ties by number), or the other way round."""
    order = metric.flatten().argsort(stable=True)
    return order.flip(0) if most_important_first else order


@provides("51-vit-analytics")
def pruning_curve(
    model: nn.Module,
    images: Images,
    order: Int[Tensor, " LH"],
    labels: Int[Tensor, " n"] | None = None,
    *,
    limit: int | None = 256,
    batch_size: int = 32,
    classifier: Classifier | None = None,
) -> PruningCurve:
    """Switch heads off one after another and see what is left.

    Args:
        model, images, labels, limit, batch_size, classifier: as in `head_importance`.
        order: (k,) heads as l * H + h, such as `prune_order` gives.

    Raises:
        IndexError: a head the model does not have.
        ValueError: as in `head_importance`; a model without a classifier.
    """
    batches = take_batches(images, labels, limit=limit, batch_size=batch_size)
    return prune(Vit(model, batches[0].images, classifier=classifier), batches, order)


def prune(vit: Vit, batches: Sequence[Batch], order: Int[Tensor, " LH"]) -> PruningCurve:
    """`pruning_curve` of checked arguments."""
    right = torch.zeros(len(order) + 1, dtype=torch.float64)
    true = torch.zeros_like(right)
    heads = [(number // vit.heads, number % vit.heads) for number in order.tolist()]
    for layer, head in heads:
        check_head(layer, head, [vit.heads] * vit.layers)
    with evaluating(vit.model), torch.no_grad(), apply(vit.model, HeadGate()) as handle:
        for batch in batches:
            handle.state.fill_(1.0)
            y = true_classes(vit.predict(batch.images), batch.labels)
            for k in range(len(heads) + 1):
                if k:
                    layer, head = heads[k - 1]
                    handle.state[vit.numbers[layer], head] = 0.0
                probabilities = vit.predict(batch.images).probabilities
                right[k] += (probabilities.argmax(-1) == y).sum().item()
                true[k] += probabilities.gather(1, y[:, None]).double().sum().item()
    count = sum(len(batch.images) for batch in batches)
    return PruningCurve(order, (right / count).float(), (true / count).float())


def random_orders(vit: Vit, seeds: int) -> list[Int[Tensor, " LH"]]:
    """Orders by chance, always the same, to hold the others against."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(vit.layers * vit.heads, generator=generator) for _ in range(seeds)]
