"""Subsampled attention and the graph transformer: rules against dense masks, statistics of the draws, costs, limits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import heed
from heed.layers.egt import EGT, EGTConfig, EGTLayer, egt_from_authors
from heed.layers.registry import create_layer
from heed.layers.subsampled import Blocks, Connections, Draw, Dropped, Sources
from heed.layers.subsampling import (
    SubsampledAttention,
    Subsampling,
    local_order,
    subsampled_attention,
    subsampled_cost,
    windows_first,
)

EXACT: Any = {"rtol": 1e-4, "atol": 1e-5}
MODES: Any = ("unbiased", "local", "connection", "source_dropout")
quick = settings(max_examples=25)
modes = pytest.mark.parametrize("mode", MODES)


def tensors(batch: int, tokens: int, heads: int = 4, groups: int = 2, width: int = 8) -> list[Tensor]:
    """q, k, v, always the same."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, h, tokens, width, generator=generator) for h in (heads, groups, groups)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, added: Tensor | float = 0.0) -> Tensor:
    """Attention with a mask of all pairs; rows without any give 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + added
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num() * allowed) @ v


@quick
@given(st.sampled_from(MODES), st.integers(1, 40), st.floats(1, 9), st.booleans(), st.booleans(), st.integers(0, 9))
def test_every_rule_is_dense_attention_under_its_mask(mode, tokens, ratio, causal, per_sample, seed) -> None:
    q, k, v = tensors(2, tokens)
    subsampling = Subsampling(mode, ratio=ratio, per_sample=per_sample, p=0.6)
    draw = subsampling.draw(2, tokens, heads=4, generator=seeded(seed))
    kept = draw.kept(tokens, tokens, causal)
    assert kept.any(-1).all()
    if causal:
        assert not kept.triu(1).any()
    torch.testing.assert_close(draw.attend(q, k, v, causal=causal), dense(q, k, v, kept), **EXACT)


@quick
@given(
    st.sampled_from(MODES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 4)]),
    st.booleans(),
)
def test_masks_and_biases_of_every_shape(mode, causal, per_sample, lead, rows) -> None:
    tokens = 21
    q, k, v = tensors(2, tokens)
    draw = Subsampling(mode, per_sample=per_sample).draw(2, tokens, heads=4, generator=seeded())
    shape = (*lead, tokens if rows else 1, tokens)
    added = torch.randn(shape, generator=seeded(1))
    kept = draw.kept(tokens, tokens, causal)
    out = draw.attend(q, k, v, causal=causal, mask=added)
    torch.testing.assert_close(out, dense(q, k, v, kept, added), **EXACT)
    if mode != "connection":  # which never leaves a target without sources that it could see
        mask = torch.rand(shape, generator=seeded(2)) > 0.3
        torch.testing.assert_close(draw.attend(q, k, v, causal=causal, mask=mask), dense(q, k, v, kept & mask), **EXACT)


@quick
@given(st.integers(2, 30), st.integers(1, 4), st.booleans())
def test_prefix_tokens_are_always_sources(tokens: int, prefix: int, per_sample: bool) -> None:
    q, k, v = tensors(2, tokens + prefix)
    for mode in ("unbiased", "local"):
        draw = Subsampling(mode, prefix=prefix, per_sample=per_sample).draw(2, tokens + prefix, generator=seeded())
        kept = draw.kept(tokens + prefix, tokens + prefix)
        assert kept[..., :prefix].all()
        if mode == "local":
            assert kept[:, :, :prefix].all()
        torch.testing.assert_close(draw.attend(q, k, v), dense(q, k, v, kept), **EXACT)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_long_sequences_in_tiles(causal: bool, per_sample: bool) -> None:
    q, k, v = tensors(2, 700)
    for mode in ("unbiased", "local"):
        draw = Subsampling(mode, ratio=3.3, per_sample=per_sample).draw(2, 700, generator=seeded())
        out = draw.attend(q, k, v, causal=causal)
        torch.testing.assert_close(out, dense(q, k, v, draw.kept(700, 700, causal)), **EXACT)


@modes
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_the_mask(mode, causal: bool) -> None:
    draw = Subsampling(mode).draw(2, 25, heads=4, generator=seeded())
    grads = []
    for run in (lambda *x: draw.attend(*x, causal=causal), lambda *x: dense(*x, draw.kept(25, 25, causal))):
        inputs = [x.requires_grad_() for x in tensors(2, 25)]
        grads.append(torch.autograd.grad(run(*inputs).square().sum(), inputs))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_with_all_sources_it_is_dense(causal: bool) -> None:
    q, k, v = tensors(2, 19)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    whole = Subsampling("local", ratio=1).draw(2, 19)
    draws: list[Draw] = [whole, replace(whole, window=50)]  # type: ignore[type-var]
    draws += [Subsampling("unbiased", ratio=1).draw(2, 19), Subsampling("unbiased", keep=19).draw(2, 19)]
    draws += [Subsampling("connection", p=0).draw(2, 19), Subsampling("source_dropout", p=0).draw(2, 19)]
    for draw in draws:
        torch.testing.assert_close(draw.attend(q, k, v, causal=causal), wanted, **EXACT)


def test_the_order_inside_a_subset_does_not_matter() -> None:
    q, k, v = tensors(1, 24)
    index = torch.randperm(24)[None, :6]
    for causal in (False, True):
        first, second = (Sources(i).attend(q, k, v, causal=causal) for i in (index, index.flip(-1)))
        torch.testing.assert_close(first, second, **EXACT)


@modes
def test_the_future_changes_nothing(mode) -> None:
    q, k, v = tensors(1, 24)
    draw = Subsampling(mode).draw(1, 24, heads=4, generator=seeded())
    changed = [torch.cat([x[:, :, :15], torch.randn_like(x[:, :, 15:])], 2) for x in (q, k, v)]
    first, second = draw.attend(q, k, v, causal=True), draw.attend(*changed, causal=True)
    torch.testing.assert_close(second[:, :, :15], first[:, :, :15], **EXACT)


@modes
def test_a_seed_repeats_and_layers_differ(mode) -> None:
    q, k, v = tensors(2, 24)
    generator = seeded(5)
    draws = [subsampled_attention(q, k, v, Subsampling(mode), generator=generator) for _ in range(2)]
    again = subsampled_attention(q, k, v, Subsampling(mode), generator=seeded(5))
    assert torch.equal(draws[0], again)
    assert not torch.allclose(draws[0], draws[1])


def test_every_source_is_kept_equally_often() -> None:
    draws, n, keep = 10_000, 16, 4
    index = Subsampling("unbiased", per_sample=True).draw(draws, n, generator=seeded()).index  # type: ignore[attr-defined]
    share = torch.bincount(index.flatten(), minlength=n) / draws
    sigma = math.sqrt(keep / n * (1 - keep / n) / draws)
    assert ((share - keep / n).abs() < 4 * sigma).all()  # 16 of them
    never = 1 - torch.zeros(draws // 5, n).scatter_(1, index.view(draws // 5, -1), 1.0)
    wanted = (1 - 1 / 4) ** 5  # of the tokens are never read in 5 layers
    assert abs(never.mean().item() - wanted) < 3 * math.sqrt(wanted * (1 - wanted) / never.numel())


def test_noise_decides_how_far_sources_are() -> None:
    """sigma = 0: blocks of neighbours; large: a random partition, N / 3 apart on average."""
    apart = []
    for sigma in (0.0, 4.0, 16.0, 1e5):
        kept = (
            Subsampling("local", ratio=8, sigma=sigma, per_sample=True).draw(200, 64, generator=seeded()).kept(64, 64)
        )
        q, k = kept[:, 0].nonzero().T[1:]
        apart.append((q - k)[q != k].abs().float().mean().item())
    assert apart == sorted(apart)
    assert apart[0] < 7  # the shift can join both ends in one block
    assert apart[-1] == pytest.approx(65 / 3, rel=0.03)


def test_windows_of_an_image() -> None:
    order = windows_first((4, 6), (2, 3))
    assert order[:6].tolist() == [0, 1, 2, 6, 7, 8]
    assert sorted(windows_first((5, 7), (2, 3)).tolist()) == list(range(35))
    noise = torch.zeros(1, 24)
    kept = Blocks(local_order(noise, 3.0, 0, order), 6).kept(24, 24)[0, 0]
    assert kept[0].nonzero().flatten().tolist() == [0, 1, 2, 6, 7, 8]
    layer = SubsampledAttention(16, 2, Subsampling("local", window=(2, 3)))
    assert layer(torch.randn(2, 4, 6, 16)).shape == (2, 4, 6, 16)


def test_padding_is_drawn_last() -> None:
    real = torch.arange(20) >= torch.tensor([0, 17])[:, None]
    index = Subsampling("unbiased").draw(2, 20, real=real, generator=seeded()).index  # type: ignore[attr-defined]
    assert real[1, index[1]].sum() == 3
    for seed in range(20):
        dropped = Subsampling("source_dropout", p=0.9).draw(2, 20, real=real, generator=seeded(seed))
        assert (~dropped.dropped & real).any(-1).all()  # type: ignore[attr-defined]


def test_sources_of_another_sequence() -> None:
    q, (_, k, v) = tensors(2, 9)[0], tensors(2, 30)
    for mode in ("unbiased", "connection", "source_dropout"):
        draw = Subsampling(mode).draw(2, 9, 30, heads=4, generator=seeded())
        torch.testing.assert_close(draw.attend(q, k, v), dense(q, k, v, draw.kept(9, 30)), **EXACT)


class _Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mode", ["unbiased", "local"])
def test_nothing_of_all_pairs_is_formed(mode: Any, causal: bool) -> None:
    q, k, v = (torch.randn(1, 1, 2048, 8, requires_grad=True) for _ in range(3))
    with _Largest() as largest:
        subsampled_attention(q, k, v, Subsampling(mode, ratio=8), causal=causal).sum().backward()
    assert largest.numel <= 2048 * 512


def test_costs() -> None:
    for ratio in (4, 8):
        for mode in ("unbiased", "local"):
            cost = subsampled_cost(Subsampling(mode, ratio=ratio), 4096, 8, 64)
            assert cost.saving == pytest.approx(ratio)
            assert cost.dense_probabilities / cost.probabilities == pytest.approx(ratio)
    assert subsampled_cost(Subsampling(), 4096, 8, 64).flops == 4 * 8 * 4096 * 1024 * 64
    assert subsampled_cost(Subsampling("connection"), 64, 8, 64).saving == 1
    ragged = Subsampling("local", keep=6, prefix=2)
    kept = ragged.draw(1, 22, generator=seeded()).kept(22, 22)
    assert subsampled_cost(ragged, 22, 1, 1).flops == 4 * kept.sum()


@pytest.mark.parametrize("causal", [False, True])
def test_the_layer_is_dense_in_eval_mode(causal: bool) -> None:
    layer, x = SubsampledAttention(24, 4, causal=causal), torch.randn(2, 32, 24)
    layer.generator = seeded(3)
    first = layer(x)
    layer.generator = seeded(3)
    assert torch.equal(layer(x), first)
    assert not torch.allclose(layer(x), first)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    if not causal:
        plain = create_layer("softmax", 24, 4, (4, 8)).eval()
        plain.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), plain(x), **EXACT)


def test_it_learns_in_heeds_vit() -> None:
    model = heed.create_model("vit_micro", attention="subsampled", depth=2)
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    optimiser, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(60):
        loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Subsampling("locale"), "did you mean|local"),  # type: ignore[arg-type]
        (lambda: Subsampling(ratio=0.5), "ratio=0.5 must be at least 1"),
        (lambda: Subsampling(keep=0), "keep"),
        (lambda: Subsampling(keep=9).draw(1, 8), "keep=9 exceeds the 8 sources"),
        (lambda: Subsampling(sigma=-1.0), "sigma=-1.0 must be >= 0"),
        (lambda: Subsampling(p=1.0), r"p=1.0 must be a probability in \[0, 1\)"),
        (lambda: Subsampling(prefix=-1), "prefix=-1"),
        (lambda: Subsampling(prefix=8).draw(1, 8), "leaves none of 8 sources"),
        (lambda: Subsampling(window=(2, 2)), "is for mode='local'"),
        (lambda: Subsampling("local", window=(2, 2)).draw(1, 8), "needs the rows and columns"),
        (lambda: Subsampling("local", window=(2, 2)).draw(1, 8, grid=(3, 3)), "holds 9 tokens"),
        (lambda: local_order(torch.zeros(1, 4), -1.0), "sigma=-1.0"),
        (lambda: Blocks(torch.arange(4)[None], 0), "window=0 must be at least 1"),
        (lambda: Blocks(torch.arange(4)[None], 2, -1), "prefix=-1"),
        (lambda: Blocks(torch.arange(4)[None], 2).attend(*tensors(1, 5)), "orders 4 tokens"),
        (lambda: Sources(torch.tensor([[7]])).attend(*tensors(1, 5)), "names source 7"),
        (lambda: Connections(torch.zeros(1, 1, 4, 4).bool()).attend(*tensors(1, 5)), r"is for \(4, 4\) pairs"),
        (lambda: Dropped(torch.zeros(1, 4).bool()).attend(*tensors(1, 5)), "is for 4 sources"),
        (
            lambda: Blocks(torch.arange(5)[None], 2, 1).attend(*tensors(1, 6), causal=True),
            "causal attention has no tokens",
        ),
        (
            lambda: subsampled_attention(*tensors(1, 5), Subsampling(prefix=1), causal=True),
            "causal attention has no tokens",
        ),
        (lambda: SubsampledAttention(8, 2, Subsampling(prefix=1), causal=True), "causal attention has no tokens"),
        (lambda: SubsampledAttention(8, 2, causal=True)(torch.randn(1, 2, 2, 8)), "not on a grid"),
        (
            lambda: subsampled_attention(tensors(1, 5)[0], *tensors(1, 6)[1:], Subsampling(), causal=True),
            "cross-attention has no order",
        ),
        (
            lambda: subsampled_attention(tensors(1, 5)[0], *tensors(1, 6)[1:], Subsampling("local")),
            "blocks are of one sequence",
        ),
        (
            lambda: subsampled_attention(*tensors(1, 5), Subsampling(), mask=torch.zeros(4, 5)),
            r"mask \(4, 5\) does not broadcast",
        ),
        (lambda: EGTConfig(16, 8, 3), "not divisible"),
        (lambda: EGTConfig(16, 8, 4, activation="swish"), "gelu"),  # type: ignore[arg-type]
        (lambda: EGTConfig(16, 8, 4, source_dropout=1.0), "source_dropout=1.0"),
        (lambda: EGT(EGTConfig(16, 8, 4), 0), "depth=0"),
        (lambda: EGT(EGTConfig(16, 8, 4), 2)(*graph(), dropped=[]), "0 draws for 2 layers"),
        (lambda: EGTLayer(EGTConfig(16, 8, 4))(graph()[0], torch.randn(2, 7, 6, 8)), "do not fit"),
        (lambda: egt_from_authors({"TGT_layers.0.tria.lin_V.weight": torch.zeros(1)}), "is no weight"),
        (
            lambda: EGTLayer(EGTConfig(16, 8, 4))(
                *graph(), sources=torch.zeros(2, 1).long(), dropped=torch.zeros(2, 7).bool()
            ),
            "without dropped",
        ),
    ],
)
def test_what_does_not_fit_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def graph(batch: int = 2, nodes: int = 7) -> tuple[Tensor, Tensor]:
    generator = seeded(nodes)
    return torch.randn(batch, nodes, 16, generator=generator), torch.randn(batch, nodes, nodes, 8, generator=generator)


def test_dropped_nodes_might_as_well_be_deleted() -> None:
    layer, (h, e) = EGTLayer(EGTConfig(16, 8, 4)), graph()
    dropped = torch.tensor([[0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0, 0]]).bool()
    hidden, edges = layer(h, e, dropped=dropped)
    kept = (~dropped).nonzero()[:, 1].view(2, 5)
    some, some_edges = layer(h, e, sources=kept)
    torch.testing.assert_close(some, hidden, **EXACT)
    of_kept = ~dropped[:, None].expand(2, 7, 7)
    torch.testing.assert_close(some_edges[of_kept], edges[of_kept], **EXACT)
    assert torch.equal(some_edges[~of_kept], e[~of_kept])  # edges that are not computed stay


def test_a_graph_without_any_source_has_no_nan() -> None:
    layer, (h, e) = EGTLayer(EGTConfig(16, 8, 4)), graph()
    h.requires_grad_()
    out, edges = layer(h, e, torch.zeros(2, 7).bool(), dropped=torch.ones(2, 7).bool())
    (out.sum() + edges.sum()).backward()
    assert out.isfinite().all()
    assert h.grad is not None
    assert h.grad.isfinite().all()


def test_padding_nodes_change_nothing() -> None:
    model, (h, e) = EGT(EGTConfig(16, 8, 4, virtual_nodes=1, clip=(-5, 5)), 2), graph(1)
    mask = (torch.arange(7) < 5)[None]
    padded, _ = model(h, e, mask)
    alone, _ = model(h[:, :5], e[:, :5, :5])
    torch.testing.assert_close(padded[:, :5], alone, **EXACT)


def test_the_graph_transformer_draws_in_training_alone() -> None:
    config = EGTConfig(16, 8, 4, source_dropout=0.4, connection_dropout=0.2)
    model, (h, e) = EGT(config, 2, drop_path=0.0), graph()
    first, _ = model(h, e)
    assert not torch.allclose(model(h, e)[0], first)
    model.eval()
    assert torch.equal(model(h, e)[0], model(h, e)[0])
    for layer in model.layers:
        layer.generator, layer.always = seeded(1), True
    first, _ = model(h, e)
    for layer in model.layers:
        layer.generator = seeded(1)
    assert torch.equal(model(h, e)[0], first)
    assert all(isinstance(layer, nn.Module) and layer.draws for layer in model.layers)
