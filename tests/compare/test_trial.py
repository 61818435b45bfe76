"""One trial: learning, costs, failure, and going on where it was."""

import json

import pytest
import torch
from torch import nn

import heed
from heed.compare import ClassifySettings
from heed.compare.learner import Learner
from heed.compare.machine import check_device
from heed.compare.tracks.classify.host import build_model, check_methods
from heed.compare.tracks.classify.learner import ImageLearner
from heed.compare.tracks.classify.measure import count_flops, measure
from heed.compare.tracks.classify.track import TRACK
from heed.compare.trial import TrialResult, run_trial
from heed.data.images import ImageData
from heed.layers.registry import layers

STEPS = 16


def bright_or_dark(count=48):
    """Two classes that differ in brightness."""
    labels = torch.arange(count) % 2
    noise = torch.randint(0, 100, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    images = (noise + 100 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    return ImageData("made", ("dark", "bright"), images[16:], labels[16:], images[:16], labels[:16])


@pytest.fixture
def data():
    return bright_or_dark()


@pytest.fixture
def settings(tmp_path):
    return ClassifySettings(("softmax",), out=str(tmp_path), batch_size=8, steps=STEPS, device="cpu")


@pytest.fixture
def layer(monkeypatch):
    """Registers an attention layer for the length of a test."""
    layers.names()
    return lambda name, factory: monkeypatch.setitem(layers._entries, name, factory)


def trial(settings, data, method="softmax", seed=0, report=lambda news: None):
    return run_trial(settings, method, seed, STEPS, data, threads=1, report=report)


def weights(settings, method="softmax", seed=0):
    return heed.from_pretrained(f"{settings.out}/trials/{method}-{seed}/model").state_dict()


def test_a_trial_learns_and_leaves_its_model(settings, data):
    news = []
    result = trial(settings, data, report=news.append)
    assert (result.status, result.error) == ("ok", None)
    assert result.scores == {"accuracy": 1.0}
    assert result.curve.step[-1] == STEPS
    assert result.curve.values["loss"][-1] < result.curve.values["loss"][0]
    assert [n.stage for n in news][-2:] == ["training", "trained"]
    folder = f"{settings.out}/trials/softmax-0"
    assert heed.from_pretrained(f"{folder}/model").config.num_classes == 2
    with open(f"{folder}/result.json") as file:
        assert json.load(file)["scores"] == {"accuracy": 1.0}


@pytest.mark.parametrize("stop", [3, 11, STEPS])
def test_an_interrupted_trial_ends_as_an_undisturbed_one(settings, data, tmp_path, stop):
    def interrupt(news):
        if news.stage == "training" and news.step == stop:
            raise KeyboardInterrupt

    other = ClassifySettings(**{**settings.to_json(), "out": str(tmp_path / "other")})
    undisturbed = trial(other, data)
    with pytest.raises(KeyboardInterrupt):
        trial(settings, data, report=interrupt)
    first = []
    resumed = trial(settings, data, report=first.append)
    assert first[0].step > 1
    assert resumed == undisturbed
    assert TrialResult.read(tmp_path / "trials/softmax-0/result.json") == undisturbed
    for name, value in weights(settings).items():
        assert torch.equal(value, weights(other)[name]), name


def test_every_method_sees_the_same_images_in_the_same_order(settings, data):
    learners = [ImageLearner(settings, build_model(m, data), data, STEPS) for m in ("softmax", "neighborhood")]
    for step in range(6):  # into the second epoch
        (a, labels), (b, _) = (learner.batch_at(0, step) for learner in learners)
        assert torch.equal(a, b)
        assert len(labels) == 8
        assert not torch.equal(a, learners[0].batch_at(1, step)[0])


def test_a_loss_that_is_nan_is_a_failed_result(settings, data, layer):
    class Broken(nn.Module):
        def forward(self, x):
            return x * float("nan")

    layer("broken", lambda dim, num_heads, grid: Broken())
    result = trial(settings, data, "broken")
    assert result.status == "failed"
    assert result.error == f"the training loss became nan by step 1 of {STEPS}"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("no room"), "out of memory: no room"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: "),
        (KeyError("lost"), "KeyError: 'lost'"),
    ],
)
def test_an_exception_is_a_failed_result(settings, data, layer, error, line):
    class Raising(nn.Module):
        def forward(self, x):
            raise error

    layer("raising", lambda dim, num_heads, grid: Raising())
    result = trial(settings, data, "raising")
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.startswith(line)
    with open(f"{settings.out}/trials/raising-0/error.txt") as file:
        assert "Traceback" in file.read()


def test_a_checkpoint_that_cannot_be_read_is_named(settings, data, tmp_path):
    (tmp_path / "trials/softmax-0/checkpoint-00000004").mkdir(parents=True)
    result = trial(settings, data)
    assert "checkpoint-00000004 cannot be read; delete it" in str(result.error)


def test_flops_are_those_of_the_formula(data):
    model = build_model("softmax", data)
    n, c, hidden, depth = 16, 64, 128, 4
    block = 2 * n * c * 3 * c + 2 * (2 * n * n * c) + 2 * n * c * c + 2 * (2 * n * c * hidden)
    assert count_flops(model, data) == 2 * n * 4 * c + depth * block + 2 * c * 2


def test_measures(settings, data):
    machine, found = measure(settings, "softmax", data, threads=1)
    size = sum(p.numel() for p in build_model("softmax", data).parameters())
    assert found["parameters"] == size
    assert found["train"] > 0
    assert found["infer"] > found["train"]
    # Parameters, gradients and Adam's two moments, and less than a hundred times that.
    assert 4 * 4 * size < found["memory"] < 100 * 16 * size
    assert machine.device == "cpu"


def test_models_are_methods_too(data):
    colour = torch.zeros(4, 3, 224, 224, dtype=torch.uint8)
    labels = torch.arange(4) % 2
    model = build_model("vit_tiny", ImageData("made", data.classes, colour, labels, colour, labels))
    assert (model.config.img_size, model.config.in_chans) == (224, 3)
    assert model.config.num_classes == 2


def test_unknown_methods_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown method 'softmaxx'; did you mean 'softmax'"):
        check_methods(["softmaxx"], "vit_micro")


def test_models_that_do_not_classify_images_are_refused():
    with pytest.raises(ValueError, match="'moh_dit_micro' is no model that classifies images"):
        check_methods(["softmax", "moh_dit_micro"], "vit_micro")


def test_wrong_devices_are_refused():
    with pytest.raises(ValueError, match="'gpu9' is not a device"):
        check_device("gpu9")
    with pytest.raises(ValueError, match="needs an accelerator"):
        TRACK.check(ClassifySettings(("softmax",), device="cpu", precision="fp16"))


def test_settings_are_checked():
    for wrong, message in [
        ({"epochs": 1, "minutes": 2.0}, "epochs and minutes are given together"),
        ({"seeds": 0}, "seeds=0"),
        ({"precision": "fp61"}, "did you mean 'fp16'"),
        ({"jobs": 2, "ray": "auto"}, "jobs=2 and ray='auto'"),
        ({"minutes": float("nan")}, "minutes=nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            ClassifySettings(("softmax",), **wrong)
    with pytest.raises(ValueError, match="softmax more than once"):
        ClassifySettings(("softmax", "softmax"))


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
def test_any_number_of_steps_has_a_schedule(steps):
    learner = Learner(torch.nn.Linear(2, 1), steps, learning_rate=0.1, weight_decay=0.0, device="cpu", precision="fp32")
    rates = []
    for _ in range(steps):
        learner.descend(learner.model(torch.randn(4, 2)).square().mean())
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert all(0 < rate <= 0.1 + 1e-9 for rate in rates)
