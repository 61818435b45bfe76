"""Probe saliency: it is that of all queries where all are probes, and close to it where few are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from heed.hosts.rules import AttentionCall, attention_weights
from heed.language.saliency import Probes, probe_saliency, real_tokens

ALL = Probes(recent=1.0, random=0.0)


def call(tokens: int = 12, queries: int | None = None, batch: int = 2, mask: Tensor | None = None) -> AttentionCall:
    q = torch.randn(batch, 4, queries or tokens, 8)
    k = torch.randn(batch, 2, tokens, 8)
    return AttentionCall(nn.Identity(), 0, q, k, k, mask, causal=mask is None, scale=8**-0.5)


def uniform(number: int, seed: int = 0) -> Tensor:
    return torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explicit(attention: AttentionCall) -> Tensor:
    """The definition, with the whole matrix: (B, G, K) sums of the attention."""
    return attention_weights(attention).unflatten(1, (2, 2)).sum((2, 3))


@settings(max_examples=15)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_with_all_queries_it_is_the_definition(tokens: int, queries: int, seed: int) -> None:
    torch.manual_seed(seed)
    queries = min(queries, tokens)
    attention = call(tokens, queries)
    rows = [ALL.rows(queries, uniform(0))]
    total = explicit(attention)
    torch.testing.assert_close(probe_saliency(attention, rows, kind="accumulated"), total)
    seen_by = (tokens - torch.arange(tokens)).clamp(max=queries)
    torch.testing.assert_close(probe_saliency(attention, rows), total / seen_by)


def test_a_single_query_is_its_own_attention() -> None:
    attention = call(9, 1)
    rows = [Probes().rows(1, uniform(1))]
    torch.testing.assert_close(probe_saliency(attention, rows), explicit(attention))


def test_padding_changes_nothing_for_the_tokens() -> None:
    padding, tokens = 3, 12
    keep = (torch.arange(tokens) >= padding).expand(2, tokens)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask = (causal & keep[:, None])[:, None]
    attention = call(tokens, mask=mask)
    found = real_tokens(attention)
    assert found is not None
    assert torch.equal(found, keep)
    short = attention.replace(
        query=attention.query[:, :, padding:], key=attention.key[:, :, padding:], mask=None, causal=True
    )
    rows = [Probes(0.2, 0.4).rows(tokens - padding, uniform(tokens))]
    padded = probe_saliency(attention, rows, found)
    torch.testing.assert_close(padded[..., padding:], probe_saliency(short, rows))
    assert padded[..., :padding].isinf().all()
    assert real_tokens(call()) is None
    assert real_tokens(call(mask=causal[None, None])) is None


@pytest.mark.parametrize(
    ("queries", "recent", "random"), [(60, [57, 58, 59], 3), (19, [18], 0), (1, [0], 0), (0, [], 0)]
)
def test_which_queries_are_probes(queries: int, recent: list[int], random: int) -> None:
    rows = Probes().rows(queries, uniform(queries))
    assert rows[: len(recent)].tolist() == recent
    assert len(rows) == len(recent) + random
    assert (rows[len(recent) :] < queries - len(recent)).all()


def smooth(tokens: int) -> AttentionCall:
    """Keys that grow and shrink slowly along the text, and queries that agree about them.

    Attention has clear peaks here. Where it is nearly even, the ranks agree less: recent probes see all tokens but are
    counted as if they were all queries.
    """
    places = torch.linspace(0, 6.28, tokens)
    k = torch.stack([torch.sin(places * f) for f in range(1, 9)], -1).expand(1, 2, tokens, 8)
    q = 6 + 0.5 * torch.randn(1, 4, tokens, 8)
    return AttentionCall(nn.Identity(), 0, q, k, k, None, causal=True, scale=8**-0.5)


def ranks(x: Tensor) -> Tensor:
    return x.argsort(-1).argsort(-1).double()


def test_few_probes_rank_tokens_as_all_queries_do() -> None:
    attention = smooth(400)
    few = probe_saliency(attention, [Probes().rows(400, uniform(400))])
    every = probe_saliency(attention, [ALL.rows(400, uniform(0))])
    for head in range(2):
        correlation = torch.corrcoef(torch.stack([ranks(few[0, head]), ranks(every[0, head])]))[0, 1]
        assert correlation > 0.9


def test_a_late_token_that_all_queries_look_at_is_found_only_when_normalised() -> None:
    tokens, needle = 200, 185
    k = torch.zeros(1, 2, tokens, 8)
    k[:, :, needle] = 1.0
    attention = AttentionCall(nn.Identity(), 0, torch.ones(1, 4, tokens, 8), k, k, None, causal=True, scale=0.4)
    rows = [ALL.rows(tokens, uniform(0))]
    place = {}
    for kind in ("normalised", "accumulated"):
        saliency = probe_saliency(attention, rows, kind=kind)  # type: ignore[arg-type]
        place[kind] = int((saliency[0, 0] > saliency[0, 0, needle]).sum())
    assert place["normalised"] < 10 < place["accumulated"]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.size = max(self.size, out.numel())
        return out


def test_no_matrix_of_queries_by_keys_is_made() -> None:
    tokens = 3000
    attention = call(tokens, batch=1)
    with Largest() as largest:
        probe_saliency(attention, [Probes().rows(tokens, uniform(tokens))])
    assert largest.size <= 4 * 128 * tokens  # heads, probes at a time


@pytest.mark.parametrize(("name", "value"), [("recent", -0.1), ("recent", 1.5), ("random", 2)])
def test_bad_fractions(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must be a fraction"):
        Probes(**{name: value})
