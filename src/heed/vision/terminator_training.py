"""How Terminator (card 36) is trained: Kar's optimisers, which go by signs, the slow neural loss and the weight loss.

    Kar     p -= lr * (sign(g) + sign(m_1) + sign(m_2));   then m_k = beta_k m_k + (1 - beta_k) g
    slow    sum over blocks i > j of mean((tile(W_j) - W_i)^2), W the global kernels, tiled to W_i's channels
    total   cross-entropy with smoothed labels + slow + l2 * (sum of ||w|| + 1e-6 * sum of ||v||)

w are the parameters of a block's fast net, v the weights of its slow nets and RGUs; norms are not squared. A step of Kar
moves a number by 0 to 3 times lr, and the first by lr: sign(0) = 0. The slow loss is a local error signal: its gradient
reaches the slow nets of the global kernels and nothing else.

Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", 2024, arXiv 2401.17948.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from heed.catalogue import provides
from heed.errors import unknown
from heed.vision.terminator import SFNENetwork, tile_channels

SMOOTHING = 0.1


class _Kar(Optimizer):
    """Moves by the signs of the gradient and of its running means from before the step."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, ...]) -> None:
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"lr={lr} must be 0 or more")
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas={betas}: {beta} is outside [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one step; a closure that computes the loss is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                for k in range(len(group["betas"])):
                    state.setdefault(f"mean{k + 1}", torch.zeros_like(p))
                means = [state[f"mean{k + 1}"] for k in range(len(group["betas"]))]
                move = p.grad.sign()
                for mean, beta in zip(means, group["betas"], strict=True):
                    move += mean.sign()
                    mean.lerp_(p.grad, 1 - beta)
                p.add_(move, alpha=-group["lr"])
        return loss


@provides("36-hyperzzw")
class Kar3(_Kar):
    """p -= lr * (sign(g) + sign(m_1) + sign(m_2)); no weight decay.

    Args:
        params: parameters, or groups of them.
        lr: the least a number moves by, where its gradient is not 0 and the running means agree or cancel.
        betas: how slowly m_1 and m_2 follow the gradient.

    Raises:
        ValueError: a negative lr; betas outside [0, 1), or not two of them.
    """

    def __init__(self, params: Any, lr: float = 1.215e-3, betas: tuple[float, float] = (0.5, 0.95)) -> None:
        if len(betas) != 2:
            raise ValueError(f"betas={betas}: Kar3 has two")
        super().__init__(params, lr, tuple(betas))


@provides("36-hyperzzw")
class Kar2(_Kar):
    """p -= lr * (sign(g) + sign(m)); no weight decay.

    Args:
        params: parameters, or groups of them.
        lr: the least a number moves by.
        beta: how slowly m follows the gradient.

    Raises:
        ValueError: a negative lr; a beta outside [0, 1).
    """

    def __init__(self, params: Any, lr: float = 1.215e-3, beta: float = 0.95) -> None:
        super().__init__(params, lr, (beta,))


@provides("36-hyperzzw")
def warmup_cosine(optimizer: Optimizer, steps: int, warmup: int, start: float = 1e-8) -> LambdaLR:
    """A schedule to call once per step: linear from `start` to the optimiser's lr, then half a cosine down to 0.

    Args:
        optimizer: its groups' lr are the peaks.
        steps: in all; the author's 100 epochs.
        warmup: of these, rising; the author's 8 epochs.
        start: lr of the first step.

    Raises:
        ValueError: no room for the warm-up.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup={warmup} must lie in 0 .. {steps - 1}, with steps={steps}")

    def factor(peak: float) -> Callable[[int], float]:
        def at(step: int) -> float:
            if step < warmup:
                first = min(1.0, start / peak) if peak else 1.0
                return first + (1 - first) * step / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (steps - warmup))))

        return at

    return LambdaLR(optimizer, [factor(group["lr"]) for group in optimizer.param_groups])


@provides("36-hyperzzw")
def slow_neural_loss(kernels: Sequence[Float[Tensor, "1 _ *S"]], compare: str = "tiled") -> Float[Tensor, ""]:
    """How much the global kernels of different blocks differ, summed over pairs of blocks; 0 for a single block.

    Args:
        kernels: (1, C_i, *S) in the order of the blocks, as `Terminator.global_kernels` gives them.
        compare: "tiled" repeats the earlier kernel's channels to those of the later one, as the author's last code does;
            "channel_sum" compares the sums over channels, as another version does.

    Raises:
        ValueError: channels that are no multiple of those before; a comparison that does not exist; no kernels.
    """
    if compare not in ("tiled", "channel_sum"):
        raise ValueError(unknown("comparison", compare, ("tiled", "channel_sum")))
    if not kernels:
        raise ValueError("kernels is empty: give one per block")
    if compare == "channel_sum":
        sums = [kernel.sum(1) for kernel in kernels]
        terms = [F.mse_loss(late, early) for early, late in combinations(sums, 2)]
    else:
        terms = [F.mse_loss(late, tile_channels(early, late.shape[1])) for early, late in combinations(kernels, 2)]
    return torch.stack(terms).sum() if terms else kernels[0].new_zeros(())


@provides("36-hyperzzw")
def weight_loss(model: SFNENetwork, factor: float = 5e-5, slow_factor: float = 1e-6) -> Float[Tensor, ""]:
    """factor * (sum of L2 norms of the fast nets' parameters + slow_factor * that of the slow nets' and RGUs' weights).

    The fast nets are each block's channel mixers, bottleneck and the local branches' biases; of the slow nets the kernels
    over channels are left out.
    """
    fast, slow = [], []
    for block in model.sfne_blocks():
        for module in (block.mixer, block.bottleneck, *(local.mixer for local in block.local_branches())):
            fast += module.parameters()
        fast += [local.bias for local in block.local_branches()]
        slow += block.kernel_weights()
    return factor * (_norms(fast) + slow_factor * _norms(slow))


def _norms(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).sum()


@provides("36-hyperzzw")
class TerminatorLoss(NamedTuple):
    """The parts of Terminator's loss, all scalars.

    Args:
        cross_entropy: with smoothed labels.
        slow: `slow_neural_loss`.
        weights: `weight_loss`.
    """

    cross_entropy: Tensor
    slow: Tensor
    weights: Tensor

    @property
    def total(self) -> Float[Tensor, ""]:
        return self.cross_entropy + self.slow + self.weights


@provides("36-hyperzzw")
def terminator_loss(
    model: SFNENetwork,
    x: Float[Tensor, "B C *S"],
    labels: Int64[Tensor, " B"],
    *,
    smoothing: float = SMOOTHING,
    compare: str = "tiled",
    l2: float = 5e-5,
) -> tuple[TerminatorLoss, Float[Tensor, "B classes"]]:
    """The author's loss, and the logits it comes from.

    Args:
        model: a Terminator.
        x: images or sequences.
        labels: classes.
        smoothing: share of the probability spread over all classes.
        compare: see `slow_neural_loss`.
        l2: factor of the weight loss; the author's CIFAR-100 runs have 4e-5.
    """
    logits = model(x)
    cross_entropy = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    loss = TerminatorLoss(cross_entropy, slow_neural_loss(model.global_kernels(), compare), weight_loss(model, l2))
    return loss, logits


_CIFAR = {"epochs": 100, "batch_size": 64, "warmup_epochs": 8, "crop_padding": 4, "flip": True, "smoothing": SMOOTHING}
_RECIPES = {
    "cifar10": {**_CIFAR, "lr": 1.215e-3, "betas": (0.5, 0.95), "l2": 5e-5},
    "cifar100": {**_CIFAR, "lr": 1.20925e-3, "betas": (0.75, 0.99), "l2": 4e-5},
}


@provides("36-hyperzzw")
def terminator_recipe(data: str) -> dict[str, Any]:
    """How the author trained on "cifar10" (95.32 % in the repository's log) or "cifar100" (75.68 %), with `Kar3`.

    Crops are of images with crop_padding mirrored pixels on each side.

    Raises:
        ValueError: other data.
    """
    if data not in _RECIPES:
        raise ValueError(unknown("data with a recipe", data, _RECIPES))
    return dict(_RECIPES[data])
