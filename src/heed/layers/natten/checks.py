"""What the neighborhood functions demand of their arguments; every error names the axis and the numbers."""

from __future__ import annotations

from torch import Tensor

from heed.engine.patterns import Neighborhood

PerAxis = int | tuple[int, ...]
CausalPerAxis = bool | tuple[bool, ...]


def windows_on(
    layout: tuple[int, ...],
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: CausalPerAxis = False,
) -> Neighborhood:
    """The pattern of a window on a layout, or a ValueError that names the axis."""
    for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
        entries = value if isinstance(value, tuple | list) else (value,) * len(layout)
        if len(entries) != len(layout):
            raise ValueError(f"{name}={value} has {len(entries)} entries, the layout {layout} has {len(layout)} axes")
        for a, entry in enumerate(entries):
            if isinstance(entry, bool) or not isinstance(entry, int) or entry < 1:
                raise ValueError(f"{name}={value}: {entry!r} on axis {a} must be an integer >= 1")
    return Neighborhood(layout, kernel_size, dilation, stride, is_causal)


def check_rank(name: str, x: Tensor, rank: int, axes: str) -> None:
    """Raise unless x has `rank` token axes among its axes, which read e.g. "(batch, *layout, heads, width)"."""
    if x.ndim != rank + 3:
        raise ValueError(f"{name} {tuple(x.shape)} has {x.ndim} axes; {rank} axes of tokens make {rank + 3}: {axes}")


def check_same(name: str, x: Tensor, other_name: str, other: Tensor, axes: dict[int, str]) -> None:
    """Raise at the first of `axes` (number: meaning) on which x and the other tensor differ in size."""
    for a, meaning in axes.items():
        if x.shape[a] != other.shape[a]:
            raise ValueError(
                f"{name} {tuple(x.shape)} and {other_name} {tuple(other.shape)} differ in axis {a} ({meaning}): "
                f"{x.shape[a]} and {other.shape[a]}"
            )


def check_extra(
    keys: Tensor | None, values: Tensor | None, key: Tensor, value: Tensor, *, heads: int
) -> tuple[Tensor, Tensor] | None:
    """Both additional tensors, checked against key and value, or None without them. `heads` is their head axis."""
    if keys is None and values is None:
        return None
    if keys is None or values is None:
        given, missing = ("values", "keys") if keys is None else ("keys", "values")
        raise ValueError(f"additional_{given} are given without additional_{missing}; give both or neither")
    for name, extra, own in (("additional_keys", keys, key), ("additional_values", values, value)):
        check_extra_shape(name, extra, own, heads=heads)
    check_same("additional_values", values, "additional_keys", keys, {3 - heads: "tokens"})
    return keys, values


def check_extra_shape(name: str, extra: Tensor, own: Tensor, *, heads: int) -> None:
    """Raise unless the additional tokens have the batch, heads and width of `own`; their head axis is `heads`."""
    own_heads = own.shape[1] if heads == 1 else own.shape[-2]
    sizes = {0: own.shape[0], heads: own_heads, 3: own.shape[-1]}
    if extra.ndim != 4 or any(extra.shape[a] != size for a, size in sizes.items()):
        wanted = ", ".join("M" if a not in sizes else str(sizes[a]) for a in range(4))
        raise ValueError(f"{name} {tuple(extra.shape)} must be ({wanted}) to fit {tuple(own.shape)}")
