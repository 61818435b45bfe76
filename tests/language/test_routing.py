"""Routing attention: who is routed where, what heads may see, how centroids move, and bad settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heed.language.routing import (
    HashedClusters,
    LocalHeads,
    OnlineKMeans,
    RelativePositions,
    RoutedHeads,
    RoutingAttention,
    RoutingSettings,
    StridedHeads,
    attend_group,
    from_blocks,
    nearest_members,
    normalise,
    scatter_mean,
    strided_members,
    to_blocks,
    visible_bias,
)
from heed.language.routing import kmeans as kmeans_module

EXACT = {"rtol": 1e-4, "atol": 1e-5}
quick = settings(max_examples=15, deadline=None)
SMALL: dict[str, Any] = {
    "dim": 32, "cluster_heads": 2, "local_heads": 2, "clusters": 3, "window": 6, "block": (4,), "max_relative": 5,
}  # fmt: skip
ALL_KINDS = SMALL | {"cluster_heads": 1, "cluster_strided_heads": 1, "strided_heads": 1, "local_heads": 1}


def layer_of(**options: Any) -> RoutingAttention:
    torch.manual_seed(0)
    layer = RoutingAttention(RoutingSettings(**SMALL | options)).eval()
    for p in (p for p in layer.parameters() if p.requires_grad):
        torch.nn.init.normal_(p, std=0.3)
    return layer


# ---- members, gathering, scattering


@quick
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(0, 99))
def test_members_are_the_nearest_in_order_and_early_ones_win_ties(t: int, w: int, levels: int, seed: int) -> None:
    w = min(w, t)
    distances = torch.randint(levels, (2, 2, t, 3), generator=torch.Generator().manual_seed(seed)).float()
    expected = distances.transpose(2, 3).sort(dim=-1, stable=True).indices[..., :w].sort(-1).values
    assert torch.equal(nearest_members(distances, w), expected)


def test_strided_members_are_spread_over_the_distances() -> None:
    distances = torch.tensor([5.0, 0, 4, 1, 3, 2, 6]).view(1, 1, 7, 1)
    # in the order of distance: 1 3 5 4 2 0 6; every second, three of them
    assert strided_members(distances, 3).flatten().tolist() == [1, 2, 5]


@quick
@given(st.integers(0, 99))
def test_scatter_mean_written_out(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(7, generator=generator)[:3] for _ in range(8)]).view(2, 2, 2, 3)
    y = torch.randn(2, 2, 2, 3, 4, generator=generator)
    total, count = torch.zeros(2, 2, 7, 4), torch.zeros(2, 2, 7, 1)
    for b, h, c, i in torch.cartesian_prod(*(torch.arange(n) for n in index.shape)).tolist():
        total[b, h, index[b, h, c, i]] += y[b, h, c, i]
        count[b, h, index[b, h, c, i]] += 1
    torch.testing.assert_close(scatter_mean(y, index, 7), total / (count + 0.01))


@quick
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 3)), min_size=1, max_size=3))
def test_blocks_come_back(axes: list[tuple[int, int]]) -> None:
    sizes, block = (tuple(values) for values in zip(*axes, strict=True))
    x = torch.randn(2, *sizes, 3)
    assert torch.equal(from_blocks(to_blocks(x, block), sizes, block), x)


# ---- routing heads


def heads_of(**options: Any) -> tuple[RoutedHeads, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    settings = RoutingSettings(**SMALL | {"relative": (), "dim": 32} | options)
    q, k, v = (torch.randn(2, 2, 12, 8) for _ in range(3))
    return RoutedHeads(settings, 2).eval(), q, k, v


def test_one_cluster_of_everything_is_dense_attention_over_normalised_queries_and_keys() -> None:
    heads, q, k, v = heads_of(clusters=1, window=12, masked=False, share_qk=False)
    dense = F.scaled_dot_product_attention(normalise(q), normalise(k), v, scale=1.0) / 1.01
    torch.testing.assert_close(heads(q, k, v)[0], dense, **EXACT)


def test_tokens_in_no_cluster_get_zero() -> None:
    heads, q, k, v = heads_of(clusters=2, window=2)
    y, _ = heads(q, k, v)
    index, _, _ = heads.route(*heads.prepare(q, k))
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        chosen = set(index[b, h].flatten().tolist())
        assert {t for t in range(12) if y[b, h, t].any()} == chosen


def test_the_order_of_clusters_does_not_matter() -> None:
    heads, q, k, v = heads_of()
    before = heads(q, k, v)
    assert isinstance(heads.clusters, OnlineKMeans)
    heads.clusters.means.data = heads.clusters.means[:, [2, 0, 1]]
    for old, new in zip(before, heads(q, k, v), strict=True):
        torch.testing.assert_close(old, new, **EXACT)


@quick
@given(st.integers(0, 11), st.sampled_from([(), ("cluster",)]))
def test_members_see_no_later_members(t: int, relative: tuple[str, ...]) -> None:
    heads, q, k, v = heads_of(window=12, relative=relative)  # everybody is a member, whatever the distances
    before = heads(q, k, v)[0]
    q[:, :, t], v[:, :, t] = torch.randn(8), torch.randn(8)
    moved = (heads(q, k, v)[0] - before).abs().amax((0, 1, 3)) > 1e-6
    assert moved.tolist() == [i >= t for i in range(12)]


def test_padding_and_token_bias_hide_keys() -> None:
    heads, q, k, v = heads_of(masked=False, share_qk=False, token_bias="trained")
    assert heads.token_bias_weight.requires_grad
    padding = torch.arange(12).expand(2, 12) >= 10
    hidden = heads(q, k, v, padding=padding)[0]
    torch.testing.assert_close(heads(q, k, v, token_bias=-1e4 * padding)[0], hidden, **EXACT)
    v = v.masked_fill(padding[:, None, :, None], 9.0)
    torch.testing.assert_close(heads(q, k, v, padding=padding)[0], hidden, **EXACT)


# ---- relative positions


@quick
@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 5))
def test_relative_attention_written_out(queries: int, more: int, reach: int) -> None:
    torch.manual_seed(0)
    keys = queries + more
    tables = RelativePositions(reach, 4)
    q, k, v = torch.randn(1, 2, queries, 4), torch.randn(1, 2, keys, 4), torch.randn(1, 2, keys, 4)
    bias = visible_bias(v, queries, masked=True)
    expected = torch.zeros(1, 2, queries, 4)
    for c in range(2):
        for i in range(queries):
            r = [min(max(j - (more + i), -reach), reach) + reach for j in range(keys)]
            rows, columns = tables.keys[r], tables.values[r]
            scores = torch.stack([q[0, c, i] @ (k[0, c, j] + rows[j]) for j in range(keys)])
            weights = scores.masked_fill(torch.arange(keys) > more + i, -torch.inf).softmax(0)
            expected[0, c, i] = weights @ (v[0, c] + columns)
    torch.testing.assert_close(tables.attend(q, k, v, bias), expected, **EXACT)


def test_zero_tables_change_nothing() -> None:
    torch.manual_seed(0)
    tables = RelativePositions(2, 4)
    for table in tables.parameters():
        torch.nn.init.zeros_(table)
    q, k, v = (torch.randn(3, 2, 5, 4) for _ in range(3))
    bias = visible_bias(v, 5, masked=True)
    torch.testing.assert_close(attend_group(q, k, v, bias, tables), attend_group(q, k, v, bias), **EXACT)


# ---- local and strided heads


@quick
@given(st.integers(1, 4), st.integers(0, 2), st.booleans())
def test_local_heads_see_blocks_around(blocks: int, reach: int, masked: bool) -> None:
    torch.manual_seed(0)
    settings = RoutingSettings(**SMALL | {"flange": (4 * reach,), "relative": (), "masked": masked})
    q, k, v = (torch.randn(2, 2, 4 * blocks, 8) for _ in range(3))
    t = torch.arange(4 * blocks)
    apart = (t[:, None] // 4 - t // 4).abs()
    seen = (apart <= reach) & ((t[:, None] >= t) | (not masked))
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=1.0)
    torch.testing.assert_close(LocalHeads(settings)(q, k, v, (blocks,)), dense, **EXACT)


@pytest.mark.parametrize("masked", [True, False])
def test_strided_heads_see_every_fourth_token(masked: bool) -> None:
    settings = RoutingSettings(**SMALL | {"relative": (), "masked": masked})
    q, k, v = (torch.randn(2, 2, 12, 8) for _ in range(3))
    t = torch.arange(12)
    seen = ((t[:, None] - t) % 4 == 0) & ((t[:, None] >= t) | (not masked))
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=1.0)
    torch.testing.assert_close(StridedHeads(settings)(q, k, v), dense, **EXACT)


def test_a_box_sees_no_later_box() -> None:
    layer = layer_of(cluster_heads=0, local_heads=4, block=(2, 3))
    x = torch.randn(1, 4, 9, 32)
    order = to_blocks(torch.arange(36.0).view(1, 4, 9, 1), (2, 3)).flatten().long()
    before = layer(x)[0].flatten(1, 2)[0, order]
    for place in (0, 7, 20, 35):
        changed = x.flatten(1, 2).clone()
        changed[:, order[place]] += 1
        moved = (layer(changed.view(x.shape))[0].flatten(1, 2)[0, order] - before).abs().amax(-1) > 1e-6
        assert not moved[:place].any()
        assert moved[place]


# ---- k-means


def test_centroids_move_in_training_only_and_have_no_gradient() -> None:
    means = OnlineKMeans(2, 8, 3)
    x = normalise(torch.randn(2, 2, 10, 8)).requires_grad_()
    before = {name: value.clone() for name, value in means.state_dict().items()}
    loss = means.eval()(x)[1]
    assert loss >= 0
    assert all(torch.equal(value, before[name]) for name, value in means.state_dict().items())
    means.train()(x)[1].backward()
    assert all(not torch.equal(value, before[name]) for name, value in means.state_dict().items())
    assert means.means.grad is None
    assert x.grad is not None
    learned = OnlineKMeans(2, 8, 3, ema=False).train()
    before = learned.means.detach().clone()
    learned(x)[1].backward()
    assert learned.means.grad is not None
    assert torch.equal(learned.means, before)


@pytest.mark.parametrize("fix", [False, True])
def test_moving_averages_written_out(fix: bool) -> None:
    means = OnlineKMeans(2, 4, 3, decay=0.9, fix_count=fix, initial_count=1.0).train()
    old, x = means.means.clone(), normalise(torch.randn(2, 2, 5, 4))
    x[:, :, 4] = 0  # padding
    means(x)
    count, total = torch.zeros(2, 3), torch.zeros(2, 3, 4)
    for flat, (b, h, t) in enumerate(torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:3])).tolist()):
        if t < 4:
            near = int((old[h] @ x[b, h, t]).argmax())
            count[h if fix else flat % 2, near] += 1  # the authors deal counts to heads by flat index
            total[h, near] += x[b, h, t]
    count, total = 0.9 + 0.1 * count, 0.9 * old + 0.1 * total
    size = count.sum(1, keepdim=True)
    torch.testing.assert_close(means.ema_count, count)
    torch.testing.assert_close(means.ema_means, total)
    torch.testing.assert_close(means.means, total / ((count + 1e-5) / (size + 3e-5) * size)[..., None])


def test_recomputation_does_not_count_again() -> None:
    layers = [layer_of().train() for _ in range(2)]
    x = torch.randn(2, 12, 32, requires_grad=True)
    layers[0](x)[0].sum().backward()
    checkpoint(layers[1], x, use_reentrant=False)[0].sum().backward()
    states = [layer.state_dict() for layer in layers]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_replicas_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    one, two = OnlineKMeans(2, 4, 3).train(), OnlineKMeans(2, 4, 3).train()
    two.load_state_dict(one.state_dict())
    x = normalise(torch.randn(2, 2, 6, 4))
    one(torch.cat([x, x]))
    monkeypatch.setattr(kmeans_module.replicas, "is_initialized", lambda: True)
    monkeypatch.setattr(kmeans_module.replicas, "all_reduce", lambda t: t.mul_(2))
    two(x)
    torch.testing.assert_close(one.means, two.means)


def test_hashing_is_by_signs() -> None:
    hashed = HashedClusters(2, 4, 5)  # 2 bits; the fifth bucket stays empty
    torch.testing.assert_close(hashed.projections @ hashed.projections.transpose(1, 2), torch.eye(2).expand(2, 2, 2))
    x = torch.randn(1, 2, 9, 4)
    x[:, :, 0] = 0
    found = hashed(x)[0][0]
    for h in range(2):
        bits = (x[0, h] @ hashed.projections[h].T > 0).long()
        assert torch.equal(found[0, h].argmin(-1), bits[:, 0] + 2 * bits[:, 1])
    assert found[0, :, 0, 0].tolist() == [-1, -1]
    layer = layer_of(hash_items=True, clusters=4)
    assert layer.train()(torch.randn(2, 12, 32))[1] == 0


# ---- the layer


@pytest.mark.parametrize("options", [{}, {"relative": ()}, {"share_qk": False}, {"attn_dropout": 0.2}, {"ema": False}])
def test_the_layer_learns_everywhere(options: dict[str, Any]) -> None:
    layer = layer_of(**{**ALL_KINDS, **options}).train()
    y, loss = layer(torch.randn(2, 13, 32))
    assert y.shape == (2, 13, 32)
    (y.square().sum() + loss).backward()
    silent = [n for n, p in layer.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


def test_every_kind_of_heads_can_stand_alone() -> None:
    none = dict.fromkeys(("cluster_heads", "strided_heads", "local_heads"), 0)
    for kind in none:
        layer = layer_of(**none | {kind: 4})
        assert layer(torch.randn(1, 12, 32))[0].shape == (1, 12, 32)


def test_a_memory_is_attended_to() -> None:
    layer = layer_of(cluster_heads=4, local_heads=0, share_qk=False, masked=False, relative=())
    x, memory = torch.randn(2, 12, 32), torch.randn(2, 7, 32)
    padding = torch.arange(7).expand(2, 7) > 4
    y = layer(x, memory, padding=padding)[0]
    assert y.shape == x.shape
    padded = memory.clone()
    padded[:, 5:] += 1e-3  # too little to change the members
    torch.testing.assert_close(layer(x, padded, padding=padding)[0], y, **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 30}, "dim=30 is not divisible by the 4 heads"),
        ({"flange": (6,)}, r"flange=\(6,\) must be a multiple of block=\(4,\)"),
        ({"max_relative": None}, "max_relative=None, but cluster, cluster_strided, strided, local"),
        ({"cluster_strided_heads": 3, "local_heads": 3}, "cluster_strided_heads=3 must be at most cluster_heads=2"),
        ({"relative": ("globl",)}, "unknown kind of heads 'globl'"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"block": ()}, "needs one side"),
        ({"local_heads": -1}, "must not be negative"),
        ({"token_bias": "x"}, "unknown token_bias"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingSettings(**SMALL | options)


def test_bad_input_of_the_layer() -> None:
    layer, x = layer_of(), torch.randn(1, 12, 32)
    for wrong, message in (
        (lambda: layer(torch.randn(1, 4, 32)), "window=6 tokens per cluster, but there are only 4"),
        (lambda: layer(torch.randn(1, 12, 16)), r"takes \(B, T, 32\)"),
        (lambda: layer(torch.randn(1, 3, 4, 32)), r"takes \(B, T, 32\)"),
        (lambda: layer(x, x), "share_qk=True leaves no place for a memory"),
        (lambda: layer_of(share_qk=False)(x, x), "masked=True has no meaning with a memory"),
        (lambda: layer_of(share_qk=False, masked=False)(x, x), "local and strided heads have no place"),
        (lambda: layer(x, token_bias=torch.zeros(1, 12)), "token_bias is given"),
        (lambda: OnlineKMeans(1, 4, 0), "clusters=0 must be at least 1"),
        (lambda: OnlineKMeans(1, 4, 2, decay=1.0), r"decay=1.0 must lie in \[0, 1\)"),
        (lambda: HashedClusters(1, 2, 64), "need 6 orthogonal directions"),
        (lambda: layer_of(masked=False).step(x[:, :1], None), "needs masked=True"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
