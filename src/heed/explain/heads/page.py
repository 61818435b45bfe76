"""The report on heads as one self-contained HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from heed.catalogue import provides
from heed.explain.heads.report import Report, compare_reports, safe_name
from heed.explain.page import INK, LINE, SERIES, SOFT, chart, heat, photo, svg, write_page

TITLES = {
    "prob": ("Loss of probability", "mean fall of the true class’s probability without the head"),
    "jsd": ("Change of the prediction", "mean Jensen-Shannon divergence, in nats"),
    "flip": ("Flipped answers", "share of images with another answer"),
    "acc_drop": ("Loss of accuracy", "accuracy with the head minus without"),
    "loss": ("Rise of the loss", "cross-entropy without the head minus with, in nats"),
    "cls_l2": ("Change of the feature", "mean distance that the classifier’s input moves"),
    "sensitivity": ("Sensitivity", "mean absolute gradient of the loss with respect to the head’s gate"),
    "keep_one_prob": (
        "Alone in its layer",
        "fall of the true class’s probability with only this head left in its layer",
    ),
}
_TOP = 4  # heads whose attention is shown on images
# Where attention goes: title, ink, and which of the profile's shares are added up.
_SHARES = ("itself", "rings 1 and 2", "farther patches", "class token", "other tokens")


@dataclass(frozen=True)
class _Cell:
    """One head in a map of heads: strength 0 to 1 of its colour, and what the reader is told."""

    strength: float
    positive: bool
    says: str


@provides("51-vit-analytics")
def write_heads_page(reports: Sequence[Report], path: str | Path) -> Path:
    """Write the page for one model, or for several side by side.

    Args:
        reports: what `analyse` returned.
        path: the page to write.

    Raises:
        MissingExtra: jinja2, or scikit-learn for the agreement of metrics, is not installed.
        ValueError: two reports have the same name, or there are none.
    """
    path = Path(path)
    content = {
        "headline": _headline(reports),
        "models": compare_reports(reports),
        "views": [_view(report) for report in reports],
    }
    write_page(path, "heads.html.j2", Path(__file__).parent, content)
    return path


def _headline(reports: Sequence[Report]) -> str:
    if len(reports) > 1:
        return f"The heads of {', '.join(report.model for report in reports[:-1])} and {reports[-1].model}"
    (report,) = reports
    layer, head = divmod(int(report.importance[report.ranking].argmax()), report.heads)
    who = f"Head {head} of layer {layer} matters most in {report.model}"
    if "prob" in report.importance:
        loss = float(report.importance["prob"][layer, head])
        if loss > 0:
            return f"{who}: without it the {_true(report)} loses {loss * 100:.1f} % of probability"
    return who


def _true(report: Report) -> str:
    return "true class" if report.labelled else "predicted class"


def _view(report: Report) -> dict[str, Any]:
    """What the template shows of one model."""
    name = safe_name(report.model).replace(".", "-")
    maps = [(*TITLES[metric], _cells(values, metric)) for metric, values in report.importance.items()]
    maps.append(
        (
            "Same in every image",
            "correlation of the head’s maps between images; 1 is a head that ignores what it sees",
            _cells(report.content_agnostic.nan_to_num(), "content_agnostic", top=1.0),
        )
    )
    table = report.table()
    return {
        "report": report,
        "maps": maps,
        "agreement": sorted(report.agreement().items(), key=lambda item: -item[1]),
        "pruning": _pruning(report, name) if report.curves else None,
        "shares": _shares(report, name),
        "legend": [
            (title, f"var(--series-{index})") for index, title in enumerate(_SHARES) if _share(report)[index].any()
        ],
        "distance": _dots(report.profile.mean_distance, f"{name}-distance", "mean distance in patches"),
        "entropy": _dots(report.profile.entropy, f"{name}-entropy", "entropy in nats"),
        "atlas": _atlas(report),
        "patterns": _patterns(report, name),
        "looks": _looks(report),
        "columns": [
            column for column in table[0] if column != "model" and any(row[column] is not None for row in table)
        ],
        "table": table,
        "counts": Counter(report.collected.head_patterns).most_common(),
    }


def _cells(values: Tensor, name: str, top: float | None = None) -> list[list[_Cell]]:
    top = top or max(float(values.abs().max()), 1e-12)
    return [
        [
            _Cell(min(abs(value) / top, 1.0), value >= 0, f"layer {layer}, head {head}: {name} {value:.3g}")
            for head, value in enumerate(row)
        ]
        for layer, row in enumerate(values.tolist())
    ]


def _pruning(report: Report, name: str) -> str:
    figure, ax = chart(5.4, 2.8)
    inks = {"least first": SERIES[2], "most first": SERIES[1]}
    for title, curve in report.curves.items():
        way = title.partition(", ")[2]
        chance = not way
        ink = SOFT if chance else inks[way]
        ax.plot(curve.accuracy.numpy(), color=ink, linewidth=1 if chance else 2.2, alpha=0.6 if chance else 1)
    ax.yaxis.set_major_formatter(lambda y, _: f"{y * 100:.0f} %")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("heads switched off", color=SOFT, fontsize=9)
    what = "Accuracy" if report.labelled else "Agreement with the whole model"
    return svg(figure, f"{name}-pruning", f"{what} while heads are switched off one after another")


def _share(report: Report) -> list[Tensor]:
    """Shares (L,) of the attention of patches, in the order of `_SHARES`."""
    rings = report.profile.ring_total.mean(1)
    others = (getattr(report.profile, field).mean(1) for field in ("patch_to_cls", "patch_to_other"))
    return [rings[:, 0], rings[:, 1:3].sum(1), rings[:, 3:].sum(1), *others]


def _shares(report: Report, name: str) -> str:
    figure, ax = chart(4.4, 0.75 + 0.24 * report.layers)
    left = torch.zeros(report.layers)
    for index, share in enumerate(_share(report)):
        ax.barh(range(report.layers), share.numpy(), left=left.numpy(), height=0.72, color=SERIES[index], linewidth=0)
        left = left + share
    _layers(ax, report.layers)
    ax.grid(visible=False)
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x * 100:.0f} %")
    return svg(figure, f"{name}-shares", "Where the attention of the patches goes, by layer")


def _dots(values: Tensor, name: str, label: str) -> str:
    """Every head as a dot, the mean of each layer as a bar, layers from top to bottom."""
    layers, heads = values.shape
    figure, ax = chart(4.4, 0.75 + 0.24 * layers)
    rows = torch.arange(layers)[:, None].expand(layers, heads)
    ax.scatter(values.flatten().numpy(), rows.flatten().numpy(), s=26, color=SERIES[0], alpha=0.6, linewidth=0)
    for layer, mean in enumerate(values.mean(1).tolist()):
        ax.plot([mean, mean], [layer - 0.36, layer + 0.36], color=INK, linewidth=1.6)
    _layers(ax, layers)
    ax.set_xlim(left=0)
    ax.set_xlabel(label, color=SOFT, fontsize=9)
    return svg(figure, name, f"{label} of every head, by layer")


def _layers(ax: Axes, layers: int) -> None:
    step = 1 if layers <= 16 else 2
    ax.set_yticks(range(0, layers, step), [f"layer {layer}" for layer in range(0, layers, step)])
    ax.set_ylim(layers - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color=LINE, linewidth=0.7)


def _atlas(report: Report) -> list[list[dict[str, str]]]:
    """Per layer and head a picture of where it looks from a query in the middle."""
    ranks = report.importance[report.ranking].flatten().argsort(descending=True).argsort().view(report.layers, -1)
    rows = []
    for layer in range(report.layers):
        row = []
        for head in range(report.heads):
            pattern = report.collected.head_patterns[layer * report.heads + head]
            says = f"layer {layer}, head {head}: {pattern}; number {int(ranks[layer, head]) + 1} in importance"
            ink = ""
            if report.patterns is not None:
                ink = _ink(int(report.patterns.group_cluster[layer * report.heads + head]))
            row.append({"picture": heat(report.collected.displacement[layer, head]), "says": says, "ink": ink})
        rows.append(row)
    return rows


def _ink(cluster: int) -> str:
    return f"var(--series-{cluster % len(SERIES)})"


def _patterns(report: Report, name: str) -> dict[str, Any] | None:
    found = report.patterns
    if found is None:
        return None
    maps, heads = (Counter(which.tolist()) for which in (found.cluster, found.group_cluster))
    figure, ax = chart(4.8, 3.6)
    for number in range(len(found.names)):
        x, y = found.projected[found.cluster == number].T.numpy()
        ax.scatter(x, y, s=11, color=SERIES[number % len(SERIES)], alpha=0.75, linewidth=0)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines["bottom"].set_visible(False)
    return {
        "cards": [
            {
                "picture": heat(prototype.square()),
                "name": title,
                "ink": _ink(number),
                "maps": maps[number],
                "heads": heads[number],
            }
            for number, (title, prototype) in enumerate(zip(found.names, found.prototypes, strict=True))
        ],
        "plane": svg(figure, f"{name}-plane", "Codes of all maps in the plane, coloured by cluster"),
        "error": found.error / max(found.variance, 1e-12),
    }


def _looks(report: Report) -> dict[str, Any]:
    """The first images, and where the heads that matter most look from the patch in the middle."""
    shown, (rows, columns) = report.collected.shown, report.grid
    order = report.importance[report.ranking].flatten().argsort(descending=True)[:_TOP].tolist()
    places = [divmod(number, report.heads) for number in order]
    return {
        "x": f"{(columns // 2 + 0.5) / columns:.1%}",
        "y": f"{(rows // 2 + 0.5) / rows:.1%}",
        "shape": f"{shown.shape[3]} / {shown.shape[2]}",
        "photos": [photo(image) for image in shown],
        "heads": [
            (f"layer {layer}, head {head}", [heat(picture) for picture in report.collected.rows[layer, head]])
            for layer, head in places
        ],
    }
