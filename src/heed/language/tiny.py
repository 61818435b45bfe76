"""A language model small enough to be trained here, that reads English and finds what it was told: half a million weights.

It is transformers' own `LlamaForCausalLM` with the byte tokenizer of ByT5, saved and loaded like any other. To find pass
keys it needs heads that look up what followed an earlier occurrence (induction heads). Those form late or never from
text of this size, and soon from stretches of random characters that are repeated; so a part of its lessons are these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from heed.errors import MissingExtra
from heed.language.passkey import PasskeyText, passkeys

STEPS = 2000  # training steps
LONGEST = 512  # tokens that it is trained on
LEARNING_RATE, WEIGHT_DECAY, CLIP = 3e-3, 0.1, 1.0
# Lessons: tokens, how many at once, share of the steps. Short ones first, in which induction is learnt sooner.
_COURSES = ((128, 32, 0.5), (LONGEST, 8, 0.5))
_KEY_WEIGHT = 4.0  # of the losses of a key, which are few
_DIGITS, _ANY = (48, 58), (0, 256)  # bytes that repeated stretches are made of


def tiny_tokenizer() -> Any:
    """Bytes as tokens, after three special ones.

    Raises:
        MissingExtra: transformers is not installed.
    """
    try:
        from transformers import ByT5Tokenizer
    except ImportError as error:
        raise MissingExtra("transformers", "language") from error
    return ByT5Tokenizer(extra_ids=0)


def tiny_model(seed: int = 0) -> Any:
    """An untrained `LlamaForCausalLM` that fits `tiny_tokenizer`: 2 layers of 4 heads, 2 of them for keys and values.

    Args:
        seed: of the weights.

    Raises:
        MissingExtra: transformers is not installed.
    """
    tokenizer = tiny_tokenizer()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8 * LONGEST,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def as_tokens(text: UInt8[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Bytes as `tiny_tokenizer` numbers them."""
    return text.long() + tiny_tokenizer().offset


def train_tiny(
    model: Any,
    text: UInt8[Tensor, " n"],
    *,
    steps: int = STEPS,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Train `tiny_model`, in place, on the device where it is.

    Args:
        model: afterwards in evaluation mode.
        text: (n,) bytes to learn from, more than `LONGEST`.
        steps: optimiser steps.
        seed: of the lessons.
        report: told the number of steps done and the loss.
    """
    generator = torch.Generator().manual_seed(seed)
    lessons = _Lessons(as_tokens(text), generator)
    optimiser = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    total = max(steps, 3)
    rise = max(0.1, 2 / total)  # a rise or fall of no length divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=total, pct_start=rise, cycle_momentum=False
    )
    ends = torch.tensor([share for _, _, share in _COURSES]).cumsum(0) * steps
    model.train()
    for step in range(steps):
        length, batch, _ = _COURSES[int((step >= ends).sum().clamp(max=len(_COURSES) - 1))]
        ids, weight = (x.to(model.device) for x in lessons.batch(length, batch))
        logits = model(ids[:, :-1], use_cache=False).logits
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        schedule.step()
        if report is not None:
            report(step + 1, loss.item())
    model.eval()


class _Lessons:
    """Rows of text, of pass keys hidden in text, of repeated digits and of repeated bytes, a quarter each."""

    def __init__(self, text: Int[Tensor, " n"], generator: torch.Generator) -> None:
        self.text, self.generator = text, generator
        tokenizer = tiny_tokenizer()
        self.encode = lambda words: tokenizer.encode(words, add_special_tokens=False)
        self.offset = tokenizer.offset
        self.parts = PasskeyText.english(self.encode)

    def batch(self, length: int, batch: int) -> tuple[Int[Tensor, "B M"], Tensor]:
        """Ids (B, length + 1), and the weights (B, length) of the losses of all but the first."""
        kinds = (self.read, self.find, self.repeat_digits, self.repeat_bytes)
        rows = torch.stack([kinds[i % len(kinds)](length + 1) for i in range(batch)])
        weight = torch.ones(batch, length)
        weight[1 :: len(kinds), -5:] = _KEY_WEIGHT
        return rows, weight

    def read(self, length: int) -> Tensor:
        start = self._integer(0, len(self.text) - length + 1)
        return self.text[start : start + length]

    def find(self, length: int) -> Tensor:
        key = passkeys(self.encode, 1, self.generator)
        parts = replace(self.parts, filler=tuple(self.read(length).tolist()))
        if length < LONGEST:
            parts = replace(parts, intro=())
        prompt = parts.prompts(key, length - len(key[0]), self.generator)[0]
        return torch.cat([prompt.ids, prompt.key])

    def repeat_digits(self, length: int) -> Tensor:
        return self._repeat(*_DIGITS, length)

    def repeat_bytes(self, length: int) -> Tensor:
        return self._repeat(*_ANY, length)

    def _repeat(self, low: int, high: int, length: int) -> Tensor:
        period = self._integer(6, length // 3)
        stretch = torch.randint(low, high, (period,), generator=self.generator) + self.offset
        return stretch.repeat(-(-length // period))[:length]

    def _integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))
