"""State made of tensors, in dataclasses, lists and dictionaries: how many bytes it holds, and changes to all of it.

bytes = sum over distinct storages s of size(s)      a view counts with the whole storage that it keeps alive
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def tensors_in(thing: Any) -> Iterator[Tensor]:
    """All tensors in nested dataclasses, lists, tuples and dictionaries, in order; other things hold none."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors_in(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        yield from tensors_in([getattr(thing, field.name) for field in dataclasses.fields(thing)])


def map_tensors(thing: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested thing with every tensor changed; a tensor that occurs twice is changed once and stays shared."""
    done: dict[int, Tensor] = {}

    def walk(part: Any) -> Any:
        if isinstance(part, Tensor):
            if id(part) not in done:
                done[id(part)] = change(part)
            return done[id(part)]
        if isinstance(part, dict):
            return {key: walk(value) for key, value in part.items()}
        if isinstance(part, list | tuple):
            return type(part)(walk(value) for value in part)
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            values = {field.name: walk(getattr(part, field.name)) for field in dataclasses.fields(part)}
            return dataclasses.replace(part, **values)
        return part

    return walk(thing)


def storage_nbytes(*things: Any) -> int:
    """Bytes of memory that the tensors in these things keep alive; what several share counts once."""
    sizes = {}
    for tensor in tensors_in(things):
        storage = tensor.untyped_storage()
        sizes[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def select_rows(thing: Any, batch: int, rows: Tensor) -> Any:
    """Take rows of the batch, the first dimension; tensors with one row for a whole batch stay as they are."""

    def change(tensor: Tensor) -> Tensor:
        return tensor.index_select(0, rows.to(tensor.device)) if tensor.shape[0] == batch else tensor

    return map_tensors(thing, change)


def repeat_rows(thing: Any, batch: int, repeats: int) -> Any:
    """Every row of the batch `repeats` times, one after the other."""
    return select_rows(thing, batch, torch.arange(batch).repeat_interleave(repeats))
