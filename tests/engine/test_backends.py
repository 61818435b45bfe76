"""Every backend against the reference: outputs, logsumexp and gradients, for drawn patterns, shapes and options."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import heed
from heed.engine.bias import RelativeBias, RelativeLogits
from heed.engine.pattern import Pattern, Rule
from heed.engine.patterns import (
    Blocks,
    Causal,
    Dilated,
    Full,
    Grouped,
    Halo,
    Neighborhood,
    Selected,
    Strided,
    Subsampled,
    Window,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass
class Drawn:
    """One drawn call."""

    pattern: Pattern
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | RelativeBias | RelativeLogits | None
    key_mask: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        extra: list[Tensor] = []
        if isinstance(self.bias, Tensor):
            extra = [self.bias]
        elif isinstance(self.bias, RelativeBias):
            extra = [self.bias.table]
        elif self.bias is not None:
            extra = list(self.bias.logits)
        return [self.q, self.k, self.v, *extra]


@st.composite
def patterns(draw: st.DrawFn, batch: int, heads: int) -> tuple[Pattern, int, int]:
    """(pattern, queries, keys) of every kind, compositions included."""
    kind = draw(st.sampled_from(["sequence", "sequence", "grid", "halo", "content", "composed"]))
    if kind == "grid":
        rank = draw(st.integers(1, 3))
        kernel = tuple(draw(st.integers(2, 4)) for _ in range(rank))
        dilation = tuple(draw(st.integers(1, 2)) for _ in range(rank))
        grid = tuple(w * t + draw(st.integers(0, 6)) for w, t in zip(kernel, dilation, strict=True))
        stride = tuple(draw(st.integers(1, w)) for w in kernel)
        causal = tuple(draw(st.booleans()) for _ in range(rank))
        n = int(torch.tensor(grid).prod())
        which = draw(st.sampled_from([Neighborhood(grid, kernel, dilation, stride, causal), Blocks(kernel, 1, grid)]))
        return which, n, n
    if kind == "halo":
        block, halo, stride = 2 * draw(st.integers(1, 3)), draw(st.integers(0, 3)), draw(st.sampled_from([1, 2]))
        grid = (block * draw(st.integers(1, 3)), block * draw(st.integers(1, 3)))
        padded = draw(st.booleans())
        n = grid[0] * grid[1] // stride**2
        m = (grid[0] + 2 * halo * padded) * (grid[1] + 2 * halo * padded)
        return Halo(grid, block, halo, stride, padded), n, m
    n, m = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    leaves = [
        Full(),
        Causal(draw(st.integers(-20, 20))),
        Window(draw(st.integers(0, 40)), draw(st.integers(0, 40))),
        Blocks(draw(st.integers(1, 90)), 0),
        Dilated(draw(st.integers(0, 5)), draw(st.integers(1, 9))),
        Strided(draw(st.integers(1, 40))),
        Subsampled(draw(st.floats(0.05, 1.0)), seed=draw(st.integers(0, 9))),
    ]
    leaf = draw(st.sampled_from(leaves))
    if kind == "sequence":
        return leaf, n, m
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    per_head = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])))
    bq, bk = draw(st.sampled_from([(64, 64), (16, 32), (1, 1), (7, 5)]))
    slots = (*per_head, -(-n // bq), draw(st.integers(1, 4)))
    content = draw(
        st.sampled_from(
            [
                Selected(torch.randint(-1, -(-m // bk), slots, generator=generator), (bq, bk)),
                Grouped(
                    torch.randint(0, 4, (*per_head, n), generator=generator),
                    torch.randint(0, 4, (*per_head, m), generator=generator),
                ),
            ]
        )
    )
    if kind == "content":
        return content, n, m
    second = draw(st.sampled_from([*leaves, content]))
    pattern = draw(st.sampled_from([leaf & second, leaf | second, ~leaf, leaf & ~second, Causal() & (leaf | second)]))
    return pattern, n, m


@st.composite
def calls(draw: st.DrawFn, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Drawn:
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    heads = kv_heads * group
    pattern, n, m = draw(patterns(batch, heads))
    width, value_width = draw(st.sampled_from([(8, 8), (4, 12)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    bias: Tensor | RelativeBias | RelativeLogits | None = None
    kind = draw(st.sampled_from(["none", "none", "dense", "shared", "relative", "logits"]))
    axes = pattern.axes(n, m)
    if kind == "dense":
        bias = normal(batch, heads, n, m)
    elif kind == "shared":
        bias = normal(heads, 1, m)
    elif kind == "relative" and axes is not None:
        bias = RelativeBias(normal(heads, *(2 * draw(st.integers(1, 9)) + 1 for _ in axes)))
    elif kind == "logits" and axes is not None:
        entries = [draw(st.integers(1, 12)) for _ in axes]
        bias = RelativeLogits(tuple(normal(batch, heads, n, e) for e in entries), tuple(e // 2 for e in entries))
    key_mask = None
    if draw(st.booleans()):
        key_mask = (torch.rand(batch, m, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9]))).to(device)
    q, k, v = normal(batch, heads, n, width), normal(batch, kv_heads, m, width), normal(batch, kv_heads, m, value_width)
    return Drawn(pattern, q, k, v, bias, key_mask)


def results(drawn: Drawn, backend: str, *, lse: bool) -> list[Tensor]:
    """Output, logsumexp where there is one, and the gradients of a random combination of both."""
    options = {"bias": drawn.bias, "key_mask": drawn.key_mask, "backend": backend}
    generator = torch.Generator(drawn.q.device).manual_seed(1)
    if lse:
        out, sums = heed.attend(drawn.q, drawn.k, drawn.v, drawn.pattern, return_lse=True, **options)
    else:
        out, sums = heed.attend(drawn.q, drawn.k, drawn.v, drawn.pattern, **options), None
    upstream = torch.randn(out.shape, generator=generator, device=out.device)
    loss = (out.float() * upstream).sum()
    if sums is not None:
        assert torch.isinf(sums).logical_not().logical_or(sums < 0).all()
        sums = torch.where(sums.isinf(), 0.0, sums)
        loss = loss + (sums * torch.randn(sums.shape, generator=generator, device=out.device)).sum()
    # A bias that no score sees (no key is kept) has no gradient.
    grads = torch.autograd.grad(loss, drawn.leaves, materialize_grads=True)
    return [out, *([] if sums is None else [sums]), *grads]


def assert_same(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    for have, should in zip(got, want, strict=True):
        assert torch.isfinite(have).all()
        scale = max(1.0, should.abs().max().item()) if should.numel() else 1.0
        torch.testing.assert_close(have, should, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=150)
@given(st.data())
def test_tiled_is_the_reference(device: str, data: st.DataObject) -> None:
    drawn = data.draw(calls(device=device))
    assert_same(results(drawn, "tiled", lse=True), results(drawn, "reference", lse=True), torch.float32)
    assert_same(results(drawn, "tiled", lse=False), results(drawn, "reference", lse=False), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["sdpa", "auto"])
@settings(max_examples=60)
@given(st.data())
def test_dense_and_auto_are_the_reference(backend: str, device: str, data: st.DataObject) -> None:
    drawn = data.draw(calls(device=device))
    assert_same(results(drawn, backend, lse=False), results(drawn, "reference", lse=False), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["sdpa", "tiled"])
@settings(max_examples=40)
@given(st.data())
def test_bfloat16_is_the_float32_reference(backend: str, device: str, data: st.DataObject) -> None:
    drawn = data.draw(calls(dtype=torch.bfloat16, device=device))
    assert_same(results(drawn, backend, lse=False), results(drawn, "reference", lse=False), torch.bfloat16)


@settings(max_examples=15)
@given(st.data())
def test_float64_stays_float64(data: st.DataObject) -> None:
    drawn = data.draw(calls(dtype=torch.float64))
    assert_same(results(drawn, "tiled", lse=False), results(drawn, "reference", lse=False), torch.float64)


FLEX = {
    "window": (Window(100), 1000, 1000),
    "composed": (Causal() & (Window(20) | Strided(50)), 300, 300),
    "no keys": (Causal(-3), 200, 200),
    "neighborhood": (Neighborhood((14, 15), 5, (1, 2)), 210, 210),
    "halo": (Halo((16, 16), 8, 3, 2, padded=True), 64, 484),
    "selected": (Selected(torch.tensor([[[[0, 2, -1], [1, 1, 0], [2, -1, -1]]]])) & Causal(), 150, 150),
}


@pytest.mark.parametrize("name", FLEX)
@torch.no_grad()
def test_flex_is_the_reference(name: str) -> None:
    pattern, n, m = FLEX[name]
    q, k, v = torch.randn(2, 4, n, 32), torch.randn(2, 2, m, 32), torch.randn(2, 2, m, 32)
    bias: RelativeBias | RelativeLogits | Tensor | None = None
    key_mask = None
    if name == "neighborhood":
        bias = RelativeBias(torch.randn(4, 9, 9))
    elif name == "halo":
        bias = RelativeLogits((torch.randn(2, 4, n, 27), torch.randn(2, 4, n, 27)), (13, 13))
    elif name == "composed":
        bias, key_mask = torch.randn(4, n, m), torch.rand(2, m) < 0.5
    want, got = (
        heed.attend(q, k, v, pattern, bias=bias, key_mask=key_mask, backend=backend)
        for backend in ("reference", "flex")
    )
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def _attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return heed.attend(q * 2, k, v, Causal() & Window(40), backend=backend).square()


@pytest.mark.parametrize(("backend", "fullgraph"), [("tiled", False), ("auto", False), ("sdpa", True)])
def test_compiles(backend: str, fullgraph: bool) -> None:
    inputs = [torch.randn(1, 2, 300, 8, requires_grad=True) for _ in range(3)]
    plain = _attention(*inputs, backend)
    compiled = torch.compile(_attention, backend="aot_eager", fullgraph=fullgraph)(*inputs, backend)
    torch.testing.assert_close(compiled, plain)
    for got, want in zip(
        torch.autograd.grad(compiled.sum(), inputs), torch.autograd.grad(plain.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_tiled_names_the_backend_for_one_graph() -> None:
    torch._dynamo.reset()
    inputs = [torch.randn(1, 2, 300, 8) for _ in range(3)]
    with pytest.raises(torch._dynamo.exc.Unsupported, match="with fullgraph=True use backend='sdpa'"):
        torch.compile(_attention, backend="aot_eager", fullgraph=True)(*inputs, "tiled")


def test_operators_obey_the_contract_of_custom_operators() -> None:
    from heed.engine.backends.tiles import _attention
    from heed.engine.planner import plan_for

    plan = plan_for(Window(5), 100, 100, torch.device("cpu"))
    index = [t for g in plan.groups for t in (g.queries, g.keys, g.mask_of)]
    layout = [x for g in plan.groups for x in (g.key_block, -1 if g.rows is None else g.rows, *(g.band or (-1, -1)))]
    tables = [g.mask[None] for g in plan.groups]
    q, k, v = (torch.randn(2, 100, 8, requires_grad=True) for _ in range(3))
    args = (q, k, v, tables, index, layout, None, 0.3, 0.0, 0, True, plan.empty)
    torch.library.opcheck(_attention, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_dropout_repeats_and_keeps_the_mean(backend: str) -> None:
    q, k = torch.randn(1, 1, 200, 8), torch.randn(1, 1, 200, 8)
    v = torch.ones(1, 1, 200, 4, requires_grad=True)

    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return heed.attend(q, k, v, Window(60), dropout=0.4, generator=generator, backend=backend)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert run(1).mean().item() == pytest.approx(1.0, abs=0.03)
    (grad,) = torch.autograd.grad(run(1).sum(), v)
    # The output is linear in v: the gradient must see the same dropped weights as the forward pass.
    assert (grad * v).sum().item() == pytest.approx(run(1).sum().item(), rel=1e-4)


def test_weights_are_the_softmax() -> None:
    q, k, v = (torch.randn(2, 2, 30, 8) for _ in range(3))
    out, weights, lse = heed.attend(q, k, v, Window(3), return_weights=True, return_lse=True)
    torch.testing.assert_close(weights @ v, out)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 30))
    assert (weights[:, :, ~Window(3).mask(30)] == 0).all()
    assert lse.shape == (2, 2, 30)


def test_scale_may_be_a_temperature_per_head_or_query() -> None:
    q, k, v = (torch.randn(2, 2, 300, 8) for _ in range(3))
    scale = torch.rand(2, 1, 1)
    want = heed.attend(q * scale, k, v, Window(9), scale=1.0)
    torch.testing.assert_close(heed.attend(q, k, v, Window(9), scale=scale), want)


def test_backends_refuse_what_they_cannot_do() -> None:
    q = torch.randn(1, 1, 10, 8, requires_grad=True)
    with pytest.raises(ValueError, match="'tiled' cannot run this call.*use backend='reference'"):
        heed.attend(q, q, q, Full(), return_weights=True, backend="tiled")
    with pytest.raises(ValueError, match="no backward pass on a CPU; use backend='tiled'"):
        heed.attend(q, q, q, Full(), backend="flex")
    with pytest.raises(ValueError, match="no generator"):
        heed.attend(q, q, q, Full(), dropout=0.1, generator=torch.Generator(), backend="sdpa")
    with pytest.raises(ValueError, match="unknown backend 'tilde'; did you mean 'tiled'"):
        heed.attend(q, q, q, Full(), backend="tilde")


def test_environment_overrides_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 1, 10, 8)
    monkeypatch.setenv("HEED_BACKEND", "nothing")
    with pytest.raises(ValueError, match="unknown backend 'nothing'"):
        heed.attend(q, q, q, Full())
    heed.attend(q, q, q, Full(), backend="sdpa")


def test_auto_says_why(caplog: pytest.LogCaptureFixture) -> None:
    q = torch.randn(1, 1, 1024, 8)
    with caplog.at_level("DEBUG", logger="heed.engine"):
        heed.attend(q, q, q, Window(9))
    assert "tiled for Window(left=9, right=9) on 1024 tokens: tiles compute" in caplog.text


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.randn(2, 10, 8)}, ValueError, "q must have shape"),
        ({"q": "q"}, TypeError, "q must be a tensor"),
        ({"k": torch.randn(1, 2, 10, 9)}, ValueError, "do not fit"),
        ({"v": torch.randn(1, 2, 11, 8)}, ValueError, "do not fit"),
        ({"k": torch.randn(1, 2, 10, 8).double()}, ValueError, "k is torch.float64"),
        ({"q": torch.ones(1, 2, 10, 8).long()}, ValueError, "floating point"),
        ({"q": torch.randn(1, 3, 10, 8)}, ValueError, "3 query heads are not a multiple of 2"),
        ({"pattern": "causal"}, TypeError, "heed.patterns"),
        ({"pattern": Neighborhood((3, 3), 3)}, ValueError, "holds 9 tokens, but there are 10"),
        ({"bias": torch.zeros(3, 10, 10)}, ValueError, "bias .* does not broadcast"),
        ({"bias": 3}, TypeError, "bias must be"),
        ({"bias": RelativeBias(torch.zeros(2, 4))}, ValueError, "2 \\* window - 1 is odd"),
        ({"bias": RelativeBias(torch.zeros(2, 3, 3))}, ValueError, "pattern of 1 axes"),
        ({"pattern": ~Window(2), "bias": RelativeBias(torch.zeros(2, 3))}, ValueError, "needs a pattern with axes"),
        ({"key_mask": torch.ones(1, 10)}, ValueError, "key_mask must be bool"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0"),
        ({"scale": float("nan")}, ValueError, "scale=nan"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], words: str) -> None:
    arguments: dict = {name: torch.randn(1, 2, 10, 8) for name in "qkv"} | {"pattern": Window(2)} | change
    with pytest.raises(error, match=words):
        heed.attend(**arguments)


class _Prefix(Pattern):
    """A pattern of a user's own, whose arithmetic does not even mention the query."""

    def rule(self, n: int, m: int, device: torch.device) -> Rule:
        return lambda b, h, q, k: k < 70


@pytest.mark.parametrize("pattern", [_Prefix(), ~_Prefix(), _Prefix() & Causal()], ids=["prefix", "not", "and"])
def test_a_pattern_needs_only_a_rule(pattern: Pattern) -> None:
    q, k, v = (torch.randn(1, 2, 150, 8) for _ in range(3))
    want, got = (heed.attend(q, k, v, pattern, backend=backend) for backend in ("reference", "tiled"))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["tiled", "sdpa"])
def test_exporting_leaves_nothing_fake_behind(backend: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return heed.attend(x, x, x, Neighborhood((9, 11), 3), backend=backend)

    x = torch.randn(1, 2, 99, 8)
    exported = torch.export.export(Layer(), (x,))
    torch.testing.assert_close(Layer()(x), heed.attend(x, x, x, Neighborhood((9, 11), 3), backend="reference"))
    torch.testing.assert_close(exported.module()(x), Layer()(x))


@pytest.mark.parametrize("backend", ["tiled", "sdpa"])
def test_training_after_inference_mode(backend: str) -> None:
    q = torch.randn(1, 2, 91, 8, requires_grad=True)
    with torch.inference_mode():
        heed.attend(q, q, q, Neighborhood((7, 13), 3), backend=backend)
    heed.attend(q, q, q, Neighborhood((7, 13), 3), backend=backend).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("backend", ["reference", "tiled", "sdpa"])
@pytest.mark.parametrize("pattern", [Grouped(torch.zeros(1, 2, 90).long()), ~Window(2)], ids=["groups", "not"])
def test_relative_biases_need_axes_on_every_backend(backend: str, pattern: Pattern) -> None:
    q = torch.randn(1, 2, 90, 8)
    with pytest.raises(ValueError, match="needs a pattern with axes"):
        heed.attend(q, q, q, pattern, bias=RelativeBias(torch.zeros(2, 3)), backend=backend)


def _picked(keys: int, tile: int) -> Selected:
    return Selected(torch.arange(keys).expand(1, 1, 1024 // tile, keys), (tile, 1))


@pytest.mark.parametrize(
    ("pattern", "dtype", "expected"),
    [
        (_picked(100, 1), torch.float32, "sdpa"),  # fetching a tenth of the keys for every query costs more than a mask
        (Causal() & _picked(100, 1), torch.float32, "sdpa"),
        (_picked(10, 1), torch.float32, "tiled"),
        (_picked(100, 128), torch.float32, "tiled"),
        (Full(), torch.float32, "sdpa"),
        (Full(), torch.bfloat16, "sdpa"),
    ],
    ids=str,
)
def test_what_auto_takes_of_1024_tokens(
    pattern: Pattern, dtype: torch.dtype, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    q, k, v = torch.randn(3, 1, 1, 1024, 8, dtype=dtype)
    with caplog.at_level("DEBUG", logger="heed.engine"):
        heed.attend(q, k, v, pattern)
    assert f"{expected} for {pattern}" in caplog.text


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, "sdpa for"), (torch.bfloat16, "reference for")])
def test_gradients_over_few_keys_in_half_precision(
    dtype: torch.dtype, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    q, k, v = torch.randn(3, 2, 2, 49, 8, dtype=dtype).requires_grad_()
    with caplog.at_level("DEBUG", logger="heed.engine"):
        heed.attend(q, k, v, Full())
        assert expected in caplog.text
        caplog.clear()
        with torch.no_grad():
            heed.attend(q, k, v, Full())
        assert "sdpa for" in caplog.text


def test_autocast_does_not_round_the_scores_of_the_reference() -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = heed.attend(q, k, v, Full(), backend="reference")
    assert torch.equal(out, heed.attend(q, k, v, Full(), backend="reference"))
