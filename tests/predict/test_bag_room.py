"""What every classifier of bags must do, once per name; the next one adds a line to MODELS."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import heed
from heed.predict.mil import BagModel, BagOutput

MODELS: dict[str, dict[str, Any]] = {
    "abmil": {},
    "acmil_ga": {"n_token": 3, "n_masked_patch": 4},
    "acmil_mha": {"n_token": 2, "n_masked_patch": 4, "num_heads": 4},
}
WIDTH, CLASSES = 10, 3


def build(name: str, **overrides: Any) -> BagModel:
    fitted = {"in_features": WIDTH, "dim": 16, "num_classes": CLASSES, **MODELS[name], **overrides}
    return cast(BagModel, heed.create_model(name, **fitted))


@pytest.fixture(params=MODELS, ids=str)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def same(one: BagOutput, other: BagOutput) -> None:
    for mine, yours in zip(one[:1] + one[2:], other[:1] + other[2:], strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_shapes(name: str) -> None:
    output = build(name).eval()(torch.randn(2, 7, WIDTH))
    branches = output.attention.shape[1]
    assert output.logits.shape == (2, CLASSES)
    assert output.attention.shape[::3] == (2, 7)
    assert output.branch_logits is None or output.branch_logits.shape == (2, branches, CLASSES)
    torch.testing.assert_close(output.weights.sum(-1), torch.ones(output.weights.shape[:-1]))


@settings(max_examples=6, deadline=None)
@given(model=st.sampled_from(sorted(MODELS)), count=st.integers(1, 30), seed=st.integers(0, 99))
@torch.no_grad()
def test_order_of_instances_does_not_matter(model: str, count: int, seed: int) -> None:
    net = build(model).eval()
    x = torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    plain, shuffled = net(x), net(x[:, order])
    same(plain, shuffled)
    torch.testing.assert_close(plain.attention[..., order], shuffled.attention, rtol=1e-4, atol=1e-5)


@settings(max_examples=6, deadline=None)
@given(model=st.sampled_from(sorted(MODELS)), sizes=st.lists(st.integers(1, 12), min_size=2, max_size=3))
def test_a_padded_batch_equals_its_bags(model: str, sizes: list[int]) -> None:
    """In training too, with the same draws: padding is neither attended to nor a candidate for masking."""
    net = build(model, dropout=0.0) if model == "acmil_mha" else build(model)
    bags = [torch.randn(n, WIDTH) for n in sizes]
    longest = max(sizes)
    x = torch.randn(len(sizes), longest, WIDTH) * 9  # whatever is in the padding
    valid = torch.arange(longest) < torch.tensor(sizes)[:, None]
    for i, bag in enumerate(bags):
        x[i, : len(bag)] = bag
    shape = net.eval()(x, valid).attention.shape
    most = min(4, longest)
    draws = torch.rand(*shape[:3], most)
    labels = torch.arange(len(sizes)) % CLASSES
    for training in (False, True):
        net.train(training)
        together = net(x, valid, draws=draws)
        assert not together.weights[~valid[:, None, None].expand(shape)].any()
        losses = []
        for i, bag in enumerate(bags):
            alone = net(bag, draws=draws[i : i + 1, ..., : min(4, len(bag))])
            same(BagOutput(*(part if part is None else part[i : i + 1] for part in together)), alone)
            mine = together.attention[i : i + 1, ..., : len(bag)]
            torch.testing.assert_close(mine, alone.attention, rtol=1e-4, atol=1e-5)
            losses.append(net.losses(alone, labels[i : i + 1]).total)
        torch.testing.assert_close(net.losses(together, labels).total, torch.stack(losses).mean())


def test_every_parameter_learns(name: str) -> None:
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x, labels = torch.randn(4, 9, WIDTH), torch.tensor([0, 1, 2, 0])
    for _ in range(3):
        optimizer.zero_grad()
        model.losses(model(x), labels).total.backward()
        optimizer.step()
    # A softmax does not see what all its logits share, and so neither the last bias of a gate nor a key's.
    shared = ("attention.score.bias", "k.bias")
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert key.endswith(shared) or parameter.grad.any(), key


def test_eval_draws_nothing_and_training_repeats(name: str) -> None:
    model, x = build(name), torch.randn(1, 9, WIDTH)
    state = torch.get_rng_state()
    with torch.no_grad():
        model.eval()(x)
        assert torch.equal(torch.get_rng_state(), state)
        model.train()
        outputs = []
        for _ in range(2):
            torch.set_rng_state(state)
            outputs.append(model(x))
    assert torch.equal(outputs[0].attention, outputs[1].attention)


@torch.no_grad()
def test_saved_and_read_again(name: str, tmp_path: Path) -> None:
    model, x = build(name).eval(), torch.randn(1, 5, WIDTH)
    model.save_pretrained(tmp_path)
    same(heed.from_pretrained(tmp_path)(x), model(x))


@torch.no_grad()
def test_half_precision_and_many_instances(name: str) -> None:
    model, x = build(name).eval(), torch.randn(1, 300, WIDTH)
    half = BagOutput(*(part if part is None else part.float() for part in model.bfloat16()(x.bfloat16())))
    assert half.logits.isfinite().all()
    torch.testing.assert_close(half.logits, model.float()(x).logits, rtol=0.1, atol=0.05)


def test_compiles_to_one_graph(name: str) -> None:
    explained = torch._dynamo.explain(build(name).eval())(torch.randn(2, 6, WIDTH))
    assert explained.graph_break_count == 0


@pytest.mark.parametrize(
    ("x", "valid", "message"),
    [
        (torch.zeros(1, 5, 9), None, rf"takes bags \(B, N, {WIDTH}\)"),
        (torch.zeros(5), None, "takes bags"),
        (torch.zeros(1, 1, 5, WIDTH), None, "takes bags"),
        (torch.zeros(1, 0, WIDTH), None, "empty bag"),
        (torch.zeros(0, WIDTH), None, "empty bag"),
        (torch.zeros(2, 5, WIDTH), torch.tensor([[True] * 5, [False] * 5]), "bag 1 is an empty bag"),
        (torch.zeros(2, 5, WIDTH), torch.ones(2, 4, dtype=torch.bool), r"valid must be bool \(2, 5\)"),
        (torch.zeros(2, 5, WIDTH), torch.ones(2, 5), "valid must be bool"),
    ],
)
def test_what_is_no_bag_is_named(name: str, x: torch.Tensor, valid: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name)(x, valid)


@pytest.mark.parametrize("labels", [[0, CLASSES], [-1, 0]])
def test_labels_outside_the_classes(name: str, labels: list[int]) -> None:
    model = build(name)
    with pytest.raises(ValueError, match=f"classes run from 0 to {CLASSES - 1}"):
        model.losses(model(torch.zeros(2, 4, WIDTH)), torch.tensor(labels))
    with pytest.raises(ValueError, match="one is needed for each of 2 bags"):
        model.losses(model(torch.zeros(2, 4, WIDTH)), torch.tensor([0]))
