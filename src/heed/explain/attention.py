"""What a layer or a model attends to, by one definition that treats every mechanism alike.

    M(j) = || d y_q / d x_j ||_F,   divided by its sum over j

x_j is the input at position j and y_q the output at the query q: how much the output there moves with the input here.
A softmax layer, a linear one, a convolution and a whole backbone all have it, whereas attention weights exist for some
mechanisms, mean different things in each, and ignore what the values carry. The map is exactly zero where nothing can
flow, so it shows a pattern's true reach. It follows gradients: where a mechanism picks its keys by a hard choice
(top-k, clusters), the choice itself counts as fixed. The measure is the effective receptive field of Luo et al.,
"Understanding the Effective Receptive Field in Deep Convolutional Neural Networks" (NeurIPS 2016), for a vector output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed.vision.backbone import Backbone

_AT_ONCE = 32  # copies of the input in one backward pass: fast for small models, affordable for large ones


def layer_attention(
    layer: nn.Module,
    x: Float[Tensor, "H W C"],
    query: tuple[int, int] | None = None,
    *,
    directions: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "H W"]:
    """What one attention layer attends to.

    Args:
        layer: maps tokens (B, H, W, C) to (B, H', W', C').
        x: (H, W, C) its input.
        query: row and column of an output token; None for the mean over all output tokens.
        directions: random directions of the output to look along, an unbiased estimate of the squared map; None looks
            along every output channel, which is exact.
        generator: makes the random directions repeatable.

    Returns:
        (H, W), float32, >= 0, sum 1 (0 where the query sees nothing at all).

    Raises:
        ValueError: the shape of x, a query outside the output, or directions < 1.
    """
    if x.ndim != 3:
        raise ValueError(f"x must be one grid of tokens (rows, columns, channels), not {tuple(x.shape)}")
    with evaluating(layer):
        squares = _influence(lambda tokens: layer(tokens).permute(0, 3, 1, 2), x, query, directions, generator)
    return _normalised(squares.sum(-1))


def attention_map(
    model: Backbone,
    image: Float[Tensor, "C H W"],
    query: tuple[int, int] | None = None,
    *,
    directions: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "h w"]:
    """What a whole model attends to: from the pixels of an image to its final features.

    Pixels are summed over the cells of the model's finest feature map (its patches), so h = H / stride, w = W / stride
    with the stride that `feature_info` gives for the first stage.

    Args:
        model: a heed image model; a ViT with any attention layer, or any other backbone. Its mode is left as it was.
        image: (C, H, W), normalised as the model takes it.
        query: row and column of a pixel: the features at its place. None: the mean of the features over all places,
            which is what the classifier reads.
        directions, generator: as in `layer_attention`.

    Returns:
        (h, w), float32, >= 0, sum 1.

    Raises:
        ValueError: the shape of the image, a query outside it, or directions < 1.
    """
    if image.ndim != 3:
        raise ValueError(f"image must be one image (channels, height, width), not {tuple(image.shape)}")
    height, width = image.shape[1:]
    if query is not None:
        _check_inside(query, height, width)
    with evaluating(model):
        if query is not None:
            with torch.no_grad():
                rows, columns = model.forward_features(image[None]).shape[2:]
            query = query[0] * rows // height, query[1] * columns // width
        squares = _influence(model.forward_features, image, query, directions, generator).sum(0)
    stride = model.feature_info[0]["reduction"]
    # A size that is no multiple of the stride leaves narrower cells at the end.
    cells = nn.functional.avg_pool2d(squares[None], stride, ceil_mode=True, divisor_override=1)
    return _normalised(cells[0])


def _influence(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    query: tuple[int, int] | None,
    directions: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Squared norms of d y_query / d x, shaped like x, for a function (B, *x.shape) -> (B, C, H, W)."""
    with torch.no_grad():
        channels, height, width = function(x[None]).shape[1:]
    if query is not None:
        _check_inside(query, height, width)
    if directions is None:
        along = torch.eye(channels, dtype=x.dtype)
    elif directions >= 1:
        along = torch.randn(directions, channels, generator=generator, dtype=x.dtype) / directions**0.5
    else:
        raise ValueError(f"directions={directions} must be at least 1, or None for all")
    total = torch.zeros_like(x, dtype=torch.float32)
    # Copies of the input, each with a direction of its own: sum_c (d <c, y> / d x)^2 is the squared Frobenius norm.
    for chunk in along.to(x.device).split(_AT_ONCE):
        with torch.enable_grad():
            copies = x.detach().expand(len(chunk), *x.shape).clone().requires_grad_()
            y = function(copies)
            features = y.mean((2, 3)) if query is None else y[:, :, query[0], query[1]]
            (gradient,) = torch.autograd.grad((features * chunk).sum(), copies)
        total += gradient.float().square().sum(0)
    return total


def _normalised(squares: Tensor) -> Tensor:
    norms = squares.sqrt()
    total = norms.sum()
    return norms / total if total > 0 else norms


def _check_inside(query: tuple[int, int], height: int, width: int) -> None:
    row, column = query
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"query={(row, column)} lies outside the {height} x {width} positions")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, no stochastic depth), and afterwards every submodule in the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
