"""H2O's own claims: which tokens stay, by what attention, how many, and that the others are gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import GREEDY, decoder, padded, prompt
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import heed
from heed.hosts.rules import AttentionCall, attention_weights, run_rules
from heed.language.h2o import H2O, attention_received, heavy_hitters, policy

CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}


def call_of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> AttentionCall:
    return AttentionCall(nn.Identity(), 0, q, k, v, mask, mask is None and q.shape[2] > 1, q.shape[3] ** -0.5)


def states(tokens: int, heads: int = 4, key_heads: int = 2, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(batch, h, tokens, 8) for h in (heads, key_heads, key_heads))  # type: ignore[return-value]


def run(method: H2O, parts: list[int], mask: Tensor | None = None, **sizes: int) -> tuple[Any, list[Tensor]]:
    """One layer after a prompt and more tokens; and what was held after each part."""
    rule = method.rule()
    layer: Any = method.layer(0, rule)
    q, k, v = states(sum(parts), **sizes)
    held, first = [], 0
    for number in parts:
        new = slice(first, first + number)
        keys, values = layer.update(k[:, :, new], v[:, :, new])
        run_rules(call_of(q[:, :, new], keys, values, mask if first == 0 else None), [rule])
        held.append(layer.held.positions)
        first += number
    return layer, held


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(0, 9), st.integers(0, 9), st.integers(0, 12), st.integers(0, 99))
def test_the_choice_is_the_rule(tokens: int, heavy: int, recent: int, padding: int, seed: int) -> None:
    torch.manual_seed(seed)
    scores = torch.rand(1, 3, padding + tokens)
    real = (torch.arange(padding + tokens) >= padding)[None]
    kept = heavy_hitters(scores, torch.tensor([heavy]), torch.tensor([recent]), real if padding else None)
    for head in range(3):
        s = scores[0, head, padding:]
        wanted = list(range(tokens))
        if tokens > heavy + recent:
            candidates = s[: tokens - recent]
            wanted = sorted(candidates.topk(heavy).indices.tolist()) + list(range(tokens - recent, tokens))
        assert kept[0, head].nonzero().flatten().tolist() == [i + padding for i in wanted]


@pytest.mark.parametrize("at_once", [3, 512])
@pytest.mark.parametrize("queries", [1, 5, 11])
def test_the_scores_are_sums_of_attention(at_once: int, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "_QUERIES_AT_ONCE", at_once)
    q, k, v = states(11, batch=2)
    q = q[:, :, -queries:]
    causal = torch.ones(queries, 11, dtype=torch.bool).tril(11 - queries)
    dense = call_of(q, k, v, causal[None, None])
    weights = attention_weights(dense).unflatten(1, (2, 2)).sum(2)  # the heads of a key-value head
    torch.testing.assert_close(attention_received(dense), weights.sum(2), **CLOSE)
    torch.testing.assert_close(attention_received(call_of(q, k, v)), weights.sum(2), **CLOSE)
    real = torch.arange(11) >= torch.tensor([0, 4])[:, None]
    masked = call_of(q, k, v, causal & real[:, None, None])
    found = attention_received(masked, real)
    torch.testing.assert_close(found[:1], weights[:1].sum(2), **CLOSE)
    assert (found[1, :, :4] == 0).all()
    alone = attention_received(call_of(q[1:, :, -min(queries, 7) :], k[1:, :, 4:], v[1:, :, 4:]))
    torch.testing.assert_close(found[1:, :, 4:], alone, **CLOSE)


@settings(max_examples=15)
@given(st.integers(1, 15), st.integers(0, 5), st.integers(0, 5), st.integers(1, 8))
def test_what_is_gone_is_gone_and_the_last_ones_stay(tokens: int, heavy: int, recent: int, steps: int) -> None:
    assume(heavy + recent)
    layer, held = run(H2O(heavy=heavy, recent=recent), [tokens] + [1] * steps)
    seen = tokens
    for i, positions in enumerate(held):
        room = min(seen, heavy + recent)
        assert positions.shape == (1, 2, room)
        for head in positions[0].tolist():
            assert head == sorted(set(head))
            assert set(range(seen - min(recent, room), seen)) <= set(head)
        if i:
            before, after = (set(x[0, 0].tolist()) for x in (held[i - 1], positions))
            assert after <= before | {seen - 1}
        seen += 1
    assert layer.nbytes == layer.held.keys.numel() * 2 * 4 + layer.held.scores.numel() * 8 + 2 * 4
    assert layer.get_mask_sizes(1) == (held[-1].shape[2] + 1, tokens + steps - held[-1].shape[2])


def test_attention_decides_and_not_the_place() -> None:
    q, k, v = states(40, heads=1, key_heads=1)
    k[:, :, 7] = q[0, 0].mean(0) + 6 * torch.ones(8)
    q = q + torch.ones(8)
    kept = {}
    for method in (H2O(heavy=4, recent=4), H2O(heavy=0, recent=8)):
        rule = method.rule()
        layer: Any = method.layer(0, rule)
        run_rules(call_of(q, *layer.update(k, v)), [rule])
        kept[method.heavy] = layer.held.positions[0, 0].tolist()
    assert 7 in kept[4]
    assert kept[0] == list(range(32, 40))


def test_scores_add_up_over_the_steps_and_stay_with_their_tokens() -> None:
    method = H2O(heavy=6, recent=6)
    layer, (_, _, last) = run(method, [9, 1, 1])
    torch.testing.assert_close(layer.held.scores.sum(), torch.tensor(11.0 * 4), **CLOSE)  # each query gives 1 per head
    assert last.shape[2] == 11


def test_fractions_are_of_the_first_call() -> None:
    assert H2O(0.25, 0.5).sizes(10) == (2, 5)
    assert H2O(4, 0.5).sizes(10) == (4, 5)
    _, held = run(H2O(heavy=0.3, recent=0.2), [20, 7, 1])
    assert [positions.shape[2] for positions in held] == [10, 10, 10]
    with pytest.raises(ValueError, match="of a prompt of 3 tokens keep none"):
        run(H2O(), [3])


@torch.no_grad()
def test_each_sequence_has_its_own_budget() -> None:
    model, ids, padding = decoder("llama"), prompt(3, 40), [0, 20, 32]
    with heed.apply(model, H2O(heavy=0.25, recent=0.25)) as handle:
        cache = handle.state.cache()
        model(**padded(ids, padding), past_key_values=cache)
        held = cache.layers[0].held
        assert held.budget.tolist() == [[10, 10], [5, 5], [2, 2]]
        assert (held.positions >= 0).sum(-1).tolist() == [[20, 20], [10, 10], [4, 4]]
        assert all(
            (held.positions[row] >= some).sum() == (held.positions[row] >= 0).sum() for row, some in enumerate(padding)
        )


@torch.no_grad()
def test_padding_on_the_right_and_inside() -> None:
    """Two turns of a conversation, in which rows of a batch are padded behind the first and before the second."""
    model, ids, more = decoder("llama"), prompt(2, 20), prompt(2, 8)
    first = (torch.arange(20) < torch.tensor([20, 15])[:, None]).long()
    second = (torch.arange(8) >= torch.tensor([0, 3])[:, None]).long()
    with heed.apply(model, H2O(heavy=0.25, recent=0.25)) as handle:
        cache = handle.state.cache()
        model(ids, attention_mask=first, past_key_values=cache)
        mask = torch.cat([first, second], 1)
        at = (mask.cumsum(1) - 1)[:, 20:].clamp(min=0)
        together = model(more, attention_mask=mask, position_ids=at, past_key_values=cache).logits[:, -1]
        for row, (some, pad) in enumerate([(20, 0), (15, 3)]):
            cache, one = handle.state.cache(), slice(row, row + 1)
            model(ids[one, :some], past_key_values=cache)
            alone = model(more[one, pad:], past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(together[one], alone, **CLOSE)


@torch.no_grad()
def test_half_the_budget_is_about_half_the_memory_and_stays_so() -> None:
    model, ids = decoder("llama"), prompt(2, 200)
    with heed.apply(model, H2O(heavy=0.25, recent=0.25)) as handle:
        sizes = []
        for new in (1, 30):
            cache = handle.state.cache()
            model.generate(ids, past_key_values=cache, **{**GREEDY, "max_new_tokens": new})
            sizes.append(cache.nbytes)
            report = cache.report()
            assert report["keys and values"] == 0.5 * 200 * 2 * 2 * 2 * 2 * 8 * 4
        assert sizes[0] == sizes[1]


@torch.no_grad()
def test_a_bias_on_the_scores_is_refused() -> None:
    model, ids = decoder("llama"), prompt(1, 20)
    with heed.apply(model, H2O(heavy=4, recent=4)) as handle:
        cache = handle.state.cache()
        model(ids, past_key_values=cache)
        with pytest.raises(NotImplementedError, match="adds a bias to its scores"):
            model(ids[:, :2], attention_mask=torch.full((1, 1, 2, 10), -0.5), past_key_values=cache)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heavy": -1}, "heavy=-1 must be a number of tokens"),
        ({"heavy": 1.5}, r"heavy=1.5 must be .* a fraction in \[0, 1\]"),
        ({"recent": True}, "recent=True must be"),
        ({"recent": float("nan")}, "recent=nan must be"),
        ({"heavy": 0, "recent": 0}, "heavy=0 and recent=0 keep no token"),
        ({"heavy": 0.0, "recent": 0}, "heavy=0.0 and recent=0 keep no token"),
    ],
)
def test_bad_budgets(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        H2O(**arguments)
    with pytest.raises(ValueError, match="looks at the model's queries"):
        H2O().cache(decoder("llama").config)
