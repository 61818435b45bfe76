"""The language model that is trained here: its tokens, its lessons, that it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from heed.hosts.saving import save_whole
from heed.language import tiny
from heed.language.tiny import LONGEST, as_tokens, tiny_model, tiny_tokenizer, train_tiny

TEXT = torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy dog, and " * 40), dtype=torch.uint8)


def test_bytes_are_tokens() -> None:
    assert as_tokens(TEXT)[:9].tolist() == tiny_tokenizer().encode("the quick", add_special_tokens=False)


def test_lessons_hide_a_key_and_ask_for_it() -> None:
    lessons = tiny._Lessons(as_tokens(TEXT), torch.Generator().manual_seed(0))
    tokenizer = tiny_tokenizer()
    for length in (129, LONGEST + 1):
        row = lessons.find(length)
        assert len(row) == length
        words = tokenizer.decode(row)
        key = words[-5:]
        assert key.isdigit()
        assert words.count(key) == 2
        assert words.endswith(f"What is the pass key? The pass key is {key}")
    ids, weight = lessons.batch(128, 8)
    assert (ids.shape, weight.shape) == ((8, 129), (8, 128))
    assert (weight[1, -5:] > 1).all()
    assert (weight[0] == 1).all()
    for row in (ids[2], ids[3]):
        periods = [n for n in range(6, 43) if torch.equal(row[n:], row[:-n])]
        assert periods, "a stretch is repeated"


def test_it_learns_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "_COURSES", ((96, 8, 0.75), (128, 4, 0.25)))
    monkeypatch.setattr(tiny, "LONGEST", 256)
    runs = []
    for _ in range(2):
        model, losses = tiny_model(seed=1), []
        train_tiny(model, TEXT, steps=12, seed=3, report=lambda _, loss, losses=losses: losses.append(loss))
        runs.append((losses, model.lm_head.weight.detach().clone()))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0][-1] < runs[0][0][0] - 1
    assert not model.training


def test_it_is_a_model_of_transformers_like_any_other(tmp_path: Path) -> None:
    save_whole(tmp_path / "model", tiny_model(), tiny_tokenizer())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("a pass key", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
