"""`heed ask`, with a tiny model from a folder; and the tiny model itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from heed.cli import app
from heed.multimodal.answering import answer, image_grid, load_model, prepare, write_prompt
from heed.multimodal.ask import ask
from heed.multimodal.registry import steering
from heed.multimodal.scenes import DESCRIBE, OBJECTS, draw_name, draw_scene, question
from heed.multimodal.tiny import tiny_model, tiny_processor, train_tiny, training_batch
from heed.multimodal.var import VAR

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model after a few steps, and a picture beside it."""
    path = tmp_path_factory.mktemp("tiny")
    model, processor = tiny_model(0), tiny_processor()
    train_tiny(model, processor, steps=2)
    with torch.no_grad():  # as a long training would, let one dimension of a few tokens stand out
        model.model.language_model.layers[1].mlp.down_proj.weight[7] *= 40
    model.save_pretrained(path / "model")
    processor.save_pretrained(path / "model")
    draw_scene(np.random.default_rng(0)).image.resize((90, 70)).save(path / "picture.png")
    return path


def test_ask_answers_twice_and_draws(folder: Path, tmp_path: Path) -> None:
    text = question("red circle")
    looks, picture = ask(folder / "picture.png", text, model=folder / "model", out=tmp_path, max_new_tokens=4)
    assert list(looks) == ["plain", "var"]
    assert looks["plain"].sinks is None
    for seen in looks.values():
        assert seen.attention is not None
        assert seen.attention.shape == (4, 4)
        assert 0 < seen.attention.sum() <= 1
        assert seen.layers == (2, 3)
    assert looks["var"].sinks is not None
    assert looks["var"].sinks.shape == (4, 4)
    assert picture == tmp_path / "picture-var.png"
    assert Image.open(picture).size[0] > 1000


def test_the_command_prints_both_answers(folder: Path, tmp_path: Path) -> None:
    args = ["ask", str(folder / "picture.png"), DESCRIBE, "--model", str(folder / "model"), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*args, "--tokens", "3"])
    assert result.exit_code == 0, result.output
    for words in ("plain", "var", "picture-var.png"):
        assert words in result.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "vra"}, "unknown steering method 'vra'; did you mean 'var'"),
        ({"image": "nowhere.png"}, "there is no such file"),
        ({"image": __file__}, "cannot be read as a picture"),
        ({"model": "."}, "cannot be loaded as an image-text model"),
        ({"dtype": "float61"}, "did you mean 'float16'"),
    ],
)
def test_what_cannot_be_asked(folder: Path, changes: dict[str, str], message: str) -> None:
    given = {"image": folder / "picture.png", "text": "?", "model": folder / "model", **changes}
    with pytest.raises(ValueError, match=message):
        ask(**given)  # type: ignore[arg-type]


def test_methods_by_name(folder: Path) -> None:
    model, processor = load_model(folder / "model", device="cpu")
    images = [draw_scene(np.random.default_rng(i)).image for i in range(2)]
    inputs = prepare(model, processor, images, [question("red circle"), DESCRIBE])
    assert inputs["input_ids"].shape[0] == 2
    assert image_grid(model, inputs, 16) == (4, 4)
    assert steering.get("plain")(model, [inputs]) is None
    var = steering.get("var")(model, [inputs])
    assert isinstance(var, VAR)
    assert var.rho == VAR.PRESETS["hallucination"]
    one = [answer(model, processor, prepare(model, processor, [i], [DESCRIBE]), max_new_tokens=3)[0] for i in images]
    assert answer(model, processor, prepare(model, processor, images, [DESCRIBE] * 2), max_new_tokens=3) == one


def test_a_model_without_sinks_says_so() -> None:
    model, processor = tiny_model(0), tiny_processor()
    inputs = prepare(model, processor, [draw_scene(np.random.default_rng(0)).image], [DESCRIBE])
    with torch.no_grad():
        for layer in model.model.language_model.layers:  # every token the same: nothing stands out
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        model.model.language_model.embed_tokens.weight.fill_(1.0)
        model.model.multi_modal_projector.linear_2.weight.zero_()
        model.model.multi_modal_projector.linear_2.bias.fill_(1.0)
    with pytest.raises(ValueError, match="has no sinks that VAR could act on"):
        steering.get("var")(model, [inputs])


def test_training_learns_answers_only() -> None:
    processor = tiny_processor()
    batch = training_batch(processor, np.random.default_rng(0))
    tokenizer = processor.tokenizer
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        said = tokenizer.decode(labels[labels >= 0])
        assert said.endswith("</s>")
        assert "assistant" not in said
        assert "is there" not in said
        assert (labels[labels >= 0] == ids[labels >= 0]).all()
        assert tokenizer.decode(ids).count("assistant") == said.count("</s>")


def test_scenes_are_what_they_say() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        scene = draw_scene(random)
        assert 2 <= len(set(scene.names)) == len(scene.shapes) <= 3
        for there in (True, False):
            name = draw_name(scene, there, random, scene.names[:1])
            assert (name in scene.names) == there
            assert name in OBJECTS
            assert name != scene.names[0]
        row, column = scene.shapes[0].cell
        assert scene.place(scene.names[0]) == f"{('top', 'bottom')[row]} {('left', 'right')[column]}"
    with pytest.raises(ValueError, match="leaves nothing to ask for"):
        draw_name(scene, True, random, scene.names)


def test_prompts_without_a_template() -> None:
    processor = tiny_processor()
    assert write_prompt(processor, "Why?") == "USER: <image>\nWhy? ASSISTANT:"
    processor.chat_template = None
    assert write_prompt(processor, "Why?") == "USER: <image>\nWhy? ASSISTANT:"
