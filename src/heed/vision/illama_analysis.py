"""What the paper of iLLaMA looks at (card 07): the rank of attention maps, calibration, rounded weights.

Wang et al., "Adapting LLaMA Decoder to Vision Transformer", 2024 (arXiv 2404.06773). The model is in `heed.vision.illama`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed.catalogue import provides


@provides("07-illama")
def map_rank(maps: Float[Tensor, "*B N N"], tolerance: float = 1e-6) -> Int[Tensor, "*B"]:
    """Numerical rank of attention maps: singular values above tolerance * the largest one, computed in float64."""
    values = torch.linalg.svdvals(maps.double())
    return (values > tolerance * values[..., :1]).sum(-1)


@provides("07-illama")
def calibration_error(logits: Float[Tensor, "N K"], labels: Int[Tensor, " N"], bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| in equal bins of confidence, weighted by their share."""
    confidence, predicted = logits.softmax(-1).max(-1)
    right = (predicted == labels).to(confidence.dtype)
    place = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=confidence.dtype, device=logits.device).index_add(0, place, right - confidence)
    return (gap.abs().sum() / len(labels)).item()


@provides("07-illama")
@contextmanager
def quantised(model: nn.Module, weight_bits: int = 8, activation_bits: int = 8) -> Iterator[None]:
    """Inside the `with`, linear layers work with rounded weights (per output channel) and inputs (per tensor),
    symmetric, in floating point: what quantisation would do to the numbers, not to the speed. Undone afterwards."""

    def rounded(x: Tensor, bits: int, over: tuple[int, ...]) -> Tensor:
        step = x.abs().amax(over, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / (2 ** (bits - 1) - 1)
        return (x / step).round() * step

    def round_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounded(inputs[0], activation_bits, tuple(range(inputs[0].ndim))), *inputs[1:])

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    kept = [layer.weight.detach().clone() for layer in layers]
    hooks = [layer.register_forward_pre_hook(round_input) for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.weight.copy_(rounded(layer.weight, weight_bits, (1,)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for layer, weight in zip(layers, kept, strict=True):
                layer.weight.copy_(weight)
