"""How answers are judged: yes or no as POPE does it, descriptions by CHAIR.

    CHAIR_i = objects mentioned that are not there / objects mentioned
    CHAIR_s = descriptions with such an object / descriptions

POPE: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (EMNLP 2023), arXiv 2305.10355.
CHAIR: Rohrbach et al., "Object Hallucination in Image Captioning" (EMNLP 2018), arXiv 1809.02156.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from heed.compare.results import Metric
from heed.compare.tracks.hallucination.questions import Questions
from heed.errors import MissingExtra

METRICS = (
    Metric("accuracy", "accuracy"),
    Metric("precision", "precision"),
    Metric("recall", "recall"),
    Metric("f1", "F1"),
    Metric("yes_ratio", "says yes"),
    Metric("chair_i", "CHAIR_i", "lower"),
    Metric("chair_s", "CHAIR_s", "lower"),
)


def says_yes(answer: str) -> bool:
    """Whether an answer means yes: as in POPE's own evaluation, no when its first sentence has "no" or "not"."""
    words = re.findall(r"[a-z']+", answer.split(".")[0].lower())
    return not {"no", "not"} & set(words)


def mentioned(text: str, objects: Sequence[str], synonyms: Mapping[str, Sequence[str]]) -> set[str]:
    """The objects that a description names, by their names, their plurals in -s and -es, or synonyms, as whole words."""
    found = set()
    for name in objects:
        forms = "|".join(re.escape(word.lower()) for word in (name, *synonyms.get(name, ())))
        if re.search(rf"(?<!\w)(?:{forms})(?:s|es)?(?!\w)", text.lower()):
            found.add(name)
    return found


def judge(questions: Questions, answers: Sequence[str]) -> dict[str, float]:
    """The scores of the answers to all items, by the names of `METRICS`; without descriptions, without CHAIR."""
    try:
        from torchmetrics import MeanMetric, MetricCollection
        from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, BinaryPrecision, BinaryRecall
    except ImportError as error:
        raise MissingExtra("torchmetrics", "compare") from error
    pairs = list(zip(questions.items, answers, strict=True))
    said = torch.tensor([int(says_yes(answer)) for item, answer in pairs if item.label])
    true = torch.tensor([int(item.label == "yes") for item, _ in pairs if item.label])
    scores = MetricCollection(
        {"accuracy": BinaryAccuracy(), "precision": BinaryPrecision(), "recall": BinaryRecall(), "f1": BinaryF1Score()}
    )
    found = {name: float(value) for name, value in scores(said, true).items()}
    share = MeanMetric()
    share.update(said.float())
    found["yes_ratio"] = float(share.compute())
    if not questions.described:
        return found
    known = sorted({name for item in questions.described for name in item.objects} | set(questions.synonyms))
    wrong_mentions, wrong_texts = MeanMetric(), MeanMetric()
    for item, text in pairs:
        if not item.label:
            names = mentioned(text, known, questions.synonyms)
            wrong = names - set(item.objects)
            wrong_texts.update(float(bool(wrong)))
            if names:
                wrong_mentions.update(len(wrong) / len(names), weight=len(names))
    found["chair_s"] = float(wrong_texts.compute())
    found["chair_i"] = float(wrong_mentions.compute()) if wrong_mentions.update_called else 0.0
    return found
