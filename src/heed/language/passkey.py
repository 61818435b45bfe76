"""Passkey retrieval: does a language model, with whatever cache or method, find a number that it was told long ago?

    prompt = [intro, filler ..., before, key, after, ... filler, question]      N tokens; the key lies at a depth of 0 to 1
    right  = the model's greedy answer is the key, token by token

The test is for caches and sparse attention of all kinds: it works on token ids, and needs no tokenizer where the parts of
the prompt are given as ids. Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for
Transformers", NeurIPS 2023, arXiv 2305.16300, who use five digits in a text of repeated sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

import heed.methods
from heed.catalogue import provides
from heed.methods import Method

if TYPE_CHECKING:
    from transformers import Cache

Encode = Callable[[str], Sequence[int]]


@provides("70-sinklora")
@dataclass(frozen=True, eq=False)
class PasskeyPrompt:
    """What a model is given, and what it should answer.

    Attributes:
        ids: (N,) the prompt.
        key: (A,) the answer.
        depth: where in the filler the key is told, 0 at its beginning, 1 at its end.
    """

    ids: Int[Tensor, " N"]
    key: Int[Tensor, " A"]
    depth: float


@provides("70-sinklora")
@dataclass(frozen=True)
class PasskeyText:
    """The parts of a prompt as token ids; `PasskeyText.english` makes them of sentences.

    Args:
        filler: repeated as often as needed: tokens of any text in which the key does not occur.
        intro, question: the first and the last tokens.
        before, after: tokens around the key where it is told.
    """

    filler: tuple[int, ...]
    intro: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    question: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.filler:
            raise ValueError("filler=() leaves nothing to hide the key in; give the tokens of some text")

    @classmethod
    def english(cls, encode: Encode, filler: str | None = None) -> PasskeyText:
        """The parts in English.

        Args:
            encode: text to tokens, without special ones, such as a tokenizer's `encode` with add_special_tokens=False.
            filler: any text; None for some plain sentences.
        """
        told = filler or "The river is wide. The hills are far away. A boat comes and a boat goes. "
        parts = (
            told,
            "Somewhere in this long text a pass key is told. Find it and keep it in mind.\n",
            "\nThe pass key is ",
            ". Keep it in mind.\n",
            "\nWhat is the pass key? The pass key is ",
        )
        return cls(*(tuple(encode(part)) for part in parts))

    def prompt(self, key: Sequence[int] | Tensor, length: int, depth: float) -> PasskeyPrompt:
        """A prompt of exactly `length` tokens that tells the key at a depth from 0 to 1.

        Raises:
            ValueError: no room for the parts, or a depth outside [0, 1].
        """
        if not 0 <= depth <= 1:
            raise ValueError(f"depth={depth} must lie in [0, 1]: 0 tells the key first, 1 last")
        answer = [int(token) for token in key]
        told = [*self.before, *answer, *self.after]
        room = length - len(self.intro) - len(told) - len(self.question)
        if room < 0 or not answer:
            raise ValueError(f"length={length} has no room: the parts beside the filler take {length - room} tokens")
        filler = (list(self.filler) * (room // len(self.filler) + 1))[:room]
        cut = round(depth * room)
        ids = [*self.intro, *filler[:cut], *told, *filler[cut:], *self.question]
        return PasskeyPrompt(torch.tensor(ids), torch.tensor(answer), depth)

    def prompts(
        self, keys: Sequence[Sequence[int]] | Int[Tensor, "P A"], length: int, generator: torch.Generator
    ) -> list[PasskeyPrompt]:
        """One prompt for every key, each at a random depth."""
        depths = torch.rand(len(keys), generator=generator, device=generator.device).tolist()
        return [self.prompt(key, length, depth) for key, depth in zip(keys, depths, strict=True)]


@provides("70-sinklora")
def passkeys(encode: Encode, number: int, generator: torch.Generator, digits: int = 5) -> list[list[int]]:
    """Random numbers of so many digits, as tokens."""
    if digits < 1:
        raise ValueError(f"digits={digits} must be at least 1")
    drawn = torch.randint(10 ** (digits - 1), 10**digits, (number,), generator=generator, device=generator.device)
    return [list(encode(str(key))) for key in drawn.tolist()]


@provides("70-sinklora")
@torch.no_grad()
def found_keys(
    model: Any,
    prompts: Sequence[PasskeyPrompt],
    *,
    method: Method | None = None,
    cache: Callable[[], Cache] | None = None,
    batch: int = 1,
    **generate: Any,
) -> Bool[Tensor, " P"]:
    """Which of the keys a model finds, by greedy generation of as many tokens as each has.

    Args:
        model: of transformers, with `generate`; in evaluation mode for as long as this takes.
        prompts: of any lengths and depths.
        method: applied to the model meanwhile: a cache, sparse attention.
        cache: makes a new, empty cache for every batch, such as `handle.state.cache`; None for the model's own, which a
            method may replace.
        batch: prompts at once; shorter ones are padded on the left.
        generate: more arguments for `model.generate`.

    Returns:
        (P,), True where every token of the answer is that of the key.

    Raises:
        ValueError: no prompts.
    """
    if not prompts or batch < 1:
        raise ValueError(f"{len(prompts)} prompts in batches of {batch}: both must be at least 1")
    training, device = model.training, next(model.parameters()).device
    settings = {"do_sample": False, "num_beams": 1, "pad_token_id": 0, "eos_token_id": None} | generate
    found = []
    model.eval()
    try:
        with nullcontext() if method is None else heed.methods.apply(model, method):
            for begin in range(0, len(prompts), batch):
                some = prompts[begin : begin + batch]
                ids, mask = _left_padded([prompt.ids for prompt in some])
                new = max(len(prompt.key) for prompt in some)
                own = {} if cache is None else {"past_key_values": cache()}
                out = model.generate(
                    ids.to(device), attention_mask=mask.to(device), max_new_tokens=new, **own, **settings
                )
                answers = out[:, ids.shape[1] :].cpu()
                for prompt, answer in zip(some, answers, strict=True):
                    found.append(torch.equal(answer[: len(prompt.key)], prompt.key))
    finally:
        model.train(training)
    return torch.tensor(found)


@provides("70-sinklora")
def retrieval_accuracy(model: Any, prompts: Sequence[PasskeyPrompt], **settings: Any) -> float:
    """The share of keys that a model finds, between 0 and 1; for the settings see `found_keys`."""
    return found_keys(model, prompts, **settings).float().mean().item()


def _left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, N) token ids with zeros before the shorter ones, and the mask of what is no padding."""
    length = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    return ids, mask
