"""ZipCache on a photograph: its patches are the tokens of a cache, and what comes out of the cache is a picture again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from heed.demos.registry import Figures, demos, photograph
from heed.hosts.rules import AttentionCall
from heed.language.caches.rule import CacheRule
from heed.language.saliency import probe_saliency
from heed.language.zipcache import ZipCache

_HEIGHT, _WIDTH, _PATCH = 240, 360, 4
_CONTRAST = 5.0  # of the queries and keys: how sharply patches choose each other
_DETAIL = (slice(70, 180), slice(95, 260))  # what is shown enlarged
_SUMMED = ZipCache(saliency="accumulated", recent=1.0, random=0.0)  # every patch is a probe


@dataclass(frozen=True)
class _Cached:
    """A photograph that went through a cache: what comes back, its bytes, and how many times smaller that is."""

    name: str
    picture: Tensor
    error: float
    nbytes: int
    ratio: float
    layer: Any


@demos.register("34-zipcache")
def zipcache(picture: Path) -> Figures:
    """Draw which patches get attention, which are kept in 4 bits, and the photograph as four caches hold it."""
    photo = torch.from_numpy(photograph(_HEIGHT, _WIDTH))
    call = _attention(photo)
    begin = time.perf_counter()
    zipped = _through(photo, call, "ZipCache", ZipCache(seed=1))
    seconds = time.perf_counter() - begin
    caches = [
        _through(photo, call, "2 bits for all", ZipCache(salient_bits=2, regular=0.0)),
        zipped,
        _through(photo, call, "The same, ranked by summed attention", _SUMMED),
        _through(photo, call, "4 bits for all", ZipCache(regular=0.0)),
    ]
    queries = call.query.shape[2]
    every = [torch.arange(queries)]
    maps = {
        "Attention that each patch gets, summed up": probe_saliency(call, every, kind="accumulated"),
        "... divided by how many patches see it": probe_saliency(call, every),
        "... from 10 % of the queries, the probes": probe_saliency(call, [ZipCache(seed=1).probe_rows(queries, 0, 0)]),
    }

    figure = plt.figure(figsize=(15, 11.6), layout="constrained")
    axes = figure.subplots(3, 3)
    for ax, (title, saliency) in zip(axes[0], maps.items(), strict=True):
        _map(ax, saliency.mean(1)[0], title)
    _show(axes[1, 0], photo, "What goes in: 16-bit numbers")
    _kept(axes[1, 1], zipped, photo)
    _bars(axes[1, 2], caches)
    for ax, cached in zip(axes[2], (caches[0], caches[1], caches[3]), strict=True):
        _show(ax, cached.picture[_DETAIL], f"{cached.name}\n{cached.ratio:.1f} times smaller, {cached.error:.1f} dB")
    figure.suptitle(
        "ZipCache: the patches of a photograph as keys and values, read line by line\n", fontsize=17, x=0.01, ha="left"
    )
    figure.savefig(picture, dpi=90)
    plt.close(figure)
    return {
        "setting": f"{queries} patches of {_PATCH} x {_PATCH} pixels, one head per colour, float16",
        **{cached.name: f"{cached.nbytes:,} bytes, {cached.ratio:.2f}x, {cached.error:.1f} dB" for cached in caches},
        "compression": f"{seconds:.2f} s",
    }


def _attention(photo: Tensor) -> AttentionCall:
    """Patches look at the patches before them that are like them: (1, 3, N, 16) queries, keys and values per colour."""
    values = _to_tokens(photo)
    features = values - values.mean(2, keepdim=True)
    features = _CONTRAST * features / features.std()
    width = values.shape[-1]
    q, v = features.half(), values.half()
    return AttentionCall(nn.Identity(), 0, q, q, v, None, causal=True, scale=1 / width)


def _through(photo: Tensor, call: AttentionCall, name: str, method: ZipCache) -> _Cached:
    """Give keys and values to a cache, and see what it makes of the values."""
    rule = CacheRule()
    layer = method.layer(0, rule)
    layer.update(call.key, call.value)
    rule.after(call, call.value.transpose(1, 2))
    back = _to_pixels(layer.held.values.dequantise().float())  # type: ignore[union-attr]
    error = -10 * (back - photo).square().mean().log10().item()
    return _Cached(name, back, error, layer.nbytes, layer.full_nbytes / layer.nbytes, layer)


def _to_tokens(image: Tensor) -> Tensor:
    """(H, W, 3) -> (1, 3, N, p p)"""
    rows, columns = image.shape[0] // _PATCH, image.shape[1] // _PATCH
    return image.view(rows, _PATCH, columns, _PATCH, 3).permute(4, 0, 2, 1, 3).reshape(1, 3, rows * columns, -1)


def _to_pixels(tokens: Tensor) -> Tensor:
    """(1, 3, N, p p) -> (H, W, 3)"""
    grid = tokens.view(3, _HEIGHT // _PATCH, _WIDTH // _PATCH, _PATCH, _PATCH)
    return grid.permute(1, 3, 2, 4, 0).reshape(_HEIGHT, _WIDTH, 3)


def _show(ax: Axes, image: Tensor, title: str) -> None:
    ax.imshow(image.clamp(0, 1).numpy(), interpolation="nearest")
    ax.set_title(title, fontsize=12)
    ax.set_axis_off()


def _map(ax: Axes, saliency: Tensor, title: str) -> None:
    """Saliency (N,) by rank, so that maps of different size compare."""
    rank = saliency.argsort().argsort().float() / len(saliency)
    ax.imshow(rank.view(_HEIGHT // _PATCH, -1).numpy(), cmap="magma", interpolation="nearest")
    ax.set_title(title, fontsize=12)
    ax.set_axis_off()


def _kept(ax: Axes, cached: _Cached, photo: Tensor) -> None:
    """The photograph where all heads keep a patch in 4 bits, and darker the fewer do."""
    ids = cached.layer.held.keys.ids.long()
    share = torch.ones(*ids.shape[:2], cached.layer.seen).scatter(2, ids, 0.0).mean(1)
    light = share.view(_HEIGHT // _PATCH, 1, _WIDTH // _PATCH, 1).expand(-1, _PATCH, -1, _PATCH)
    _show(ax, photo * (0.12 + 0.88 * light.reshape(_HEIGHT, _WIDTH, 1)), "Patches kept in 4 bits (dark: 2 bits)")


def _bars(ax: Axes, caches: list[_Cached]) -> None:
    """Bytes of each cache by kind, beside the 16-bit one."""
    full = caches[0].layer.full_nbytes / 1024
    ax.barh(0, full, color="#999999")
    ax.text(full * 0.02, 0, "16 bits", va="center", color="white")
    kinds = {"codes": "#0072B2", "parameters": "#E69F00", "lists": "#D55E00"}
    for row, cached in enumerate(caches, 1):
        left = 0.0
        for kind, colour in kinds.items():
            size = cached.layer.parts()[kind] / 1024
            ax.barh(row, size, left=left, color=colour, label=kind if row == 1 else None)
            left += size
        ax.text(left + full * 0.02, row, f"{cached.name}: {cached.error:.1f} dB", va="center", fontsize=10)
    ax.invert_yaxis()
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    ax.set_title("Memory in KiB, and what is left of the picture", fontsize=12)
    ax.set(yticks=(), xlim=(0, full * 1.02))
    ax.spines[["top", "right", "left"]].set_visible(False)
