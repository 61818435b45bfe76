"""LongAlpaca's data for chat models: instructions with long texts in them, and answers, of which alone the loss is taken.

    {"instruction": ..., "output": ...}  ->  input_ids = [instruction, answer, end],  labels = [-100 ..., answer, end]

The records are those of the LongAlpaca files, a JSON list; an "input" beside the instruction is put behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from heed.catalogue import provides

IGNORED = -100  # a label of which no loss is taken, in torch and transformers
Example = dict[str, list[int]]


@provides("70-sinklora")
def chat_example(
    record: Mapping[str, str],
    encode: Callable[[str], Sequence[int]],
    end: int,
    *,
    template: str = "[INST]{instruction}[/INST]",
    start: Sequence[int] = (),
    longest: int | None = None,
) -> Example:
    """One record as tokens.

    Args:
        record: with "instruction" and "output", and perhaps "input".
        encode: text to tokens, without special ones, such as a tokenizer's `encode` with add_special_tokens=False.
        end: token that ends an answer.
        template: what is around an instruction; Llama 2's chat format by default.
        start: tokens before everything, such as the tokenizer's first one.
        longest: cut off what is beyond so many tokens.

    Returns:
        input_ids and labels, equally long.

    Raises:
        ValueError: a record without instruction or answer, or nothing of the answer is left after the cut.
    """
    if not record.get("instruction") or not record.get("output"):
        raise ValueError(f"a record needs 'instruction' and 'output'; this one has {sorted(record)}")
    asked = "\n".join(part for part in (record["instruction"], record.get("input", "")) if part)
    question = [*start, *encode(template.format(instruction=asked))]
    answer = [*encode(record["output"]), end]
    ids = (question + answer)[:longest]
    if len(ids) <= len(question):
        raise ValueError(f"longest={longest} cuts off the whole answer: the instruction has {len(question)} tokens")
    return {"input_ids": ids, "labels": [IGNORED] * len(question) + ids[len(question) :]}


@provides("70-sinklora")
def chat_batch(examples: Sequence[Example], pad: int, multiple: int = 4) -> dict[str, Tensor]:
    """Examples padded on the right to one length, a multiple of `multiple`, so that four groups divide it.

    Args:
        examples: of `chat_example`.
        pad: the token that fills up.
        multiple: 4 for groups of a quarter; the group size itself for groups of a fixed size.

    Returns:
        input_ids, labels and attention_mask, each (B, N): what transformers' models take, and its `Trainer` as a collator.
    """
    if not examples or multiple < 1:
        raise ValueError(f"{len(examples)} examples and multiple={multiple}: both must be at least 1")
    length = -(-max(len(example["input_ids"]) for example in examples) // multiple) * multiple

    def filled(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    ids = [example["input_ids"] for example in examples]
    return {
        "input_ids": filled(ids, pad),
        "labels": filled([example["labels"] for example in examples], IGNORED),
        "attention_mask": filled([[1] * len(row) for row in ids], 0),
    }
