"""DesignEdit on coins: lifted, moved, enlarged, mirrored and covered, one of them by a cat's eye, by a random tiny UNet."""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from heed.demos.registry import Figures, demos
from heed.diffusion.designedit import Background, DesignEdit, DesignEditSettings, EditPlan, Layer
from heed.diffusion.masks import Polygon
from heed.diffusion.processors import resized_mask
from heed.diffusion.tiny import tiny_pipeline
from heed.errors import MissingExtra

_CELLS = 64  # per side of the latents, which are pixels here
_SETTINGS = DesignEditSettings()
_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#009E73")
_NAMES = ("enlarged", "moved", "mirrored", "from another picture")
# Centre x, centre y, half width, half height in the cropped photographs.
_LARGE, _FACE, _CROWN, _CORNER, _EYE = (
    (181, 102, 35, 34),
    (47, 108, 27, 27),
    (105, 35, 29, 28),
    (193, 184, 25, 24),
    (77, 66, 35, 35),
)


@demos.register("01-designedit")
def designedit(picture: Path) -> Figures:
    """Edit a photograph of coins with pixels as latents, and show rows, layers, blanked keys and the order of layers."""
    coins, cat = _photographs()
    begin = time.perf_counter()
    pipeline = tiny_pipeline(pixels=True, latent_size=_CELLS)
    pipeline.set_progress_bar_config(disable=True)
    edit = DesignEdit(pipeline, _SETTINGS)
    objects = [_oval(*_FACE), _oval(*_LARGE), _oval(*_CROWN)]
    layers = (
        Layer(objects[0], scale=1.5),
        Layer(objects[1], dx=-0.42, dy=-0.04),
        Layer(objects[2], flip="up-down"),
        Layer(_oval(*_EYE), cat, dx=(_CORNER[0] - _EYE[0]) / 218, dy=(_EYE[1] - _CORNER[1]) / 218, scale=0.72),
    )
    background = Background(coins, (*objects, _oval(*_CORNER)))
    steps: list[Tensor] = []
    edited = edit.run(EditPlan(background, layers), on_step=lambda _, latents: steps.append(latents))
    other_order = layers[1], layers[0], *layers[2:]
    reordered = edit.run(EditPlan(background, other_order), trajectory=edited.trajectory)
    seconds = time.perf_counter() - begin

    parts = edited.decomposition
    rows = edit.host.decode(edited.latents)
    canvas, other = rows[2], edit.host.decode(reordered.latents[2:3])[0]
    inside = parts.remove[0].bool().expand(4, -1, -1)
    differences = [(z[1] - z[0]).abs() for z in steps]
    outside = [float(d[~inside].max()) for d in differences]
    hole = [float(d[inside].mean()) for d in differences]
    source_error = (edited.latents[0] - edited.trajectory.latents[0, 0]).abs().mean().item()

    figure, axes = plt.subplot_mosaic(
        [["source", "lifted", "background", "canvas"], ["keys", "order", "steps", "steps"]],
        figsize=(15.4, 9.4),
        layout="constrained",
    )
    masks = [np.kron(mask[0, 0].numpy(), np.ones((4, 4))) for mask in parts.layers]
    _show(axes["source"], rows[0], "Row 0, source: inverted and back")
    # The enlarged layer's mask is no longer where its coin was.
    for mask, colour in zip(masks[1:3], _COLOURS[1:3], strict=True):
        axes["source"].contour(mask, [0.5], colors=colour, linewidths=2.2)
    _outline(axes["source"], _FACE, _COLOURS[0])
    _draw_layers(axes["lifted"], rows[3:], masks)
    _show(axes["background"], rows[1], "Row 1, background: hardly repaired")
    axes["background"].contour(
        np.kron(parts.remove[0, 0].numpy(), np.ones((4, 4))), [0.5], colors="white", linewidths=1
    )
    _show(axes["canvas"], canvas, "Row 2, canvas: layers pasted in order")
    _draw_keys(axes["keys"], parts.remove, rows[0])
    _draw_order(axes["order"], canvas, other)
    _draw_steps(axes["steps"], outside, hole)
    figure.suptitle(
        "DesignEdit with a random tiny UNet (no trained weights): lifting, moving and covering work, "
        "but only a trained one repairs the holes",
        fontsize=15,
        x=0.01,
        ha="left",
    )
    figure.savefig(picture, dpi=100)
    plt.close(figure)
    last = _SETTINGS.blend_steps.stop - 1
    return {
        "setting": f"random tiny SDXL UNet, latents are {_CELLS} x {_CELLS} pixels, {_SETTINGS.steps} steps, "
        f"{len(edited.latents)} rows",
        "source row against the photograph": f"mean difference {source_error:.4f} of a range of 2",
        "background against source outside the mask": f"{max(outside[:last]):g} up to step {last}, "
        f"{outside[-1]:.3f} at the end",
        "background against source inside it": f"mean {hole[last - 1]:.3f} at step {last}",
        "pictures inverted": f"{len(edited.trajectory.keys)} for {len(parts.pictures)} in the plan; "
        f"{len(reordered.trajectory.keys) - len(edited.trajectory.keys)} more for the second edit",
        "two edits took": f"{seconds:.0f} s",
    }


def _photographs() -> tuple[np.ndarray, np.ndarray]:
    """Coins and a cat, (218, 218, 3) uint8."""
    try:
        from skimage import data
    except ImportError as error:
        raise MissingExtra("scikit-image", "compare") from error
    coins = np.repeat(data.coins()[85:303, 166:384, None], 3, 2)
    return coins, np.ascontiguousarray(data.chelsea()[40:258, 90:308])


def _oval(x: float, y: float, width: float, height: float) -> Polygon:
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    return Polygon(tuple((float(x + width * np.cos(a)), float(y + height * np.sin(a))) for a in angles))


def _outline(ax: Axes, oval: tuple[int, int, int, int], colour: str) -> None:
    points = np.array(_oval(*oval).points) * 4 * _CELLS / 218
    ax.plot(*np.concatenate([points, points[:1]]).T, color=colour, linewidth=2.2)


def _show(ax: Axes, image: np.ndarray, title: str) -> None:
    ax.imshow(image)
    ax.set_title(title, fontsize=10)
    ax.set_axis_off()


def _draw_layers(ax: Axes, rows: list[np.ndarray], masks: list[np.ndarray]) -> None:
    """Each layer's row cut out by its mask, the lowest at the back."""
    side = masks[0].shape[0]
    ax.set_title("Rows 3 to 6: the layers", fontsize=10)
    for i, (row, mask, colour, name) in enumerate(zip(rows, masks, _COLOURS, _NAMES, strict=True)):
        ys, xs = np.nonzero(mask > 0.5)
        box = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
        cut = np.dstack([row[box], (mask[box] * 255).astype(np.uint8)])
        x, y = (i % 2 + 0.5) * side / 2, (i // 2 + 0.45) * side / 2
        half = 0.17 * side
        ax.imshow(cut, extent=(x - half, x + half, y + half, y - half))
        ax.text(x, y + half + 6, f"{i + 1} {name}", color=colour, ha="center", va="top", fontsize=11, fontweight="bold")
    ax.set(xlim=(0, side), ylim=(side, 0), aspect="equal")
    ax.set_axis_off()


def _draw_keys(ax: Axes, remove: Tensor, source: np.ndarray) -> None:
    """How much of each key is left where the UNet attends."""
    side = _CELLS // 4
    blanked = resized_mask(remove, (side, side))[0, 0].numpy()
    ax.imshow(source, extent=(0, side, side, 0), alpha=0.55)
    drawn = ax.imshow(blanked, cmap="inferno", alpha=blanked * 0.85, extent=(0, side, side, 0), vmin=0, vmax=1)
    ax.set_title(f"Share of a key that is blanked, {side} x {side} tokens", fontsize=10)
    ax.set_axis_off()
    plt.colorbar(drawn, ax=ax, shrink=0.75, pad=0.01)


def _draw_order(ax: Axes, first: np.ndarray, second: np.ndarray) -> None:
    """Where layers 1 and 2 overlap, in both orders."""
    window = slice(80, 200), slice(6, 166)
    ax.imshow(np.concatenate([first[window], np.full((8, 160, 3), 255, np.uint8), second[window]]))
    for y, text in ((9, "2 above 1"), (137, "1 above 2")):
        ax.text(6, y, text, color="white", va="center", fontsize=12, fontweight="bold", bbox={"facecolor": "black"})
    ax.set_title("The last of the list is on top", fontsize=10)
    ax.set_axis_off()


def _draw_steps(ax: Axes, outside: list[float], hole: list[float]) -> None:
    k = np.arange(1, len(hole) + 1)
    paste = _SETTINGS.blend_steps.stop
    ax.plot(k, hole, color="#D55E00", linewidth=2.4)
    ax.plot(k, outside, color="#0072B2", linewidth=2.4)
    top = max(*hole, *outside)
    bold = {"fontsize": 12, "fontweight": "bold", "ha": "right"}
    ax.text(24, hole[24] + 0.05 * top, "under the mask (mean)", color="#D55E00", **bold)
    ax.text(paste - 1, 0.03 * top, f"outside it (largest): exactly 0 up to step {paste - 1}", color="#0072B2", **bold)
    windows = (
        ("keys blanked", _SETTINGS.mask_steps.start + 1, _SETTINGS.mask_steps.stop, "#555555"),
        ("background blended with the source", 1, paste - 1, "#8a8a8a"),
        ("seams settle", paste + 1, len(hole), "#56B4E9"),
    )
    for i, (name, start, end, colour) in enumerate(windows):
        y = top * (1.1 + 0.1 * min(i, 1))
        ax.add_patch(Rectangle((start - 0.5, y), end - start + 1, 0.08 * top, color=colour))
        ax.text((start + end) / 2, y + 0.04 * top, name, color="white", ha="center", va="center", fontsize=9)
    ax.axvline(paste, color="black", linewidth=1.2, linestyle="--")
    ax.text(paste + 0.4, 0.5 * top, f"paste, step {paste}", fontsize=11)
    ax.set(xlim=(0.5, len(hole) + 0.5), ylim=(-0.02 * top, 1.32 * top), xlabel="denoising step")
    ax.set_title("How far the background row is from the source row", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
