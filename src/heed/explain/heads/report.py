"""Everything about the heads of one model in one value: a table with a row per head, curves, patterns; several compared.

After Li et al., "How Does Attention Work in Vision Transformers?" (TVCG 2023): which heads matter, how far each head
looks, and which pattern each head has learned.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from heed.catalogue import provides
from heed.checkpoint import write_atomically
from heed.errors import MissingExtra
from heed.explain.batches import Batch, Images, take_batches
from heed.explain.heads.collect import Collected, collect
from heed.explain.heads.importance import check_metrics, importance
from heed.explain.heads.patterns import PatternOptions, Patterns, summarise_patterns
from heed.explain.heads.profile import StrengthProfile
from heed.explain.heads.pruning import PruningCurve, prune, prune_order, random_orders
from heed.explain.vit import Classifier, Vit

_PROFILE_COLUMNS = ("patch_to_cls", "patch_to_other", "cls_to_patches", "cls_to_cls", "mean_distance", "entropy")
_PATTERNS = PatternOptions()


@provides("51-vit-analytics")
@dataclass(frozen=True, eq=False)
class Report:
    """The heads of a model.

    Args:
        model: its name.
        images, labelled: how many were looked at, and whether they had labels.
        grid, prefix: rows and columns of patches, and tokens before them.
        accuracy: on the images, with labels; None without.
        importance: metric -> (L, H).
        curves: "METRIC, least first" and "METRIC, most first" -> curve; "random 0" and so on.
        collected: what one pass over the images gathered about attention.
        patterns: clusters and prototypes, None where not asked for.
        notes: what the reader should know of the data.
    """

    model: str
    images: int
    labelled: bool
    grid: tuple[int, int]
    prefix: int
    accuracy: float | None
    importance: dict[str, Float[Tensor, "L H"]]
    curves: dict[str, PruningCurve]
    collected: Collected
    patterns: Patterns | None
    notes: tuple[str, ...] = ()

    @property
    def profile(self) -> StrengthProfile:
        return self.collected.profile

    @property
    def content_agnostic(self) -> Float[Tensor, "L H"]:
        return self.collected.content_agnostic

    @property
    def layers(self) -> int:
        return self.profile.mean_distance.shape[0]

    @property
    def heads(self) -> int:
        return self.profile.mean_distance.shape[1]

    @property
    def ranking(self) -> str:
        """The metric that heads are ranked by where one is needed: jsd, or the first there is."""
        return _ranking(self.importance)

    def table(self) -> list[dict[str, Any]]:
        """One row per head: model, layer, head, every metric, ring and profile figures, cluster, pattern.

        `dominant_ring` is the ring that gets the most attention, `pattern` the plain pattern that the head resembles,
        `cluster` its cluster among the patterns. None stands for what the model does not have.
        """
        rows = []
        for layer in range(self.layers):
            for head in range(self.heads):
                row: dict[str, Any] = {"model": self.model, "layer": layer, "head": head}
                row |= {name: _number(values[layer, head]) for name, values in self.importance.items()}
                row["dominant_ring"] = int(self.profile.ring_total[layer, head].argmax())
                row |= {name: _number(getattr(self.profile, name)[layer, head]) for name in _PROFILE_COLUMNS}
                row["content_agnostic"] = _number(self.content_agnostic[layer, head])
                flat = layer * self.heads + head
                row["cluster"] = None if self.patterns is None else int(self.patterns.group_cluster[flat])
                row["pattern"] = self.collected.head_patterns[flat]
                rows.append(row)
        return rows

    def agreement(self) -> dict[tuple[str, str], float]:
        """Spearman's rank correlation between every two metrics over all heads.

        A metric that is the same for all heads ranks nothing and is left out.

        Raises:
            MissingExtra: scikit-learn, and scipy with it, is not installed.
        """
        try:
            from scipy.stats import spearmanr
        except ImportError as error:
            raise MissingExtra("scipy", "compare") from error
        correlate: Any = spearmanr
        flat = {name: values.flatten().numpy() for name, values in self.importance.items()}
        names = [name for name, values in flat.items() if values.min() < values.max()]
        return {
            (one, other): float(correlate(flat[one], flat[other]).statistic)
            for i, one in enumerate(names)
            for other in names[i + 1 :]
        }

    def to_csv(self, path: str | Path) -> None:
        """Write the table."""
        write_atomically(Path(path), _csv(self.table()))

    def to_json(self, path: str | Path) -> None:
        """Write the table, the trend over layers, the curves, the agreement of the metrics and the patterns."""
        write_atomically(Path(path), json.dumps(self.summary(), indent=1) + "\n")

    def summary(self) -> dict[str, Any]:
        """What `to_json` writes, as plain values."""
        trend = {
            name: {"mean": _numbers(mean), "std": _numbers(std)} for name, (mean, std) in self.profile.trend().items()
        }
        curves = {
            name: {
                "order": curve.order.tolist(),
                "accuracy": _numbers(curve.accuracy),
                "true_prob": _numbers(curve.true_prob),
            }
            for name, curve in self.curves.items()
        }
        patterns = None
        if self.patterns is not None:
            maps = Counter(self.patterns.cluster.tolist())
            heads = Counter(self.patterns.group_cluster.tolist())
            patterns = {
                "reconstruction_error": self.patterns.error,
                "variance": self.patterns.variance,
                "clusters": [
                    {"name": name, "maps": maps[number], "heads": heads[number]}
                    for number, name in enumerate(self.patterns.names)
                ],
            }
        return {
            "model": self.model,
            "images": self.images,
            "labelled": self.labelled,
            "accuracy": self.accuracy,
            "grid": list(self.grid),
            "prefix_tokens": self.prefix,
            "notes": list(self.notes),
            "heads": self.table(),
            "ring_total": _numbers(self.profile.ring_total),
            "ring_mean": _numbers(self.profile.ring_mean),
            "trend": trend,
            "curves": curves,
            "agreement": {f"{one}/{other}": value for (one, other), value in self.agreement().items()},
            "patterns": patterns,
        }


@provides("51-vit-analytics")
def analyse(
    model: nn.Module,
    images: Images,
    labels: Int[Tensor, " n"] | None = None,
    *,
    name: str | None = None,
    metrics: Sequence[str] | None = None,
    curves: Sequence[str] | bool = True,
    random_curves: int = 3,
    patterns: PatternOptions | None = _PATTERNS,
    limit: int | None = 256,
    batch_size: int = 32,
    grid: tuple[int, int] | None = None,
    classifier: Classifier | None = None,
    on_step: Callable[[str], None] | None = None,
) -> Report:
    """Which heads of a vision transformer matter, how far they look, and which patterns they have learned.

    Args:
        model: heed's, timm's or transformers', see `heed.explain.vit`. It is left as it was.
        images: (n, C, H, W), or a loader of batches with or without labels, normalised as the model takes them.
        labels: (n,) classes; without labels, the model's own predictions stand for them.
        name: of the model in the report; default its class.
        metrics: of `METRICS`; default prob, jsd, cls_l2 and sensitivity, or cls_l2 for a model without a classifier.
        curves: metrics to draw pruning curves for; True for jsd (or the first metric), False for none.
        random_curves: pruning curves in random order beside them.
        patterns: how patterns are summarised; None leaves them out, which needs no scikit-learn.
        limit: at most so many images.
        batch_size: images at once, for a tensor.
        grid: rows and columns of patches, where they do not follow from the model and the size of the images.
        classifier: (B, F) features to (B, C) logits, for a model without a classifier of its own.
        on_step: told in words what is being done.

    Raises:
        TypeError: not a vision transformer whose heads can be reached, or one that attends in windows.
        ValueError: an argument does not fit; no images; labels out of range.
        RuntimeError: attention is computed without forming its weights.
    """
    tell = on_step or (lambda _: None)
    batches = take_batches(images, labels, limit=limit, batch_size=batch_size)
    vit = Vit(model, batches[0].images, grid, classifier)
    names = check_metrics(vit, metrics)
    count = sum(len(batch.images) for batch in batches)
    tell(f"looking at {vit.layers} x {vit.heads} heads in {count} images")
    collected = collect(vit, batches, patterns.maps_per_head if patterns else 0, patterns.seed if patterns else 0)
    tell("switching off one head after another")
    found = importance(vit, batches, names)
    labelled = batches[0].labels is not None
    predicts = vit.predicts
    accuracy = prune(vit, batches, torch.zeros(0, dtype=torch.long)).area if labelled and predicts else None
    drawn = _curves(vit, batches, found, curves, random_curves, tell) if curves and predicts else {}
    summarised = None
    if patterns is not None:
        tell("summarising patterns")
        summarised = summarise_patterns(
            collected.maps, collected.map_heads, collected.map_statistics, vit.grid, patterns
        )
    return Report(
        name or type(model).__name__,
        count,
        labelled,
        vit.grid,
        vit.prefix,
        accuracy,
        found,
        drawn,
        collected,
        summarised,
    )


def _curves(
    vit: Vit,
    batches: Sequence[Batch],
    found: dict[str, Tensor],
    metrics: Sequence[str] | bool,
    random_curves: int,
    tell: Callable[[str], None],
) -> dict[str, PruningCurve]:
    curves: dict[str, PruningCurve] = {}
    for metric in (_ranking(found),) if metrics is True else metrics or ():
        if metric not in found:
            raise ValueError(f"curves={metric!r} is not among the metrics computed: {', '.join(found)}")
        tell(f"pruning in the order of {metric}")
        curves[f"{metric}, least first"] = prune(vit, batches, prune_order(found[metric]))
        curves[f"{metric}, most first"] = prune(vit, batches, prune_order(found[metric], most_important_first=True))
    tell("pruning in random order")
    for number, order in enumerate(random_orders(vit, random_curves)):
        curves[f"random {number}"] = prune(vit, batches, order)
    return curves


def _ranking(importance: dict[str, Tensor]) -> str:
    return "jsd" if "jsd" in importance else next(iter(importance))


@provides("51-vit-analytics")
def compare_reports(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """Several models side by side, one row each.

    Columns: model, layers, heads, images, accuracy, share of heads whose removal helps (prob below 0; None without
    prob), mean distance in the first and the last layer relative to the longer side of the grid, mean content-agnostic
    score, share of attention on the class token, and the most frequent pattern with its share of the heads.

    Raises:
        ValueError: there are none, or two of the same name.
    """
    names = [report.model for report in reports]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"reports of {names}: at least one is needed, each with a name of its own; pass name= to analyse"
        )
    rows = []
    for report in reports:
        distance = report.profile.mean_distance.mean(1) / max(report.grid)
        pattern, heads = Counter(report.collected.head_patterns).most_common(1)[0]
        prob = report.importance.get("prob")
        rows.append(
            {
                "model": report.model,
                "layers": report.layers,
                "heads": report.heads,
                "images": report.images,
                "accuracy": report.accuracy,
                "harmful_heads": None if prob is None else _number((prob < 0).float().mean()),
                "distance_first": _number(distance[0]),
                "distance_last": _number(distance[-1]),
                "content_agnostic": _number(report.content_agnostic.mean()),
                "patch_to_cls": _number(report.profile.patch_to_cls.mean()),
                "commonest_pattern": pattern,
                "commonest_share": heads / (report.layers * report.heads),
            }
        )
    return rows


@provides("51-vit-analytics")
def write_tables(reports: Sequence[Report], folder: str | Path) -> None:
    """heads.csv, a row per head of every model; models.csv, a row per model; and a json file per model."""
    folder = Path(folder)
    rows = [row for report in reports for row in report.table()]
    columns = dict.fromkeys(column for row in rows for column in row)
    write_atomically(folder / "heads.csv", _csv([{column: row.get(column) for column in columns} for row in rows]))
    write_atomically(folder / "models.csv", _csv(compare_reports(reports)))
    for report in reports:
        report.to_json(folder / f"{safe_name(report.model)}.json")


def safe_name(name: str) -> str:
    """A name as part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _numbers(values: Tensor) -> Any:
    return _number(values) if values.ndim == 0 else [_numbers(value) for value in values]
