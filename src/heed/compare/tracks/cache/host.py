"""The language model that methods are tried on, its tokenizer, and the text in its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from heed.compare.machine import device_kind, draw
from heed.compare.once import made_once
from heed.compare.track import Trial
from heed.compare.tracks.cache.settings import TINY, CacheSettings
from heed.data.text import TextData
from heed.errors import MissingExtra
from heed.hosts.loading import load_pretrained
from heed.hosts.saving import save_whole
from heed.language.passkey import PasskeyPrompt, PasskeyText, passkeys


@dataclass(frozen=True)
class CacheHost:
    """What a trial works with.

    Args:
        model, tokenizer: of transformers.
        train: tokens that a method may learn from.
        texts: (T, prompt + following) of the test text, for perplexity.
        keys: prompts with pass keys.
    """

    model: Any
    tokenizer: Any
    train: Int[Tensor, " n"]
    texts: Int[Tensor, "T L"]
    keys: list[PasskeyPrompt]


def prepare(trial: Trial, data: TextData) -> CacheHost:
    """The host of a trial and what it is asked.

    Raises:
        ValueError: the model cannot be loaded, takes fewer tokens than are asked for, or the text is too short.
    """
    settings: CacheSettings = trial.settings
    model, tokenizer = _load(trial, data)
    length = settings.prompt + settings.following
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(
            f"prompt={settings.prompt} and following={settings.following} are {length} tokens, and the model takes "
            f"{longest}; ask for fewer"
        )

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    train, test = (torch.tensor(encode(_decoded(part))) for part in (data.train, data.test))
    if len(test) < length:
        raise ValueError(
            f"the test text has {len(test)} tokens, and prompt={settings.prompt} with following={settings.following} "
            "needs more; give more text or ask for fewer"
        )
    spread = torch.linspace(0, len(test) - length, settings.texts).long()
    texts = test[spread[:, None] + torch.arange(length)]
    generator = torch.Generator().manual_seed(draw("keys", trial.seed))
    keys = []
    depths = torch.linspace(0, 1, settings.keys).tolist()
    starts = torch.randint(len(test) - settings.prompt + 1, (settings.keys,), generator=generator).tolist()
    english = PasskeyText.english(encode)
    for key, depth, start in zip(passkeys(encode, settings.keys, generator), depths, starts, strict=True):
        filler = tuple(test[start : start + settings.prompt].tolist())
        hidden = PasskeyText(filler, english.intro, english.before, english.after, english.question)
        keys.append(hidden.prompt(key, settings.prompt, depth))
    return CacheHost(model, tokenizer, train, texts, keys)


def _load(trial: Trial, data: TextData) -> tuple[Any, Any]:
    settings: CacheSettings = trial.settings
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingExtra("transformers", "language") from error
    source: str | Path = settings.model
    if settings.model == TINY:
        source = made_once(trial.folder.parent / f"{TINY}-{trial.seed}", lambda folder: _train(trial, data, folder))
    return load_pretrained(
        source, AutoModelForCausalLM, AutoTokenizer, "a language model", device=trial.device, dtype=settings.dtype
    )


def _train(trial: Trial, data: TextData, folder: Path) -> None:
    from heed.language.tiny import STEPS, tiny_model, tiny_tokenizer, train_tiny

    steps = trial.settings.tiny_steps or STEPS
    every = max(1, steps // 100)
    model = tiny_model(draw("model", trial.seed)).to(device_kind(trial.device))
    trial.steps = steps

    def report(step: int, loss: float) -> None:
        if step % every == 0:
            trial.tell(step, loss)

    train_tiny(model, data.train, steps=steps, seed=trial.seed, report=report)
    save_whole(folder, model, tiny_tokenizer())


def _decoded(text: Tensor) -> str:
    return bytes(text.tolist()).decode(errors="replace")
