"""HiP: the search against its description, its invariants, what it costs, and what it finds."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from decoders import decoder, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import heed
from heed.hosts.attach import attach_rule
from heed.hosts.rules import AttentionCall, AttentionRule
from heed.language.hip import (
    HiP,
    HiPBudget,
    dense_start,
    found_blocks,
    hip_attention,
    hip_cost,
    kept_mass,
    search_blocks,
    sparse_attention,
)
from heed.methods import Handle, Method

SMALL = HiPBudget(mask_k=16, block_q=8, block_k=2, window=8, sinks=4)


def tensors(queries: int, keys: int, heads: int = 2, groups: int = 1, batch: int = 1, width: int = 8) -> list[Tensor]:
    """q, k, v, always the same."""
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = ((heads, queries), (groups, keys), (groups, keys))
    return [torch.randn(batch, *shape, width, generator=generator) for shape in shapes]


@torch.no_grad()
def described_search(q: Tensor, k: Tensor, budget: HiPBudget, block: int) -> list[int]:
    """The search of one query block of one head, word for word: q (Q, D), k (K, D)."""
    queries, keys = len(q), len(k)
    begin, stop = block * budget.block_q, min((block + 1) * budget.block_q, queries)
    rows = q[begin + 1 : stop : 2] if stop - begin > 1 else q[begin:stop]
    end = stop + keys - queries
    g, b_k = budget.group, budget.block_k
    low = [k[i * g : (i + 1) * g].amin(0) for i in range(keys // g)]
    high = [k[i * g : (i + 1) * g].amax(0) for i in range(keys // g)]
    visible = end // g
    if budget.scale_window:
        searched = min(math.ceil(max(0, end - (budget.window or 0)) / g), visible)
    else:
        searched = max(0, visible - (budget.window or 0))
    slots = budget.mask_k // g // b_k
    blocks = math.ceil(searched / b_k)
    if searched <= budget.mask_k // g:
        return [i * b_k * g for i in range(blocks)]

    def score(at: int) -> float:
        tokens = range(at * b_k, min((at + 1) * b_k, visible))
        return max(float((rows @ side[t]).max()) for t in tokens for side in (low, high))

    edges = [int(blocks / slots * i) for i in range(slots + 1)]
    kept = [(s, e - s) for s, e in pairwise(edges)]
    ratio = blocks / slots
    while ratio > 1:
        children = [child for s, n in kept for child in ((s, n // 2), (s + n // 2, n - n // 2)) if child[1] > 0]
        kept = sorted(children, key=lambda child: -score(child[0]))[:slots]
        ratio /= 2
    return sorted(s * b_k * g for s, _ in kept)


def described_weights(q: Tensor, k: Tensor, budget: HiPBudget, scale: float) -> Tensor:
    """(Q, K) the weights of one head, with a dense mask."""
    queries, keys = len(q), len(k)
    allowed = torch.zeros(queries, keys, dtype=torch.bool)
    for i in range(queries):
        block = i // budget.block_q
        end = min((block + 1) * budget.block_q, queries) + keys - queries
        for token in described_search(q, k, budget, block):
            allowed[i, token : token + budget.chosen] = True
        if budget.window is not None:
            allowed[i, : budget.sinks] = True
            allowed[i, max(0, end - budget.window) :] = True
        allowed[i, i + keys - queries + 1 :] = False
    scores = (q @ k.T * scale).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


def weights(q: Tensor, k: Tensor, budget: HiPBudget) -> Tensor:
    """(B, H, Q, K) the weights of HiP: what it makes of values that name the keys."""
    names = torch.eye(k.shape[2]).expand(*k.shape[:3], -1)
    return hip_attention(q, k, names, budget)


budgets = st.builds(
    lambda block_q, block_k, group, slots, window, sinks, scaled: HiPBudget(
        slots * block_k * group, block_q, block_k, group, None if window is None else block_q + window, sinks, scaled
    ),
    st.sampled_from([1, 2, 5, 8]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6),
    st.none() | st.integers(0, 9), st.integers(0, 7), st.booleans(),
)  # fmt: skip


@settings(max_examples=25)
@given(budgets, st.integers(1, 24), st.integers(0, 40))
def test_it_is_what_is_described(budget: HiPBudget, queries: int, before: int) -> None:
    keys = -(-(queries + before) // budget.group) * budget.group
    q, k, v = tensors(queries, keys, heads=4, groups=2)
    selection = search_blocks(q, k, budget)
    out = sparse_attention(q, k, v, selection, scale=0.4)
    for head in range(4):
        for block, count in enumerate(selection.count.tolist()):
            wanted = described_search(q[0, head], k[0, head // 2], budget, block)
            assert selection.index[0, head, block, :count].tolist() == wanted
        wanted = described_weights(q[0, head], k[0, head // 2], budget, 0.4) @ v[0, head // 2]
        torch.testing.assert_close(out[0, head], wanted, rtol=1e-4, atol=1e-5)


@settings(max_examples=15)
@given(budgets, st.integers(1, 30), st.integers(0, 60))
def test_what_is_chosen(budget: HiPBudget, queries: int, before: int) -> None:
    """Ascending, each once, multiples of the block, before the end of the search; all that are seen have weight."""
    keys = -(-(queries + before) // budget.group) * budget.group
    q, k, _ = tensors(queries, keys)
    selection = search_blocks(q, k, budget)
    ends = budget.searched(selection.ends) * budget.group
    for block, count in enumerate(selection.count.tolist()):
        chosen = selection.index[:, :, block, :count]
        assert (chosen.diff() > 0).all()
        assert (chosen % budget.chosen == 0).all()
        assert (chosen < ends[block]).all()
    if budget.window is not None:
        seen = weights(q, k, budget)[0]
        torch.testing.assert_close(seen.sum(-1), torch.ones(2, queries))
        position = torch.arange(queries) + keys - queries
        end = torch.minimum((torch.arange(queries) // budget.block_q + 1) * budget.block_q, torch.tensor(queries))
        end = end + keys - queries
        key = torch.arange(keys)
        must = (key < budget.sinks) | (key >= end[:, None] - budget.window)
        must &= key <= position[:, None]
        assert (seen[:, must] > 0).all()
        assert (seen[:, key > position[:, None]] == 0).all()


@pytest.mark.parametrize(("queries", "keys"), [(48, 48), (20, 48), (1, 48)])
def test_room_for_all_keys_is_dense_attention(queries: int, keys: int) -> None:
    q, k, v = tensors(queries, keys, heads=4, groups=2)
    budget = HiPBudget(mask_k=48, block_q=8, window=8)
    wanted = heed.attend(q, k, v, heed.patterns.Causal(keys - queries))
    torch.testing.assert_close(hip_attention(q, k, v, budget), wanted)
    selection = search_blocks(q, k, budget)
    torch.testing.assert_close(sparse_attention(q, k, v, selection), wanted)
    torch.testing.assert_close(kept_mass(q, k, selection), torch.ones(1, 4, queries))


def test_a_larger_budget_keeps_the_window_and_the_sinks() -> None:
    q, k, _ = tensors(8, 96)
    for mask_k in (2, 8, 32, 64):
        seen = weights(q, k, HiPBudget(mask_k=mask_k, block_q=8, window=12, sinks=5))[0, :, -1]
        assert (seen[:, -12:] > 0).all()
        assert (seen[:, :5] > 0).all()
        assert ((seen > 0).sum(-1) <= mask_k + 17).all()


def test_no_position_is_out_of_reach() -> None:
    """Along smooth keys the search goes to where the query points, wherever that is."""
    angle = torch.linspace(0, math.pi, 512)
    k = torch.stack([angle.cos(), angle.sin()], -1)[None, None]
    budget = HiPBudget(mask_k=16, block_q=1, window=1)
    for position in range(0, 511, 7):
        selection = search_blocks(k[:, :, position : position + 1], k, budget, offset=511)
        assert ((selection.index // 2 == position // 2).sum() == 1).item()


def test_a_search_that_is_stopped() -> None:
    q, k, _ = tensors(8, 200)
    first = search_blocks(q, k, SMALL, rounds=0).index[0, 0, 0]
    blocks = (200 - 8) // 2
    assert first.tolist() == [2 * int(blocks / 8 * i) for i in range(8)]
    whole = search_blocks(q, k, SMALL).index
    rounds = int(SMALL.rounds(torch.tensor([200])))
    assert not torch.equal(search_blocks(q, k, SMALL, rounds=rounds - 1).index, whole)
    assert torch.equal(search_blocks(q, k, SMALL, rounds=rounds).index, whole)


def test_batch_and_heads_commute() -> None:
    q, k, v = tensors(40, 40, heads=3, groups=3, batch=2)
    out = hip_attention(q, k, v, SMALL)
    rows, heads = torch.tensor([1, 0]), torch.tensor([2, 0, 1])
    swapped = hip_attention(*(x[rows][:, heads] for x in (q, k, v)), SMALL)
    torch.testing.assert_close(swapped, out[rows][:, heads])


def test_queries_that_come_later_see_what_they_would_have_seen() -> None:
    q, k, v = tensors(64, 64)
    whole = hip_attention(q, k, v, SMALL)
    parts = [hip_attention(q[:, :, a:b], k[:, :, :b], v[:, :, :b], SMALL) for a, b in ((0, 24), (24, 40), (40, 64))]
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_dense_queries_at_the_beginning() -> None:
    q, k, v = tensors(64, 64)
    dense = heed.attend(q, k, v, heed.patterns.Causal())
    out = hip_attention(q, k, v, SMALL, dense_queries=43)
    torch.testing.assert_close(out[:, :, :43], dense[:, :, :43])
    rest = hip_attention(q[:, :, 43:], k, v, SMALL)
    torch.testing.assert_close(out[:, :, 43:], rest)
    assert dense_start(16384, 16384, 512) == 7680
    assert dense_start(1000, 16384, 512) == 0
    assert dense_start(4096, 4096, 512) == 4096
    assert dense_start(32, 100, 16) == 0


def test_gradients_are_those_of_attention_over_the_same_keys() -> None:
    q, k, v = (x.double().requires_grad_() for x in tensors(21, 45, heads=4, groups=2))
    grad = torch.randn(1, 4, 21, 8, dtype=torch.double)
    ours = torch.autograd.grad((hip_attention(q, k, v, SMALL) * grad).sum(), (q, k, v))
    heads = [described_weights(q[0, h], k[0, h // 2], SMALL, 8**-0.5) @ v[0, h // 2] for h in range(4)]
    wanted = torch.autograd.grad((torch.stack(heads) * grad[0]).sum(), (q, k, v))
    torch.testing.assert_close(ours, wanted)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in tensors)])
        return out


def test_memory_is_linear() -> None:
    budget, largest = HiPBudget(mask_k=64, block_q=32, window=32), []
    for tokens in (4096, 16384, 65536):
        q, k, v = tensors(tokens, tokens, heads=1, width=16)
        with _Largest() as watch:
            hip_attention(q, k, v, budget)
        largest.append(watch.numel)
    assert largest[2] <= 4.1 * largest[1]
    assert largest[2] <= 65536 * 16
    assert largest[1] < 16384 * 16384 / 100


def test_the_search_costs_t_log_t() -> None:
    sizes = [2**n for n in range(12, 18)]
    costs = [hip_cost(t, HiPBudget(block_q=32)) for t in sizes]

    def slope(values: list[int]) -> float:
        return math.log(values[-1] / values[0]) / math.log(sizes[-1] / sizes[0])

    assert 1.0 <= slope([c.search for c in costs]) <= 1.35  # from 3 to 8 rounds
    assert slope([c.attention for c in costs]) == pytest.approx(1.0, abs=0.06)
    assert slope([c.dense for c in costs]) == pytest.approx(2.0, abs=0.01)
    model = [c.search / (t * math.log2(2 * t / 512)) for c, t in zip(costs, sizes, strict=True)]
    assert max(model) < 1.25 * min(model)
    assert costs[2].indices == 16384 // 32 * 256
    assert costs[2].speedup > 6
    assert hip_cost(500, HiPBudget()).search == 0


def test_a_needle_in_smooth_keys_is_found() -> None:
    """What a window never sees, the search finds, and several times what chance would."""
    generator = torch.Generator().manual_seed(0)
    heads, tokens, smooth = 32, 1024, 32
    budget = HiPBudget(mask_k=64, block_q=16, block_k=2, window=16, sinks=4)
    noise = torch.randn(heads, tokens + smooth, 16, generator=generator)
    k = noise.unfold(1, smooth, 1)[:, :tokens].mean(-1) * smooth**0.5  # correlation 0.5 at 16 tokens
    needle = torch.randint(100, 900, (heads,), generator=generator)
    q = 2 * k[torch.arange(heads), needle][:, None] + torch.randn(heads, 16, 16, generator=generator)
    selection = search_blocks(q[None], k[None], budget)
    hit = (selection.index[0, :, 0] == needle[:, None] // 2 * 2).any(-1)
    assert hit.float().mean() >= 0.9
    share, chance = found_blocks(q[None], k[None], selection)
    assert share.mean() > 3 * chance.mean()
    window = HiPBudget(mask_k=2, block_q=16, window=16 + 62, sinks=4)
    mass = [kept_mass(q[None], k[None], search_blocks(q[None], k[None], b)).mean() for b in (budget, window)]
    assert mass[0] > 2 * mass[1]


class _Keys(AttentionRule):
    """Counts the calls with one query."""

    def __init__(self) -> None:
        self.decoded = 0

    def before(self, call: AttentionCall) -> AttentionCall:
        self.decoded += call.query.shape[2] == 1
        return call


class _Probe(Method):
    def attach(self, host: Any, handle: Handle) -> _Keys:
        rule = _Keys()
        attach_rule(host, rule, handle)
        return rule


@torch.no_grad()
def test_a_choice_is_used_again_while_the_text_goes_on() -> None:
    model, ids = decoder("llama"), prompt(2, 40)
    method = HiP(mask_k=8, block_q=4, window=4, sinks=2, dense_layers=(), refresh=4)
    with heed.apply(model, _Probe()) as probe, heed.apply(model, method) as handle:
        cache = model(ids).past_key_values
        for i in range(10):
            model(ids[:, i : i + 1], past_key_values=cache)
        assert (handle.state.searches, handle.state.reuses) == (2 * 3, 2 * 7)  # two layers; at 1, 5 and 9
        cache.reorder_cache(torch.tensor([1, 0]))
        model(ids[:, :1], past_key_values=cache)
        assert handle.state.searches == 2 * 4  # other rows, so another search
        model(ids[:, :1], past_key_values=cache)
        cache.crop(-2)
        model(ids[:, :1], past_key_values=cache)
        assert handle.state.searches == 2 * 5
        model(ids[:, :3], past_key_values=cache)  # more of the prompt
        model(ids[:, :1], past_key_values=cache)
        assert handle.state.searches == 2 * 6
        assert probe.state.decoded == 2 * 14


def test_between_two_searches_no_key_is_lost() -> None:
    """The window grows by what has come since."""
    q, k, _ = tensors(1, 60)
    old = search_blocks(q, k[:, :, :55], SMALL)
    names = torch.eye(60).expand(1, 1, -1, -1)
    seen = sparse_attention(q, k, names, old)[0, :, 0] > 0
    assert seen[:, 55 - 8 :].all()
    assert seen.sum(-1).max() <= 4 + 16 + 8 + 5


@torch.no_grad()
def test_dense_layers_are_the_models_own() -> None:
    model = decoder("llama")
    for dense, ruled in (((0,), [False, True]), ((-1, 5), [True, False]), ((), [True, True])):
        with heed.apply(model, HiP(dense_layers=dense)):
            assert [bool(vars(x.self_attn).get("_heed_rules")) for x in model.model.layers] == ruled
    with pytest.raises(ValueError, match=r"none of the 2 attention layers: dense_layers=\(0, 1, 2\)"):
        heed.apply(model, HiP())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_k": 9}, "mask_k=9 is not a multiple of block_k .* = 2.*try 8"),
        ({"mask_k": 12, "group": 8}, "mask_k=12 .* = 16.*try 16"),
        ({"window": 16}, "window=16 is less than block_q=64"),
        ({"window": 0}, "window=0 is less than block_q=64"),
        ({"block_q": 0}, "block_q=0 must be an integer >= 1"),
        ({"block_k": 1.5}, "block_k=1.5 must be an integer"),
        ({"sinks": -1}, "sinks=-1 must be >= 0"),
    ],
)
def test_budgets_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    for kind in (HiPBudget, HiP):
        with pytest.raises(ValueError, match=message):
            kind(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"refresh": 0}, "refresh=0"), ({"dense_queries": -1}, "dense_queries=-1"), ({"window": None}, "window=None")],
)
def test_methods_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiP(**settings)


def test_calls_that_do_not_fit() -> None:
    q, k, v = tensors(9, 8)
    with pytest.raises(ValueError, match="9 queries are more than the 8 keys"):
        search_blocks(q, k, SMALL)
    with pytest.raises(ValueError, match="9 queries are more than the 8 keys"):
        hip_attention(q, k, v, SMALL)
    q, k, v = tensors(40, 45)
    grouped = HiPBudget(mask_k=16, block_q=8, block_k=1, group=2, window=8)
    with pytest.raises(ValueError, match="45 keys do not divide into groups of 2; pass the first 44 keys and offset=5"):
        search_blocks(q, k, grouped)
    assert hip_attention(q, k, v, grouped).isfinite().all()  # whose last key is in the window
    with pytest.raises(ValueError, match="group=2"):
        found_blocks(q, k[:, :, :44], search_blocks(q[:, :, :39], k[:, :, :44], grouped))
    with pytest.raises(ValueError, match="not a multiple of 2 key heads"):
        search_blocks(torch.randn(1, 3, 4, 8), torch.randn(1, 2, 4, 8), SMALL)
    with pytest.raises(ValueError, match="the selection is for"):
        sparse_attention(q, k, v, search_blocks(q[:, :, :16], k, SMALL))


def test_attention_that_hip_cannot_compute() -> None:
    model = decoder("llama")
    layer = model.model.layers[0].self_attn
    q, k, v = tensors(8, 8)
    with heed.apply(model, HiP(dense_layers=())):
        core = vars(layer)["_heed_rules"][0].core
        with pytest.raises(ValueError, match="caps its scores"):
            core(AttentionCall(layer, 0, q, k, v, None, causal=True, scale=1.0, softcap=5.0))
        with pytest.raises(ValueError, match="not causal"):
            core(AttentionCall(layer, 0, q, k, v, None, causal=False, scale=1.0))
