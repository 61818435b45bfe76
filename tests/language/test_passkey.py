"""Passkey retrieval and perplexity by context length: prompts of the right make, and scores of models that are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoders import decoder, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import heed
from heed.language.h2o import H2O
from heed.language.passkey import PasskeyPrompt, PasskeyText, found_keys, passkeys, retrieval_accuracy
from heed.language.perplexity import perplexity_by_length

TEXT = PasskeyText(filler=(10, 11, 12), intro=(3,), before=(4, 5), after=(6,), question=(7, 4, 5))


def encode(text: str) -> list[int]:
    return list(text.encode())


@settings(max_examples=20)
@given(st.integers(10, 60), st.floats(0, 1))
def test_prompts_have_their_length_and_the_key_at_its_depth(length: int, depth: float) -> None:
    made = TEXT.prompt([20, 21, 22], length, depth)
    ids = made.ids.tolist()
    assert (len(ids), ids[0], ids[-3:], made.key.tolist()) == (length, 3, [7, 4, 5], [20, 21, 22])
    at = ids.index(20)
    assert ids[at - 2 : at + 4] == [4, 5, 20, 21, 22, 6]
    assert at - 3 == round(depth * (length - 10))
    assert [i for i in ids if i in TEXT.filler] == ([10, 11, 12] * length)[: length - 10]


def test_prompts_of_sentences() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = passkeys(encode, 4, generator)
    assert {len(key) for key in keys} == {5}
    for made in PasskeyText.english(encode).prompts(keys, 400, generator):
        text = bytes(made.ids.tolist()).decode()
        assert len(text) == 400
        assert f"The pass key is {bytes(made.key.tolist()).decode()}." in text
        assert text.endswith("The pass key is ")
    again = torch.Generator().manual_seed(0)
    assert passkeys(encode, 4, again) == keys


class Finder(nn.Module):
    """Answers with what follows the first `4, 5`, as far as it reaches back; counts its calls."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.reach, self.calls = reach, []

    def generate(self, ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **settings: Any) -> Tensor:
        self.calls.append(settings)
        rows = []
        for row, keep in zip(ids.tolist(), attention_mask.sum(1).tolist(), strict=True):
            row = row[-min(keep, self.reach) :]
            at = row.index(5) + 1
            rows.append((row + row)[at : at + max_new_tokens])
        return torch.cat([ids, torch.tensor(rows)], 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_models_that_find_what_they_reach(batch: int) -> None:
    prompts = [TEXT.prompt([20 + i, 21, 22], 30 + 3 * i, depth) for i, depth in enumerate((0.0, 0.2, 0.9, 1.0, 1.0))]
    assert retrieval_accuracy(Finder(100), prompts, batch=batch) == 1.0
    model = Finder(16).train()
    assert found_keys(model, prompts, batch=batch, top_k=3).tolist() == [False, False, True, True, True]
    assert model.training
    assert all(settings["top_k"] == 3 and not settings["do_sample"] for settings in model.calls)


def test_in_a_decoder_with_methods_and_caches() -> None:
    model, generator = decoder("llama"), torch.Generator().manual_seed(0)
    keys = torch.randint(13, 37, (3, 4), generator=generator)
    prompts = [TEXT.prompt(key, 40 + i, i / 2) for i, key in enumerate(keys)]
    own = []  # what the model itself answers is the key of these
    for made in prompts:
        out = model.generate(made.ids[None], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        own.append(PasskeyPrompt(made.ids, out[0, -4:], made.depth))
    for batch in (1, 3):
        assert retrieval_accuracy(model, own, batch=batch) == 1.0
        assert retrieval_accuracy(model, own, batch=batch, method=H2O(heavy=60, recent=9)) == 1.0
    assert retrieval_accuracy(model, prompts) == 0.0
    with heed.apply(model, H2O(heavy=60, recent=9)) as handle:
        made: list[Any] = []

        def cache() -> Any:
            made.append(handle.state.cache())
            return made[-1]

        assert found_keys(model, own, cache=cache).all()
        assert len(made) == 3
        assert made[0].get_seq_length() == 40 + 3


def test_bad_prompts() -> None:
    with pytest.raises(ValueError, match="length=9 has no room: the parts beside the filler take 10 tokens"):
        TEXT.prompt([20, 21, 22], 9, 0.5)
    with pytest.raises(ValueError, match=r"depth=1.5 must lie in \[0, 1\]"):
        TEXT.prompt([20], 30, 1.5)
    with pytest.raises(ValueError, match="filler="):
        PasskeyText(())
    with pytest.raises(ValueError, match="0 prompts in batches of 1"):
        found_keys(decoder("llama"), [])
    with pytest.raises(ValueError, match="digits=0"):
        passkeys(encode, 1, torch.Generator(), digits=0)


@torch.no_grad()
@pytest.mark.parametrize(("length", "stride", "batch"), [(8, 3, 1), (8, 3, 4), (20, None, 2), (41, 5, 1)])
def test_perplexity_is_that_of_a_loop(length: int, stride: int | None, batch: int) -> None:
    model, ids = decoder("llama").train(), prompt(1, 41)[0]
    losses, step = [], stride or length
    for begin in range(0, len(ids) - length + 1, step):
        window = ids[begin : begin + length]
        loss = F.cross_entropy(model.eval()(window[None]).logits[0, :-1], window[1:], reduction="none")
        losses += loss.tolist() if begin == 0 else loss[-step:].tolist()
    wanted = torch.tensor(losses).mean().exp().item()
    model.train()
    found = perplexity_by_length(model, ids, [length], stride=stride, batch=batch)
    assert found[length] == pytest.approx(wanted, rel=1e-4)
    assert model.training


def test_perplexity_of_a_known_model() -> None:
    """A model that gives every one of 8 tokens the same chance."""

    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, ids: Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=torch.zeros(*ids.shape, 8))

    found = perplexity_by_length(Even(), torch.arange(50) % 8, [2, 16, 50])
    assert list(found) == [2, 16, 50]
    assert list(found.values()) == pytest.approx([8.0] * 3)


def test_bad_lengths() -> None:
    model, ids = decoder("llama"), prompt(1, 20)[0]
    with pytest.raises(ValueError, match="length=21 must lie between 2 and the 20 tokens"):
        perplexity_by_length(model, ids, [21])
    with pytest.raises(ValueError, match="stride=0 and batch=1"):
        perplexity_by_length(model, ids, [8], stride=0)
