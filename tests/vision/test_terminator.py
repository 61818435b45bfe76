"""Terminator: the published counts, its block's claims, the author's checkpoints, sequences, losses and optimisers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import heed
from heed.vision.terminator import SequenceTerminator, SFNEBlock, Terminator, TerminatorConfig, tile_channels
from heed.vision.terminator_training import (
    Kar2,
    Kar3,
    slow_neural_loss,
    terminator_loss,
    terminator_recipe,
    warmup_cosine,
    weight_loss,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "36-hyperzzw" / "model_tiny.safetensors"
GOLDEN_CONFIG: dict[str, Any] = {
    "img_size": 8,
    "dims": (12, 12, 24, 24, 24),
    "global_hidden": 4,
    "local_hidden": 3,
    "channel_hidden": 3,
    "interaction_channel_hidden": 3,
}
SMALL: dict[str, Any] = {"global_hidden": 4, "local_hidden": 4, "channel_hidden": 4, "interaction_channel_hidden": 4,
                         "interaction_spatial_hidden": 4, "omega": 0.3}  # fmt: skip


def micro(**overrides: Any) -> Terminator:
    return cast(Terminator, heed.create_model("terminator_micro", **overrides))


def block(previous: int = 0, in_dim: int = 4, size: int = 6) -> SFNEBlock:
    return SFNEBlock(in_dim, 12, size, TerminatorConfig(**SMALL), previous=previous)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_counts() -> None:
    with torch.device("meta"):
        model = cast(Terminator, heed.create_model("terminator_cifar"))
        hundred = heed.create_model("terminator_cifar", num_classes=100)
        with FlopCounterMode(display=False) as counter:
            model.eval()(torch.empty(2, 3, 32, 32))
    assert count(model) == 1_336_855
    assert count(hundred) == 1_362_865
    assert [count(b) for b in model.blocks] == [53_377, 57_824, 105_188, 253_580, 863_996]
    assert model.parameter_split() == {"slow": 318_976, "context": 98_176, "fast": 1_336_855 - 318_976}
    # Slow nets run once per batch: the figure per image was counted with two images.
    assert counter.get_total_flops() / 2e9 / 2 == pytest.approx(1.155, rel=0.01)


@torch.no_grad()
def test_initial_weights() -> None:
    model = micro()
    head = cast(nn.Linear, model.head)
    assert head.weight.std().item() == pytest.approx((2 / 48) ** 0.5, rel=0.1)
    for b in model.sfne_blocks():
        fan_in = b.bottleneck.in_channels
        assert b.bottleneck.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.15)
        assert not cast(Tensor, b.bottleneck.bias).any()


@torch.no_grad()
def test_nothing_but_the_branches_reaches_the_output() -> None:
    """No residual connection: with the bottleneck at zero a block gives its bias, whatever comes in."""
    b = block(1)
    nn.init.zeros_(b.bottleneck.weight)
    nn.init.constant_(b.bias, 0.7)
    y = b(torch.randn(2, 4, 6, 6), torch.randn(2, 2, 6, 6))
    torch.testing.assert_close(y, torch.full_like(y, 0.7))


def test_a_pixel_of_a_block_sees_the_whole_image() -> None:
    b = block()
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(b(x)[0, 0, 1, 1], x)
    assert grad.abs().sum(1).min() > 0


@settings(max_examples=4, deadline=None)
@given(st.integers(2, 9), st.integers(1, 3))
def test_features_have_zero_mean(size: int, batch: int) -> None:
    model = micro(img_size=size)
    means = model.feature_means(torch.randn(batch, 1, size, size))
    assert len(means) == 4
    assert max(map(abs, means)) < 1e-6


@torch.no_grad()
def test_permuting_samples_permutes_outputs_but_a_batch_is_one_thing() -> None:
    model = micro().eval()
    x = torch.randn(5, 1, 8, 8)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(model(x[order]), model(x)[order], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(model(x[:2]), model(x)[:2], atol=1e-2)
    assert model(x[:1]).shape == (1, 10)


def test_branches_come_in_the_authors_order() -> None:
    x = torch.randn(2, 4, 6, 6)
    maps = block(2).branches(x, x[:, :2], x[:, :1])
    assert list(maps) == ["out", "local2", "previous0", "fast", "out_x", "local1", "out_glu", "local3", "out_hci",
                          "local4", "previous1", "hyper"]  # fmt: skip
    assert torch.equal(maps["previous0"], torch.cat([x[:, :2], x[:, :2]], 1))
    assert torch.equal(maps["previous1"], x[:, :1].expand_as(x))


def test_paper_parameters_can_be_learned() -> None:
    plain, learned = micro(), micro(learnable=True)
    assert count(learned) - count(plain) == 4 * 4 * 2 + 1
    learned(torch.randn(3, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in learned.parameters())


def golden_state() -> dict[str, Tensor]:
    return {k.removeprefix("state."): v for k, v in load_file(GOLDEN).items() if k.startswith("state.")}


@pytest.mark.parametrize("later", [False, True])
@torch.no_grad()
def test_loads_the_authors_checkpoint_in_both_spellings(later: bool, tmp_path: Path) -> None:
    tensors, state = load_file(GOLDEN), golden_state()
    if later:
        state = {k.replace("_hi.", ".").replace("rgu.bias_p", "rgu.fast_bias_p").replace("rgu_2.b", "rgu_2.fast_b"): v
                 for k, v in state.items()}  # fmt: skip
        assert any("fast_bias_p" in key for key in state)
    save_file(state, tmp_path / "terminator.safetensors")
    for learnable in (False, True):
        model = Terminator.from_authors(
            tmp_path / "terminator.safetensors", "terminator_cifar", **GOLDEN_CONFIG, learnable=learnable
        )
        torch.testing.assert_close(model(tensors["input.x"]), tensors["output.logits"], rtol=2e-3, atol=1e-3)
    assert json.loads(GOLDEN.with_suffix(".json").read_text())["config"]["net_cfg"]["no_blocks"] == len(model.blocks)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit Terminator; wrong shapes"):
        heed.create_model("terminator_cifar", **GOLDEN_CONFIG | {"img_size": 10}).load_authors(golden_state())


@pytest.mark.parametrize("name", ["terminator_smnist", "terminator_scifar10"])
def test_sequences(name: str, tmp_path: Path) -> None:
    model = cast(SequenceTerminator, heed.create_model(name, length=20, dims=(12, 12, 24, 24, 24), **SMALL))
    x = torch.randn(2, model.config.in_chans, 20)
    loss, logits = terminator_loss(model, x, torch.tensor([1, 3]))
    assert logits.shape == (2, 10)
    loss.total.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert max(map(abs, model.feature_means(x))) < 1e-6
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(heed.from_pretrained(tmp_path)(x), model.eval()(x))
    with pytest.raises(ValueError, match=r"takes sequences \(B, \d, 20\)"):
        model(torch.zeros(2, 3, 21))
    assert heed.create_model(name).config.length == {"terminator_smnist": 784, "terminator_scifar10": 1024}[name]


def test_slow_loss_is_a_local_error_signal() -> None:
    model = micro()
    assert slow_neural_loss(model.global_kernels()[:1]) == 0
    slow_neural_loss(model.global_kernels()).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached
    assert all(".operator.slow." in name for name in reached)
    kernel = torch.randn(1, 2, 5, 5)
    tiled = [kernel, tile_channels(kernel, 4), tile_channels(kernel, 12)]
    assert slow_neural_loss(tiled) == 0
    a, b = torch.randn(1, 2, 3, 3), torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(slow_neural_loss([a, b]), (torch.cat([a, a], 1) - b).square().mean())
    torch.testing.assert_close(slow_neural_loss([a, b], "channel_sum"), (a.sum(1) - b.sum(1)).square().mean())


@torch.no_grad()
def test_weight_loss_counts_the_authors_fast_parameters() -> None:
    """Those with "fast" in their names and without "Kernel", as the author's names are."""
    state = golden_state()
    model = cast(Terminator, heed.create_model("terminator_cifar", **GOLDEN_CONFIG)).load_authors(state)
    fast = sum(v.norm() for k, v in state.items() if "fast" in k and "Kernel" not in k and "train_length" not in k)
    slow = sum(v.norm() for k, v in state.items() if "Kernel" in k and v.ndim == 4 and k.endswith(".weight"))
    torch.testing.assert_close(weight_loss(model, 1.0, 0.0), torch.as_tensor(fast))
    torch.testing.assert_close(weight_loss(model, 1.0, 1.0), torch.as_tensor(fast + slow))


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 8))
def test_steps_of_kar_are_whole_multiples_of_lr(steps: int) -> None:
    p, q = (nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2))
    optimizers = {3: Kar3([p], 0.5), 2: Kar2([q], 0.5)}
    for step in range(steps):
        for (most, optimizer), parameter in zip(optimizers.items(), (p, q), strict=True):
            before = parameter.detach().clone()
            parameter.grad = torch.randn_like(parameter)
            parameter.grad[0] = 0
            moved = optimizer_moves(optimizer, parameter, before)
            assert set(moved.abs().round(decimals=9).flatten().tolist()) <= set(range(most + 1))
            if step == 0:
                torch.testing.assert_close(moved, -parameter.grad.sign())


def optimizer_moves(optimizer: torch.optim.Optimizer, parameter: Tensor, before: Tensor) -> Tensor:
    optimizer.step()
    return (parameter.detach() - before) / 0.5


def test_kar_goes_on_from_its_state() -> None:
    grads = torch.randn(6, 5)
    ends = []
    for stop in (6, 3):
        p = nn.Parameter(torch.zeros(5))
        optimizer = Kar3([p, nn.Parameter(torch.zeros(1))])
        for grad in grads[:stop]:
            p.grad = grad.clone()
            optimizer.step()
        other = Kar3([p, nn.Parameter(torch.zeros(1))])
        other.load_state_dict(optimizer.state_dict())
        for grad in grads[stop:]:
            p.grad = grad.clone()
            assert other.step(lambda: 2.0) == 2.0
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_schedule() -> None:
    optimizer = Kar3([nn.Parameter(torch.zeros(1))], 1e-3)
    schedule = warmup_cosine(optimizer, 100, 8)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(1e-8)
    assert rates[8] == max(rates) == pytest.approx(1e-3)
    assert rates[54] == pytest.approx(5e-4)
    assert 0 < rates[-1] < 1e-6
    with pytest.raises(ValueError, match="warmup=9 must lie in 0 .. 8"):
        warmup_cosine(optimizer, 9, 9)


def test_terminator_with_kar_learns() -> None:
    model = micro()
    recipe = terminator_recipe("cifar10")
    y = torch.arange(12) % 3
    x = torch.randn(3, 1, 8, 8)[y] + 0.1 * torch.randn(12, 1, 8, 8)
    optimizer = Kar3(model.parameters(), recipe["lr"], recipe["betas"])
    losses = []
    for _ in range(12):
        loss, logits = terminator_loss(model, x, y)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.cross_entropy.item())
    assert losses[-1] < 0.6 * losses[0]
    torch.testing.assert_close(loss.cross_entropy, 0.9 * F.nll_loss(logits.log_softmax(1), y)
                               - 0.1 * logits.log_softmax(1).mean())  # fmt: skip


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Kar3([nn.Parameter(torch.zeros(1))], -1.0), "lr=-1.0"),
        (lambda: Kar3([nn.Parameter(torch.zeros(1))], betas=(0.5, 1.0)), r"1.0 is outside \[0, 1\)"),
        (lambda: Kar3([nn.Parameter(torch.zeros(1))], betas=cast(Any, (0.5,))), "Kar3 has two"),
        (lambda: Kar2([nn.Parameter(torch.zeros(1))], beta=-0.1), "-0.1 is outside"),
        (lambda: slow_neural_loss([]), "kernels is empty"),
        (lambda: slow_neural_loss([torch.zeros(1)], "sum"), "unknown comparison 'sum'"),
        (lambda: terminator_recipe("imagenet"), "unknown data"),
        (lambda: tile_channels(torch.zeros(1, 3, 2, 2), 4), r"3 channels, of \(1, 3, 2, 2\), cannot be repeated to 4"),
        (lambda: micro(img_size=1), "size=1"),
        (lambda: micro(local_sizes=(3, 4, 5, 7)), "size=4: a local kernel needs an odd size"),
        (lambda: micro(local_sizes=(3,)), "four local kernels"),
        (lambda: micro(dims=(12, 20, 24, 48)), "20 is not a multiple of the 12 channels"),
        (lambda: micro(in_chans=5), "12 is not a multiple of the 5 channels"),
        (lambda: micro(in_chans=4, dims=(8, 24, 24, 48)), "8 channels do not divide into G-IBS's 12 groups"),
        (lambda: micro(previous=(0, 1, 1, 2)), "block 1 can concatenate 0 at most"),
        (lambda: micro(dropout=(0.0,)), "one entry per block"),
    ],
)
def test_bad_settings(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="images of 8 x 9 pixels given; this model takes 8 x 8"):
        micro()(torch.zeros(1, 1, 8, 9))
    with pytest.raises(ValueError, match="2 channels, .* cannot be repeated to 3"):
        block(1, in_dim=3)(torch.zeros(1, 3, 6, 6), torch.zeros(1, 2, 6, 6))
    with pytest.raises(ValueError, match="0 earlier outputs given; this block takes 1"):
        block(1)(torch.zeros(1, 4, 6, 6))
