"""Temperatures and the selective attention layer: their equations, what holds for all of them, and what they cure."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import heed
from heed.layers.registry import create_layer
from heed.layers.selective import SelectiveAttention
from heed.layers.temperature import GAINS, Kind, Selective, Temperature, alpha_for, spikiness

EXACT: Any = {"rtol": 1e-4, "atol": 1e-5}
quick = settings(max_examples=15)
PARTS = st.sampled_from([(), ("position",), ("token",), ("position", "token")])
OFF = {"query": (), "value": (), "key": ()}


def stirred(module: nn.Module) -> nn.Module:
    """With no parameter at a special value."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def plain(layer: SelectiveAttention, x: Tensor) -> Tensor:
    """Attention of a layer without its temperatures."""
    q, k, v = (
        p(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=layer.causal, enable_gqa=True)
    return layer.o_proj(out.transpose(1, 2).flatten(2))


@quick
@given(PARTS, PARTS, PARTS, st.sampled_from(get_args(Kind)), st.booleans(), st.booleans(), st.booleans())
def test_the_layer_is_its_equation(query, value, key, position, sharing, per_head, causal) -> None:
    if not query + value + key:
        return
    torch.manual_seed(0)
    options = Selective(query, value, key, position, sharing, per_head=per_head)
    layer = stirred(SelectiveAttention(24, 4, kv_heads=2, causal=causal, settings=options))
    x = torch.randn(2, 7, 24)
    n = torch.arange(1, 8) if causal else torch.full((7,), 7)
    heads = {}
    for name, count in (("query", 4), ("key", 2), ("value", 2)):
        made = getattr(layer, f"{name[0]}_proj")(x).view(2, 7, count, 6).transpose(1, 2)
        tau, temperature = torch.ones(2, count, 7), getattr(layer, f"tau_{name}")
        if "position" in getattr(options, name):
            tau = tau + GAINS[position](temperature.alpha) * n.log()
        if "token" in getattr(options, name) and sharing:
            each = (temperature.score[:, None] * F.gelu(made)).sum(-1)
            tau = tau + (each if per_head else each.sum(1, keepdim=True)).tanh()
        elif "token" in getattr(options, name):
            w1, w2 = temperature.network[0].weight, temperature.network[2].weight
            tau = tau + (F.gelu(x @ w1.T) @ w2.T).tanh()[..., 0][:, None]
        assert (tau > 0).all()
        heads[name] = made * tau[..., None]
    q, k, v = heads["query"], heads["key"].repeat_interleave(2, 1), heads["value"].repeat_interleave(2, 1)
    scores = q @ k.mT / math.sqrt(6)
    if causal:
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    wanted = layer.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), wanted, **EXACT)


def test_without_gain_and_score_it_is_plain_attention() -> None:
    layer = SelectiveAttention(24, 4, causal=True, settings=Selective(position="linear", gain=0.0))
    x = torch.randn(2, 9, 24)
    torch.testing.assert_close(layer(x), plain(layer, x), **EXACT)
    started = SelectiveAttention(24, 4, causal=True, settings=Selective())
    torch.testing.assert_close(started(x), plain(started, x), rtol=1e-2, atol=1e-2)  # almost the same function


def test_the_first_row_has_no_position() -> None:
    layer = SelectiveAttention(24, 4, causal=True, settings=Selective(("position",), ("position",), gain=0.7))
    x = torch.randn(2, 9, 24)
    torch.testing.assert_close(layer(x)[:, 0], plain(layer, x)[:, 0], **EXACT)
    assert not torch.allclose(layer(x)[:, 1:], plain(layer, x)[:, 1:], atol=1e-3)


@quick
@given(st.floats(1e-6, 0.999))
def test_parametrisations_meet(gain: float) -> None:
    for position in get_args(Kind):
        assert GAINS[position](torch.tensor(alpha_for(gain, position))).item() == pytest.approx(gain, rel=1e-3)
    beta = torch.tensor(alpha_for(gain, "exp_exp"), dtype=torch.float64)
    alpha = torch.logit(torch.exp(-torch.exp(beta)))
    torch.testing.assert_close(GAINS["sigmoid"](alpha), GAINS["exp_exp"](beta))


def test_a_linear_gain_below_zero_does_nothing_and_comes_back() -> None:
    temperature = Temperature(("position",), 2, 4, 8, Selective(position="linear"))
    with torch.no_grad():
        temperature.alpha.fill_(-0.2)  # type: ignore[union-attr]
    tau = temperature(torch.randn(1, 2, 5, 4), torch.arange(1, 6)[None])
    assert (tau == 1).all()
    tau.sum().backward()
    assert temperature.alpha.grad > 0  # type: ignore[union-attr, operator]


@quick
@given(st.integers(1, 8))
def test_the_future_changes_nothing(seen: int) -> None:
    torch.manual_seed(0)
    layer = stirred(SelectiveAttention(24, 4, causal=True))
    x = torch.randn(1, 9, 24)
    changed = torch.cat([x[:, :seen], torch.randn(1, 9 - seen, 24)], 1)
    torch.testing.assert_close(layer(changed)[:, :seen], layer(x)[:, :seen], **EXACT)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_on_the_left_changes_nothing(causal: bool) -> None:
    layer = stirred(SelectiveAttention(24, 4, causal=causal))
    x, keep = torch.randn(2, 9, 24), torch.arange(9) >= torch.tensor([0, 4])[:, None]
    together = layer(x, key_mask=keep)
    torch.testing.assert_close(together[:1], layer(x[:1]), **EXACT)
    torch.testing.assert_close(together[1:, 4:], layer(x[1:, 4:]), **EXACT)


def test_half_precision_tells_neighbours_apart() -> None:
    temperature = Temperature(("position",), 1, 4, 8, Selective(gain=0.5))
    far = torch.tensor([[4000, 4001]])
    tau = temperature(torch.randn(1, 1, 2, 4).bfloat16(), far)
    assert tau.dtype == torch.float32
    assert tau[0, 0, 0] != tau[0, 0, 1]
    assert SelectiveAttention(24, 4).bfloat16()(torch.randn(1, 5, 24).bfloat16()).dtype == torch.bfloat16


def test_spikiness() -> None:
    even, alone = torch.full((8,), 1 / 8), torch.eye(8)[3]
    assert spikiness(even).item() == pytest.approx(1)
    assert spikiness(alone).item() == pytest.approx(1 / 8)
    part = torch.tensor([0.5, 0.5, 0.0, 0.0])
    assert (spikiness(part, 2) * 2).item() == pytest.approx(2)
    weights = torch.randn(50, 20).softmax(-1)
    assert ((spikiness(weights) > 1 / 20) & (spikiness(weights) <= 1 + 1e-6)).all()


def test_a_gain_keeps_attention_from_thinning_out() -> None:
    """Slope of the effective number of keys over the length, log-log, for standard normal scores."""
    lengths = torch.tensor([64, 256, 1024, 4096])
    slopes = {}
    for gain in (0.0, 0.1, 0.3):
        effective = []
        for length in lengths.tolist():
            generator = torch.Generator().manual_seed(0)
            scores = torch.randn(200, length, generator=generator) * (1 + gain * math.log(length))
            effective.append((spikiness(scores.softmax(-1)) * length).mean().log())
        x, y = lengths.log(), torch.stack(effective)
        slopes[gain] = (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
    assert slopes[0.0] > 0.9
    assert slopes[0.1] < 0.75
    assert slopes[0.3] < 0.3


@pytest.mark.parametrize("shape", [(2, 12, 24), (2, 3, 4, 24)])
def test_it_drops_in(shape: tuple[int, ...]) -> None:
    layer = create_layer("selective", 24, 4, (3, 4))
    x = torch.randn(shape, requires_grad=True)
    assert layer(x).shape == shape
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_it_learns_in_heeds_vit() -> None:
    model = heed.create_model("vit_micro", attention="selective", depth=2)
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    optimiser, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(30):
        loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Selective(position="exp"), "did you mean|exp_exp"),  # type: ignore[arg-type]
        (lambda: Selective(query=("postion",)), "position"),  # type: ignore[arg-type]
        (lambda: Selective(query="token"), "must be a tuple"),  # type: ignore[arg-type]
        (lambda: Selective(**OFF), "no temperature"),
        (lambda: Selective(gain=1.5), r"gain=1.5 .*in \(0, 1\)"),
        (lambda: Selective(gain=-1.0, position="linear"), "must be >= 0"),
        (lambda: Selective(hidden=8), "belongs to sharing=False"),
        (lambda: alpha_for(0.5, "log"), "sigmoid"),  # type: ignore[arg-type]
        (lambda: SelectiveAttention(24, 5), "not divisible"),
        (lambda: SelectiveAttention(24, 4, kv_heads=3), "not a multiple of kv_heads=3"),
        (lambda: SelectiveAttention(24, 4)(torch.randn(2, 5, 23)), "channels last"),
        (lambda: SelectiveAttention(24, 4, causal=True)(torch.randn(2, 5, 5, 24)), "flatten the tokens"),
        (
            lambda: Temperature(("position",), 2, 4, 8, Selective())(torch.randn(1, 2, 3, 4), None),
            "needs positions",
        ),
        (
            lambda: Temperature(("token",), 2, 4, 8, Selective(sharing=False))(torch.randn(1, 2, 3, 4), None),
            "needs the inputs",
        ),
    ],
)
def test_what_does_not_fit_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
