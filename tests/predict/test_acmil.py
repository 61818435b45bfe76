"""ACMIL: masking, losses, sizes, the authors' weights, maps, training, and encoders and hosts of other libraries."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import heed
import heed.hosts.attach
import heed.hosts.rules
from heed.data.bag_files import Instances
from heed.data.bags import Bag
from heed.predict.acmil import ABMIL, ACMIL, ENCODERS, ABMILConfig, ACMILConfig
from heed.predict.mil import (
    BagOutput,
    BagRecipe,
    BagScores,
    BagTrainer,
    BestCheckpoint,
    HeadBranches,
    MaskTopKeys,
    attention_diversity,
    choose_top_instances,
    cumulative_attention,
    evaluate,
    fit,
    heatmap,
    instance_scores,
    mask_top_instances,
    training,
)
from heed.predict.mil.training import cosine_learning_rate

GOLDEN = Path(__file__).parents[1] / "golden" / "09-acmil"


# Masking


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 12), st.floats(0, 1), st.integers(0, 99))
def test_masking_invariants(rows: int, n: int, top: int, drop: float, seed: int) -> None:
    """int(k' drop) entries of each row's top k' are masked; rows still sum to 1, and every other weight grows."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, n, generator=generator)
    masked = mask_top_instances(logits, top, drop, generator=generator)
    hidden = masked != logits
    k = min(top, n)
    assert hidden.sum(-1).tolist() == [int(k * drop)] * rows
    assert (masked[hidden] == -1e9).all()
    strongest = torch.zeros_like(hidden).scatter(-1, logits.topk(k).indices, True)
    assert not (hidden & ~strongest).any()
    before, after = logits.softmax(-1), masked.softmax(-1)
    torch.testing.assert_close(after.sum(-1), torch.ones(rows))
    if int(k * drop) and not hidden.all():
        assert (after[~hidden] > before[~hidden]).all()
        if n > k:  # what the strongest carried together is less
            shares = [weights.masked_fill(~strongest, 0).sum(-1) for weights in (before, after)]
            assert (shares[1] < shares[0]).all()


def test_masking_everything_leaves_even_weights() -> None:
    weights = mask_top_instances(torch.randn(2, 4), 10, 1.0).softmax(-1)
    torch.testing.assert_close(weights, torch.full((2, 4), 0.25))


def test_masking_in_half_precision_stays_finite() -> None:
    masked = mask_top_instances(torch.randn(2, 9, dtype=torch.float16), 4, 0.5)
    assert masked.isfinite().all()
    assert (masked == torch.finfo(torch.float16).min).sum() == 4


def test_given_draws_choose_the_smallest() -> None:
    draws = torch.tensor([[0.9, 0.1, 0.5]])
    chosen = choose_top_instances(torch.tensor([[1.0, 4.0, 2.0, 3.0]]), 3, 0.4, draws=draws)
    assert chosen.tolist() == [[False, False, False, True]]  # one of three: the second strongest
    with pytest.raises(ValueError, match=r"draws \(1, 2\): one is needed for each candidate, \(1, 3\)"):
        choose_top_instances(torch.zeros(1, 4), 3, 0.4, draws=draws[:, :2])


def test_heads_draw_one_branch_after_the_other() -> None:
    """The generator is used in the authors' order: branch by branch, heads as rows."""
    model = ACMIL(ACMILConfig(8, 16, 2, arch="mha", n_token=2, n_masked_patch=3))
    x = torch.randn(1, 9, 8)
    drawn = torch.Generator().manual_seed(3)
    draws = torch.stack([torch.rand(8, 3, generator=drawn) for _ in range(2)])[None]
    ours = model(x, generator=torch.Generator().manual_seed(3)).attention
    assert torch.equal(ours, model(x, draws=draws).attention)


# Losses and sizes


def test_diversity_of_equal_and_of_disjoint_branches() -> None:
    a = torch.rand(2, 1, 3, 7).softmax(-1)
    torch.testing.assert_close(attention_diversity(a.repeat(1, 4, 1, 1)), torch.tensor(1.0))
    assert attention_diversity(torch.eye(7)[None, :4, None]) == 0
    assert attention_diversity(a) == 0


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 20), st.integers(0, 99))
@torch.no_grad()
def test_one_branch_without_masking_is_abmil(count: int, seed: int) -> None:
    acmil = ACMIL(ACMILConfig(6, 8, 2, n_token=1, n_masked_patch=0)).train()
    abmil = ABMIL(ABMILConfig(6, 8, 2))
    abmil.load_state_dict({k: v for k, v in acmil.state_dict().items() if not k.startswith("branch")})
    x = torch.randn(1, count, 6, generator=torch.Generator().manual_seed(seed))
    ours, theirs = acmil(x), abmil(x)
    torch.testing.assert_close(ours.logits, theirs.logits)
    label = torch.tensor([1])
    torch.testing.assert_close(acmil.losses(ours, label).total, abmil.losses(theirs, label).total)


SIZES = {
    ("medical_ssl", 2): (82_821, 84_369, 149_380, 416_140),
    ("natural_supervised", 3): (198_535, 202_135, 528_646, 1_587_474),
    ("clip_l_336", 2): (395_141, 398_737, 1_185_412, 3_558_540),
    ("uni", 2): (657_797, 662_417, 2_104_836, 6_317_580),
    ("gigapath", 2): (1_379_717, 1_386_385, 4_730_116, 14_194_956),
}


@pytest.mark.parametrize(("encoder", "classes"), SIZES)
def test_published_sizes(encoder: str, classes: int) -> None:
    with torch.device("meta"):
        found = [
            sum(
                p.numel()
                for p in heed.create_model(n, num_classes=classes, n_token=k, **ENCODERS[encoder]).parameters()
            )
            for n in ("acmil_ga", "acmil_mha")
            for k in (1, 5)
        ]
    assert tuple(found) == SIZES[encoder, classes]


def test_paper_setting_and_nearly_even_start() -> None:
    for name in ("acmil_ga", "acmil_mha"):
        config = heed.create_model(name).config
        assert (config.n_token, config.n_masked_patch, config.mask_drop) == (5, 10, 0.6)
    weights = heed.create_model("acmil_mha").eval()(torch.randn(1, 50, 384)).weights
    assert weights.shape == (1, 5, 8, 50)
    assert isinstance(heed.create_model("acmil_mha").attention, HeadBranches)


@torch.no_grad()
def test_folded_projections_equal_attention_written_out() -> None:
    """Heads that meet one query: keys and values as the authors project them, for every instance."""
    model = ACMIL(ACMILConfig(6, 16, 2, arch="mha", n_token=1, num_heads=4)).eval()
    torch.nn.init.normal_(model.attention.query)
    x = torch.randn(1, 7, 6)
    h, branch = model.embed(x), model.attention.branches[0]
    q = branch.q(model.attention.query[0]).view(1, 1, 4, 4).transpose(1, 2)
    k, v = (part(h).view(1, 7, 4, 4).transpose(1, 2) for part in (branch.k, branch.v))
    logits = q @ k.mT / math.sqrt(4)
    mixed = (logits.softmax(-1) @ v).transpose(1, 2).reshape(1, 16)
    output = model(x)
    torch.testing.assert_close(output.attention[:, 0], logits[:, :, 0])
    torch.testing.assert_close(output.branch_logits[:, 0], model.branch_classifiers[0](branch.norm(branch.out(mixed))))


# The authors' weights


@torch.no_grad()
def test_loads_the_authors_checkpoint(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "ga_abmil_single.safetensors")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    torch.save({"model": state}, tmp_path / "checkpoint-best.pth")
    sizes = {"in_features": 9, "dim": 8, "hidden": 6}
    acmil = ACMIL.from_authors(tmp_path / "checkpoint-best.pth", "acmil_ga", n_token=1, n_masked_patch=0, **sizes)
    abmil = ABMIL.from_authors(tmp_path / "checkpoint-best.pth", "abmil", **sizes)
    for model in (acmil, abmil):
        torch.testing.assert_close(model(tensors["input.x"]).logits, tensors["output.slide_pred"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="does not fit ACMIL"):
        ACMIL.from_authors(tmp_path / "checkpoint-best.pth", "acmil_ga", n_token=2, **sizes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_token": 0}, "n_token=0: at least one branch"),
        ({"mask_drop": 1.1}, "mask_drop=1.1"),
        ({"mask_drop": -0.1}, "mask_drop=-0.1"),
        ({"n_masked_patch": -1}, "n_masked_patch=-1"),
        ({"arch": "mha", "dim": 12}, "dim=12 is not divisible by num_heads=8"),
        ({"arch": "gated"}, "unknown arch 'gated'"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ACMILConfig(**settings)


# Maps


def test_cumulative_attention() -> None:
    weights = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    torch.testing.assert_close(cumulative_attention(weights, [1, 2, 100]), torch.tensor([[0.4, 0.7, 1.0]]))
    with pytest.raises(ValueError, match="count instances from 1"):
        cumulative_attention(weights, [0, 1])


def test_scores_and_their_map() -> None:
    attention = torch.tensor([[2.0, 0.0, 1.0, -9e9], [0.0, 2.0, 1.0, -9e9]])[None, :, None]
    output = BagOutput(torch.zeros(1, 2), attention, torch.zeros(1, 4))
    valid = torch.tensor([[True, True, True, False]])
    scores = instance_scores(output, valid)
    torch.testing.assert_close(scores, torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(instance_scores(output, valid, per_branch=True)[0, 0, :2], torch.tensor([1.0, 0.0]))
    places = torch.tensor([[100, 50], [356, 50], [100, 306]])
    laid = heatmap(torch.tensor([0.1, 0.2, 0.3]), places)
    torch.testing.assert_close(laid, torch.tensor([[0.1, 0.2], [0.3, math.nan]]), equal_nan=True)
    torch.testing.assert_close(heatmap(torch.tensor([0.1, 0.2, 0.3]), places, 512), torch.tensor([[0.2]]))
    with pytest.raises(ValueError, match="x and y of each of 3 instances"):
        heatmap(torch.zeros(3), places[:2])
    with pytest.raises(ValueError, match="patch_size=0"):
        heatmap(torch.zeros(3), places, 0)


# Training


def bags(count: int = 12, seed: int = 0) -> list[Bag]:
    """Bags of noise; in every second one an instance stands out."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        x, marked = torch.randn(8 + i % 3, 6, generator=draw), torch.zeros(8 + i % 3, dtype=torch.long)
        if i % 2:
            x[0, 0], marked[0] = 6, 1
        made.append(Bag(f"bag{i}", i % 2, Instances(x, None, marked), f"p{i}", "train"))
    return made


def small(seed: int = 0, **overrides: Any) -> ACMIL:
    torch.manual_seed(seed)
    return ACMIL(ACMILConfig(6, 16, 2, **{"n_token": 2, "n_masked_patch": 3, "hidden": 8} | overrides))


def test_cosine() -> None:
    found = [cosine_learning_rate(1e-4, epoch, 100) for epoch in (0, 50, 100)]
    assert found == pytest.approx([1e-4, 5e-5, 0])


def test_learning_rate_is_set_before_every_step() -> None:
    seen = []
    trainer = BagTrainer(small(), bags(5), BagRecipe(epochs=2, learning_rate=1e-3, batch_size=2))
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (seen.append(trainer.optimizer.param_groups[0]["lr"]), step())
    trainer.epoch()
    trainer.epoch()
    assert seen == pytest.approx(
        [cosine_learning_rate(1e-3, e, 2) for e in (0, 0.5, 1, 1.5)]
    )  # the fifth bag is left out


def test_fit_learns_and_keeps_the_best_epoch() -> None:
    model, told = small(), []
    recipe = BagRecipe(epochs=8, learning_rate=1e-2)
    best = fit(model, bags(24), bags(12, 1), recipe, on_epoch=lambda *news: told.append(news))
    assert [epoch for epoch, _, _ in told] == list(range(1, 9))
    assert told[-1][1] < told[0][1]
    choosing = [scores.for_choosing() for _, _, scores in told]
    assert best.epoch == 1 + choosing.index(max(choosing))
    assert not model.training
    scores = evaluate(model, bags(12, 1), instances=True)
    assert scores.auc == best.scores.auc > 0.9  # type: ignore[union-attr]
    assert scores.instance_auc is not None
    assert all(torch.equal(v, best.weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("arch", ["ga", "mha"])
def test_training_makes_branches_differ(arch: str) -> None:
    model, told = small(arch=arch, n_masked_patch=0), bags(24)
    fit(model, told, (), BagRecipe(epochs=10, learning_rate=1e-2))
    batch = training.pad_bags(told)
    assert attention_diversity(model(batch.x, batch.valid).weights) < 0.5


@pytest.mark.parametrize("arch", ["ga", "mha"])
def test_an_interrupted_training_ends_as_an_undisturbed_one(arch: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    recipe, file = BagRecipe(epochs=4, learning_rate=1e-2), tmp_path / "state.pt"
    undisturbed, told = small(arch=arch), []
    fit(undisturbed, bags(), bags(6, 1), recipe, on_epoch=lambda *news: told.append(news))

    def stop(epoch: int, *_: object) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(small(arch=arch), bags(), bags(6, 1), recipe, on_epoch=stop, checkpoint=file)
    resumed, again = small(9, arch=arch), []
    fit(resumed, bags(), bags(6, 1), recipe, on_epoch=lambda *news: again.append(news), checkpoint=file)
    assert again == told
    assert all(torch.equal(v, undisturbed.state_dict()[k]) for k, v in resumed.state_dict().items())


def test_the_rule_of_the_best_checkpoint() -> None:
    best, model = BestCheckpoint(), torch.nn.Linear(1, 1)
    assert best.update(1, BagScores(0.8, 0.1, 0.7), model)
    assert not best.update(2, BagScores(0.7, 0.9, 0.8), model)  # equal by the micro F1: the first stays
    assert best.update(3, BagScores(0.9, 0.1, 0.7), model)
    assert best.epoch == 3
    assert BagScores(0.5, 0.25, 0.75).for_choosing("macro") == 0.75
    with pytest.raises(ValueError, match="did you mean 'macro'"):
        BagScores(0.5, 0.25, 0.75).for_choosing("makro")


def test_training_refuses() -> None:
    with pytest.raises(ValueError, match="batch_size=5 is more than the 3 training bags"):
        BagTrainer(small(), bags(3), BagRecipe(batch_size=5))
    with pytest.raises(ValueError, match="epochs=0"):
        BagRecipe(epochs=0)
    with pytest.raises(ValueError, match="no bags to evaluate on"):
        evaluate(small(), [])
    model = small()
    torch.nn.init.constant_(model.slide_classifier.bias, math.nan)
    with pytest.raises(FloatingPointError, match="became nan in epoch 1"):
        fit(model, bags(2), (), BagRecipe(epochs=1))


# Encoders and hosts of other libraries


def features_of_timm(images: Tensor) -> Tensor:
    encoder = timm.create_model("vit_small_patch16_224", num_classes=0, img_size=32, depth=1).eval()
    return encoder(images)


def features_of_clip(images: Tensor) -> Tensor:
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=16
    )
    return transformers.CLIPVisionModel(config).eval()(images).pooler_output


@pytest.mark.parametrize("encode", [features_of_timm, features_of_clip])
@torch.no_grad()
def test_encoders_supply_the_features(encode: Any) -> None:
    features = encode(torch.randn(12, 3, 32, 32))  # twelve patches of one slide
    model = heed.create_model("acmil_ga", in_features=features.shape[1], dim=16).eval()
    output = model(features)
    assert output.logits.shape == (1, 2)
    assert model.embed(features).shape == (12, 16)


def test_top_keys_of_a_class_token_are_hidden_in_training() -> None:
    host = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=4)
    x = torch.randn(2, 3, 16, 16)
    seen: list[Tensor] = []

    class Look(heed.hosts.rules.AttentionRule):  # type: ignore[name-defined]
        def weights(self, call: Any, weights: Tensor) -> Tensor:
            seen.append(weights)
            return weights

    class Looking(heed.Method):
        def attach(self, host: Any, handle: Any) -> None:
            heed.hosts.attach.attach_rule(host, Look(), handle)  # type: ignore[attr-defined]

    plain = host.eval()(x)
    with heed.apply(host, MaskTopKeys(4, 0.5)), heed.apply(host, Looking()):
        torch.testing.assert_close(host.eval()(x), plain)  # nothing happens in eval mode
        host.train()(x)
    before, after = seen
    assert ((after == 0).sum(-1)[:, :, 0] == 2).all()
    assert not (after[:, :, 1:] == 0).any()
    torch.testing.assert_close(after.sum(-1), torch.ones(2, 4, 17))
    torch.testing.assert_close(before[:, :, 1:], after[:, :, 1:])
    assert torch.equal(host.eval()(x), plain)
    with pytest.raises(ValueError, match="drop=2"):
        MaskTopKeys(4, 2)
    with pytest.raises(ValueError, match="queries=0"):
        MaskTopKeys(queries=0)


def test_top_keys_of_a_masked_host() -> None:
    """Keys that the host hides are no candidates, and rows whose keys are all hidden become even."""
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    host = transformers.BertModel(config).train()
    ids, present = torch.randint(1, 30, (1, 6)), torch.tensor([[1, 1, 1, 0, 0, 0]])
    with heed.apply(host, MaskTopKeys(6, 1.0, queries=None)), torch.no_grad():
        padded = host(ids, attention_mask=present).last_hidden_state[:, :3]
        alone = host(ids[:, :3], attention_mask=present[:, :3]).last_hidden_state
    torch.testing.assert_close(padded, alone)
