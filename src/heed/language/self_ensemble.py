"""The self-ensemble of a model that was trained with subsampled attention: several draws, averaged (card 41).

    p = mean_m softmax(f(x; draw_m))        classification, language models        y = mean_m f(x; draw_m)      regression

Passes that are not finite are drawn again, at most 2 M passes in all, as the authors' graph transformers do. Hussain et al.,
KDD 2023 (arXiv 2306.01705). Only the subsampling is random by default; the authors leave everything in train mode.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from heed.catalogue import provides
from heed.errors import unknown
from heed.hosts.rules import RULES
from heed.language.subsampled import SubsamplingRule, SubsamplingState
from heed.layers.egt import EGTLayer
from heed.layers.subsampling import SubsampledAttention

Average = Literal["probabilities", "values"]


@provides("41-subsampled-ssa")
def average_members(members: Sequence[Tensor], average: Average = "probabilities") -> Tensor:
    """One prediction of several.

    Args:
        members: M tensors of one shape: logits (..., classes), or values.
        average: "probabilities", the mean of their softmax over the last axis (take `log(p + 1e-9)` for a loss), or "values".

    Raises:
        ValueError: no members, or an unknown average.
    """
    if average not in get_args(Average):
        raise ValueError(unknown("average", average, get_args(Average)))
    if not len(members):
        raise ValueError("an ensemble needs at least one member")
    stacked = torch.stack(list(members))
    return (stacked.softmax(-1) if average == "probabilities" else stacked).mean(0)


@provides("41-subsampled-ssa")
@torch.no_grad()
def self_ensemble(
    model: nn.Module,
    predict: Callable[[], Tensor],
    members: int = 10,
    average: Average = "probabilities",
    *,
    ratio: float | None = None,
    all_stochastic: bool = False,
) -> Tensor:
    """The averaged prediction of several random sub-models, without gradients.

        probabilities = self_ensemble(model, lambda: model(images), members=16)

    Args:
        model: with an applied `StochasticSubsampling`, `SubsampledAttention` layers, or EGT layers that drop something.
        predict: one forward pass of the model, giving logits (..., classes) or values.
        members: M finite passes; the authors evaluate with 10 and predict with 50.
        average: see `average_members`.
        ratio: another ratio than in training, such as a milder one.
        all_stochastic: put the whole model into train mode, as the authors do: dropout and the like stay on.

    Raises:
        ValueError: nothing in the model is drawn, so that all members would be equal; or members < 1.
        RuntimeError: none of 2 M passes was finite.
    """
    if members < 1:
        raise ValueError(f"members={members} must be at least 1")
    parts = _stochastic_parts(model)
    if not parts:
        raise ValueError(
            f"{type(model).__name__} draws nothing, so that all members would be equal: apply StochasticSubsampling, or use "
            "layers that subsample"
        )
    good: list[Tensor] = []
    with _drawing(model, parts, ratio, all_stochastic):
        for _ in range(2 * members):
            prediction = predict()
            if prediction.isfinite().all():
                good.append(prediction)
            if len(good) == members:
                break
    if not good:
        raise RuntimeError(
            f"none of {2 * members} passes gave finite predictions; look at the inputs or at the weights"
        )
    if len(good) < members:
        warnings.warn(
            f"{len(good)} of {2 * members} passes gave finite predictions; {members} were asked", stacklevel=2
        )
    return average_members(good, average)


_Part = SubsampledAttention | EGTLayer | SubsamplingState


def _stochastic_parts(model: nn.Module) -> list[_Part]:
    """What can draw: layers that are built so, and the states of methods."""
    parts: list[_Part] = []
    for module in model.modules():
        if isinstance(module, SubsampledAttention) or (isinstance(module, EGTLayer) and module.draws):
            parts.append(module)
        for rule in vars(module).get(RULES, ()):
            if isinstance(rule, SubsamplingRule) and not any(rule.state is part for part in parts):
                parts.append(rule.state)
    return parts


@contextmanager
def _drawing(model: nn.Module, parts: list[_Part], ratio: float | None, all_stochastic: bool) -> Iterator[None]:
    """Inside the `with`, the parts draw in eval mode; everything is as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    before = [(part, part.always, getattr(part, "subsampling", None)) for part in parts]
    model.train(all_stochastic)
    for part in parts:
        part.always = True
        if isinstance(part, SubsamplingState):
            part.ratio = ratio
        elif isinstance(part, SubsampledAttention) and ratio is not None:
            part.subsampling = replace(part.subsampling, ratio=ratio)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for part, always, subsampling in before:
            part.always = always
            if isinstance(part, SubsamplingState):
                part.ratio = None
            elif isinstance(part, SubsampledAttention) and subsampling is not None:
                part.subsampling = subsampling
