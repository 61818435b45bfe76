"""Mixture-of-Head attention: the router, the gathered core, the load balance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from heed.layers.attention import PatternAttention
from heed.layers.moh import (
    MoHAttention,
    MoHRouter,
    Routing,
    active_heads,
    attend_gated,
    collect_balance,
    gated_heads,
    load_balance,
)
from heed.layers.registry import create_layer
from heed.layers.routed_heads import attend_routed, gathering_pays


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, int, int]:
    heads = draw(st.integers(1, 8))
    shared = draw(st.integers(0, heads))
    return heads, shared, draw(st.integers(min(1, heads - shared), heads - shared))


@given(splits())
@settings(max_examples=25)
def test_gates(split: tuple[int, int, int]) -> None:
    """Exactly the shared and the routed heads are open; the gates of a token sum to what the card says."""
    heads, shared, routed = split
    routing = MoHRouter(12, heads, shared, routed)(torch.randn(2, 5, 12))
    assert routing.gates.shape == (2, 5, heads)
    assert ((routing.gates > 0).sum(-1) == shared + routed).all()
    assert (routing.gates[..., :shared] > 0).all()
    total = torch.full((2, 5), float(shared + routed))
    if routed and shared:
        torch.testing.assert_close(routing.balance.sum(-1), torch.full((2, 5), 2.0))
        total = routing.balance @ torch.tensor([float(shared), float(routed)])
    torch.testing.assert_close(routing.gates.sum(-1), total)


def test_a_router_owns_what_it_needs() -> None:
    assert [name for name, _ in MoHRouter(8, 4, 2, 1).named_children()] == ["wg", "wg_0", "wg_1"]
    assert [name for name, _ in MoHRouter(8, 4, 1, 1).named_children()] == ["wg", "wg_0"]
    assert [name for name, _ in MoHRouter(8, 4, 0, 2).named_children()] == ["wg"]
    assert [name for name, _ in MoHRouter(8, 4, 4, 0).named_children()] == ["wg_1"]
    assert not list(MoHRouter(8, 1, 1, 0).children())


def test_without_router_weights_it_is_multi_head_attention() -> None:
    moh, plain = MoHAttention(16, 4, shared=2, routed=2), PatternAttention(16, 4)
    for layer in moh.router.children():
        nn.init.zeros_(layer.weight)
    moh.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(moh(x), plain(x))


def routed_inputs(heads: int, shared: int, routed: int, tokens: int) -> tuple[list[Tensor], Routing]:
    x = torch.randn(2, tokens, 12)
    router = MoHRouter(12, heads, shared, routed)
    router.wg.weight.data *= 8  # heads of very different popularity
    return [torch.randn(2, heads, tokens, 6, requires_grad=True) for _ in range(3)], router(x)


@given(st.sampled_from([(4, 1, 1), (6, 2, 2), (6, 0, 2), (5, 4, 1), (4, 0, 4), (8, 1, 2)]), st.integers(1, 40))
@settings(max_examples=20)
def test_gathered_is_ungathered(split: tuple[int, int, int], tokens: int) -> None:
    """Outputs and all gradients, that of the router's weights among them."""
    qkv, routing = routed_inputs(*split, tokens)
    cotangent = torch.randn(2, tokens, split[0], 6)
    results = []
    for gather in (True, False):
        y = attend_gated(*qkv, routing, sum(split[1:]), gather=gather)
        grads = torch.autograd.grad((y * cotangent).sum(), [*qkv, routing.gates], retain_graph=True)
        results.append([y, *grads])
    # A gate that is 0 has a gradient where all heads are computed; the router does not pass it on.
    results[1][-1] = results[1][-1] * (routing.gates != 0)
    results[0][-1] = results[0][-1] * (routing.gates != 0)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_tensor_scale_is_one_per_head() -> None:
    (q, k, v), routing = routed_inputs(4, 1, 1, 9)
    scale = torch.rand(4, 1, 1)
    want = attend_gated(q * scale, k, v, routing, 2, scale=1.0, gather=False)
    torch.testing.assert_close(attend_routed(q, k, v, routing.gates, routing.mask, scale=scale), want)


@pytest.mark.parametrize(("shared", "routed"), [(4, 2), (2, 2), (0, 4)])
def test_the_core_costs_what_is_active(shared: int, routed: int) -> None:
    """With balanced heads the multiply-adds are exactly those of the active share."""
    heads, tokens = 8, 24
    places = (torch.arange(tokens)[:, None] + torch.arange(routed)) % (heads - shared)
    mask = torch.zeros(1, tokens, heads - shared).scatter(-1, places[None], 1.0).bool()
    gates = torch.cat([torch.ones(1, tokens, shared), mask.float()], -1)
    q, k, v = (torch.randn(1, heads, tokens, 4) for _ in range(3))
    count = {}
    for gather in (True, False):
        with FlopCounterMode(display=False) as counter:
            attend_gated(q, k, v, Routing(gates, gates, mask), shared + routed, gather=gather)
        count[gather] = counter.get_total_flops()
    assert count[True] * heads == count[False] * (shared + routed)


def test_gathering_pays_for_long_sequences_with_few_heads() -> None:
    cpu = torch.device("cpu")
    assert gathering_pays(1024, 8, 4, cpu)
    assert gathering_pays(2048, 8, 6, cpu)
    assert not gathering_pays(196, 8, 4, cpu)
    assert not gathering_pays(4096, 8, 8, cpu)


@pytest.mark.parametrize("gather", [True, False])
def test_order_of_tokens_does_not_matter(gather: bool) -> None:
    layer = MoHAttention(12, 6, shared=2, routed=2, gather=gather, qk_norm=True).eval()
    x, order = torch.randn(2, 11, 12), torch.randperm(11)
    torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]))


@pytest.mark.parametrize("gather", [True, False])
def test_half_precision(gather: bool) -> None:
    layer = MoHAttention(12, 6, shared=1, routed=2, gather=gather, qk_norm=True).eval()
    x = torch.randn(2, 11, 12)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert torch.isfinite(low).all()
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_any_attention_can_be_gated() -> None:
    out, gates = torch.randn(2, 5, 3, 4), torch.rand(2, 5, 3)
    torch.testing.assert_close(gated_heads(out, gates)[:, :, 1], out[:, :, 1] * gates[:, :, 1:2])


def test_load_balance_of_uniform_and_of_fixed_heads() -> None:
    heads, routed = 6, 2
    uniform = torch.full((1, heads, heads), 1 / heads)
    spread = torch.eye(heads).roll(1, 0) + torch.eye(heads)
    assert load_balance(Routing(uniform, uniform, spread[None] > 0)).item() == pytest.approx(routed)
    probs = torch.tensor([0.45, 0.45, 0.025, 0.025, 0.025, 0.025]).expand(1, heads, heads)
    fixed = torch.tensor([1, 1, 0, 0, 0, 0]).expand(1, heads, heads) > 0
    assert load_balance(Routing(probs, probs, fixed)).item() > 2 * routed


def test_load_balance_leaves_padding_out() -> None:
    router, x = MoHRouter(8, 4, 1, 2), torch.randn(2, 6, 8)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[:, 4:] = True
    wanted = load_balance(router(x[:, :4]))
    torch.testing.assert_close(load_balance(router(x), padding), wanted)


def test_one_routed_head_learns_from_the_balance_alone() -> None:
    layer, x = MoHAttention(12, 4, shared=1, routed=1), torch.randn(2, 9, 12)
    with collect_balance(layer) as balance:
        y = layer(x)
    (task,) = torch.autograd.grad(y.sum(), [layer.router.wg.weight], retain_graph=True)
    (even,) = torch.autograd.grad(balance.loss(), [layer.router.wg.weight])
    assert task.abs().max() < 1e-5 < even.abs().max()


def test_balance_is_collected_inside_the_block_only() -> None:
    model = nn.Sequential(
        MoHAttention(8, 4, shared=1, routed=2),
        MoHAttention(8, 4, shared=4, routed=0),
        MoHAttention(8, 2, shared=0, routed=1),
    )
    x = torch.randn(2, 5, 8)
    with collect_balance(model) as balance:
        model(x)
        model(x)
    model(x)
    assert [name for name, _ in balance.routings] == ["0", "2", "0", "2"]
    mean = torch.stack([load_balance(routing) for _, routing in balance.routings]).mean()
    torch.testing.assert_close(balance.loss(), mean)
    assert {name: round(share.sum().item(), 4) for name, share in balance.usage().items()} == {"0": 2, "2": 1}
    assert {name: (a.active, a.heads) for name, a in active_heads(model).items()} == {
        "0": (3, 4),
        "1": (4, 4),
        "2": (1, 2),
    }
    with collect_balance(model) as empty, pytest.raises(ValueError, match="no routing was collected"):
        empty.loss()


def test_the_balance_loss_spreads_the_heads() -> None:
    """Entropy of the head usage rises when the loss is minimised."""
    router, x = MoHRouter(8, 6, 0, 1), torch.randn(1, 200, 8) + 1
    router.wg.weight.data *= 3

    def entropy() -> float:
        share = router(x).mask.float().mean((0, 1))
        return torch.special.entr(share).sum().item()

    before, optimiser = entropy(), torch.optim.Adam(router.parameters(), 0.02)
    for _ in range(60):
        optimiser.zero_grad()
        load_balance(router(x)).backward()
        optimiser.step()
    assert entropy() > before + 0.1


@pytest.mark.parametrize(
    ("heads", "shared", "routed"), [(4, 3, 2), (4, 4, 1), (4, -1, 2), (4, 1, -1), (4, 0, 0), (4, 0, 5)]
)
def test_heads_that_do_not_fit(heads: int, shared: int, routed: int) -> None:
    with pytest.raises(ValueError, match=f"shared={shared} and routed={routed} of heads={heads}"):
        MoHAttention(16, heads, shared=shared, routed=routed)


def test_other_bad_input() -> None:
    with pytest.raises(ValueError, match="dim=10 is not divisible by num_heads=4"):
        MoHAttention(10, 4, shared=2, routed=1)
    MoHAttention(10, 4, shared=2, routed=1, head_dim=3)(torch.randn(1, 3, 10))
    with pytest.raises(ValueError, match="leave 2 heads unused"):
        MoHRouter(8, 4, 2, 0)
    with pytest.raises(ValueError, match="dim=8"):
        MoHAttention(8, 4, shared=2, routed=1)(torch.randn(1, 3, 10))
    with pytest.raises(ValueError, match="needs routed heads"):
        load_balance(MoHRouter(8, 4, 4, 0)(torch.randn(1, 3, 8)))
    (q, k, v), routing = routed_inputs(4, 1, 1, 9)
    with pytest.raises(ValueError, match=r"gates \(2, 8, 4\)"):
        attend_routed(q, k, v, routing.gates[:, 1:], routing.mask)
    with pytest.raises(ValueError, match=r"mask \(2, 8, 3\)"):
        attend_routed(q, k, v, routing.gates, routing.mask[:, 1:])


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6])
def test_grid_host(heads: int) -> None:
    layer = create_layer("moh", 12, heads, (5, 4))
    x = torch.randn(2, 5, 4, 12)
    assert layer(x).shape == x.shape
    (report,) = active_heads(layer).values()
    assert report.share == 1 if heads < 3 else 0.5 < report.share < 1
