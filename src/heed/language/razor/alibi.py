"""How far the heads of a model with ALiBi see, from their weights alone: those of short scope need no more than that.

    A(i, j) ~ exp(q_i . k_j - l |i - j|)            l the slope of the head, d the width of the model
    |q_i . k_j| <= s = ||W_Q W_K^T||_2 (||gamma||^2 + ||b||^2)        spectral norm of the (d, d) product
    a token at distance x >= (2 s - ln eps) / l has less than eps of the weight that the query's own token has

gamma and b are weight and bias of the LayerNorm before the attention, whose output has at most that squared norm where gamma
is even and b is 0. Tang et al., "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads", ICLR 2025, arXiv
2407.15891, theorem 1; that the product is the one of the width of the model, without the factor 1 / sqrt(head width) that
would make it smaller, and that it takes no biases of the projections, is heed's own reading. Slopes as in Press et al.,
"Train Short, Test Long", ICLR 2022, arXiv 2108.12409.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from heed.catalogue import provides
from heed.hosts.bloom import is_bloom
from heed.language.razor.heads import RetrievalHeads


@provides("65-razor")
def alibi_slopes(heads: int) -> Float[Tensor, " H"]:
    """Slopes of ALiBi: 2^(-8 (i + 1) / H) for a power of two; else those of the power below, then every second of the double.

    Raises:
        ValueError: no heads.
    """
    if heads < 1:
        raise ValueError(f"heads={heads} must be 1 or more")
    power = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * (heads - power), 2)]
    return torch.tensor(slopes)


@provides("65-razor")
def alibi_scope(
    query: Float[Tensor, "H D C"],
    key: Float[Tensor, "H D C"],
    weight: Float[Tensor, " C"],
    bias: Float[Tensor, " C"] | None = None,
    *,
    eps: float = 1e-3,
) -> Float[Tensor, " H"]:
    """Tokens that each head of a layer sees: those further away have a weight below `eps`.

    Args:
        query, key: (H, D, C), the projections' weights of every head, D channels from C; of grouped heads each repeated.
        weight, bias: (C,), of the norm before the attention; None for no bias.
        eps: share of the attention, in (0, 1).

    Raises:
        ValueError: eps outside (0, 1).
    """
    if not 0 < eps < 1:
        raise ValueError(f"eps={eps} must lie between 0 and 1")
    # The norm of W_Q^T W_K (C, C) is that of R_Q R_K^T (D, D), where W^T = Q R.
    r_query, r_key = (torch.linalg.qr(x.double().transpose(1, 2)).R for x in (query, key))
    product = torch.linalg.matrix_norm(r_query @ r_key.transpose(1, 2), ord=2)
    size = weight.double().square().sum() + (0 if bias is None else bias.double().square().sum())
    return ((2 * product * size - math.log(eps)) / alibi_slopes(len(query)).to(product)).float()


@provides("65-razor")
@torch.no_grad()
def alibi_windows(model: nn.Module, eps: float = 1e-3) -> RetrievalHeads:
    """The windows of all heads of a BLOOM-like model; `Razor` keeps so many last tokens of each, and no retrieval heads.

        with heed.apply(model, Razor(alibi_windows(model), window=512)):

    The formula is a bound, and a generous one: heads of small slope get windows longer than any text, and so keep it all.

    Args:
        model: of transformers, with BLOOM's attention.
        eps: share of the attention below which a token does not count.

    Raises:
        ValueError: a model without ALiBi, or eps outside (0, 1).
    """
    blocks: list[Any] = [block for block in model.modules() if is_bloom(getattr(block, "self_attention", block))]
    windows = []
    for block in (block for block in blocks if hasattr(block, "input_layernorm")):
        attention, norm = block.self_attention, block.input_layernorm
        weight = attention.query_key_value.weight.view(attention.num_heads, 3, attention.head_dim, -1)
        scope = alibi_scope(weight[:, 0], weight[:, 1], norm.weight, norm.bias, eps=eps)
        windows.append(tuple(scope.ceil().long().tolist()))
    if not windows:
        raise ValueError(
            f"{type(model).__name__} has no attention with ALiBi that heed knows (BLOOM); for rotary embedding use "
            "profile_heads(model)"
        )
    return RetrievalHeads(((),) * len(windows), len(windows[0]), tuple(windows))
