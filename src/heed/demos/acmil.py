"""ACMIL on stained tissue and on bags of digits: where classifiers look that were only told about whole bags.

A bag is a set of patches of the left half of a photograph of tissue; it is positive when some of them are stained brown.
The right half is new to the models.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

import heed
from heed.data.bag_files import Instances
from heed.data.bags import Bag
from heed.data.slides import digit_bags
from heed.demos.registry import Figures, demos
from heed.errors import MissingExtra
from heed.predict.mil import (
    BagModel,
    BagOutput,
    BagRecipe,
    cumulative_attention,
    fit,
    heatmap,
    instance_scores,
    predict,
)

_PATCH, _CELLS = 16, 4  # pixels of a patch; every patch is described by the colours of 4 x 4 cells
_STAINED, _PLAIN = 0.85, 0.5  # quantiles of brown: stained patches lie above the first, plain ones below the second
_BAGS, _SIZE, _FEW = 60, 60, 4  # training bags, patches in one, stained ones in a positive one
_RECIPE = BagRecipe(epochs=20, learning_rate=2e-3, batch_size=4)
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ABMIL": ("abmil", {}),
    "ABMIL with masking": ("acmil_ga", {"n_token": 1}),
    "ACMIL, masking and branches": ("acmil_ga", {}),
}


@demos.register("09-acmil")
def acmil(picture: Path) -> Figures:
    """Train three classifiers on bags of tissue and of digits, and draw what they attend to."""
    begin = time.perf_counter()
    photo, brown = _tissue()
    side = photo.shape[0] // _PATCH
    features = _describe(photo)
    stained = brown >= brown.quantile(_STAINED)
    bags = _tissue_bags(features, brown, side)
    column = torch.arange(side * side) % side
    tissue = Bag("tissue", 1, Instances(features, torch.stack([column, torch.arange(side * side) // side], 1)))
    unseen = column >= side // 2
    digits = digit_bags()
    shown = next(bag for bag in digits.part("test") if bag.label)

    figure = plt.figure(figsize=(15, 8.7), layout="constrained")
    top, bottom = cast(np.ndarray, figure.subfigures(2, 1, height_ratios=(0.83, 1)))
    axes = cast(np.ndarray, top.subplots(1, 5))
    _show(axes[0], photo, "Stained tissue;\nmodels learn from its left half")
    axes[0].axvline(photo.shape[1] / 2, color="white", linewidth=2, linestyle=(0, (4, 3)))
    _show(axes[1], _light(photo, stained.float().view(side, side)), "Its brown patches,\nwhich no model is told")
    panels = cast(np.ndarray, bottom.subfigures(1, 3))
    figures: Figures = {}
    for i, (name, (model_name, settings)) in enumerate(_METHODS.items()):
        seen = _train(model_name, settings, bags, tissue)
        scores = instance_scores(seen)[0]
        map_ = heatmap(scores, cast(Tensor, tissue.instances().coordinates))
        found = binary_auroc(scores[unseen], stained[unseen].long()).item()
        _show(axes[2 + i], _light(photo, map_.sqrt()), f"{name}\nAUC {found:.2f} in the right half")
        on_digits = _train(model_name, settings, digits.part("train"), shown)
        share = _draw_digits(panels[i], shown, on_digits, name)
        top_ten = cumulative_attention(on_digits.weights[0].mean((0, 1)), [10]).item()
        figures[name] = (
            f"AUC {found:.2f} at finding brown patches in the unseen half; in the bag of digits {share:.0%} of the "
            f"attention on its nines, {top_ten:.0%} on ten digits"
        )
    figure.suptitle(
        "Told only which bags hold something brown, or a nine, attention finds it; branches also look elsewhere",
        fontsize=17,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=100)
    plt.close(figure)
    return figures | {"training": f"6 models in {time.perf_counter() - begin:.0f} s"}


def _tissue() -> tuple[np.ndarray, Tensor]:
    """A photograph (512, 512, 3) in [0, 1] of colon tissue, stained brown where a protein is, and how brown patches are."""
    try:
        from skimage import color, data
    except ImportError as error:
        raise MissingExtra("scikit-image", "compare") from error
    photo = data.immunohistochemistry().astype(np.float32) / 255
    stain = torch.from_numpy(color.rgb2hed(photo)[..., 2].astype(np.float32))
    return photo, torch.nn.functional.avg_pool2d(stain[None], _PATCH)[0].flatten()


def _describe(photo: np.ndarray) -> Tensor:
    """Features (patches, 48), standardised: the colours of the cells of each patch."""
    cells = torch.nn.functional.avg_pool2d(torch.from_numpy(photo).permute(2, 0, 1), _PATCH // _CELLS)
    patches = cells.unfold(1, _CELLS, _CELLS).unfold(2, _CELLS, _CELLS).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    return (patches - patches.mean()) / patches.std()


def _tissue_bags(features: Tensor, brown: Tensor, side: int) -> list[Bag]:
    draw = torch.Generator().manual_seed(0)
    left = torch.arange(len(brown)) % side < side // 2
    stained = (left & (brown >= brown.quantile(_STAINED))).nonzero()[:, 0]
    plain = (left & (brown <= brown.quantile(_PLAIN))).nonzero()[:, 0]
    bags = []
    for i in range(_BAGS):
        few = _FEW * (i % 2)
        parts = [
            pool[torch.randperm(len(pool), generator=draw)[:n]] for pool, n in ((stained, few), (plain, _SIZE - few))
        ]
        bags.append(Bag(f"bag {i}", i % 2, Instances(features[torch.cat(parts)])))
    return bags


def _train(name: str, settings: dict[str, Any], bags: list[Bag], seen: Bag) -> BagOutput:
    """Train a model on bags; returns what it says about another one."""
    torch.manual_seed(0)
    width = bags[0].instances().features.shape[1]
    model = cast(BagModel, heed.create_model(name, in_features=width, dim=64, hidden=64, **settings))
    fit(model, bags, (), _RECIPE)
    return predict(model, seen)


def _show(ax: Axes, image: np.ndarray, title: str) -> None:
    ax.imshow(image)
    ax.set_axis_off()
    ax.set_title(title, fontsize=11.5)


def _light(photo: np.ndarray, map_: Tensor) -> np.ndarray:
    """The photograph, lit where the map (patches) is near 1 and dark where it is near 0."""
    light = map_.repeat_interleave(_PATCH, 0).repeat_interleave(_PATCH, 1).numpy()[..., None]
    return photo * (0.12 + 0.88 * light)


def _draw_digits(panel: SubFigure, bag: Bag, output: BagOutput, title: str) -> float:
    """A bag as a page of digits, lit by attention, its nines framed; returns the nines' share of the attention."""
    features, _, labels = bag.instances()
    weights = output.weights[0].mean((0, 1))
    light = (weights / weights.max()).sqrt()
    nines = cast(Tensor, labels).bool()
    rows, columns = 8, len(features) // 8
    page = np.zeros((rows * 10, columns * 10, 3))
    ax = panel.subplots()
    for i, (digit, shade) in enumerate(zip(features.view(-1, 8, 8), light, strict=True)):
        row, column = divmod(i, columns)
        ink = ((digit - digit.min()) / (digit.max() - digit.min())).numpy()[..., None]
        colour = np.array(plt.get_cmap("inferno")(0.12 + 0.83 * float(shade))[:3])
        page[row * 10 + 1 : row * 10 + 9, column * 10 + 1 : column * 10 + 9] = ink * colour
        if nines[i]:
            ax.add_patch(
                Rectangle((column * 10 - 0.5, row * 10 - 0.5), 9.6, 9.6, fill=False, edgecolor="#56B4E9", linewidth=2.4)
            )
    ax.imshow(page)
    ax.set_axis_off()
    share = float(weights[nines].sum())
    ax.set_title(f"{title}\n{share:.0%} of the attention on the {int(nines.sum())} nines (framed)", fontsize=11.5)
    return share
