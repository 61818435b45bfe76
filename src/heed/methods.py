"""Methods: training-free changes of a host model, applied and undone again.

    with heed.apply(model, method):          or          handle = heed.apply(model, method); ...; handle.remove()
        model.generate(...)

Afterwards the host is bit for bit what it was. Methods stack: the one applied last acts outermost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

from torch import nn
from torch.utils.hooks import RemovableHandle

# What a method can be applied to: a model, or a class of models whose instances are yet to be made.
Host = nn.Module | type[nn.Module]

_ABSENT = object()


class Method(ABC):
    """A training-free change of a host model; settings are its arguments, state belongs to the handle."""

    @abstractmethod
    def attach(self, host: Any, handle: Handle) -> Any:
        """Change the host, telling `handle` how each change is undone.

        Returns:
            What the method keeps about this host (statistics, caches), readable as `handle.state`; None for nothing.

        Raises:
            TypeError: the method does not work on this kind of host.
            ValueError: a setting does not fit the host.
        """


class Handle:
    """A method that is applied to a host; leaving its `with` block, or `remove()`, undoes it.

    Attributes:
        method: what was applied.
        state: what the method keeps about this host.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.state: Any = None
        self._replaced: list[tuple[Any, str, Any, Any]] = []
        self._undo: list[Callable[[], object]] = []

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`; removal brings back what was there."""
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        # What is found there, not what was set: a function set on a class is found as it is in the class' dictionary.
        self._replaced.append((owner, name, before, vars(owner)[name]))
        self._undo.append(lambda: _put_back(owner, name, before))

    def hook(self, hook: RemovableHandle) -> None:
        """Keep a hook of torch until removal."""
        self._undo.append(hook.remove)

    def on_remove(self, undo: Callable[[], object]) -> None:
        """Call `undo` at removal; what was done last is undone first."""
        self._undo.append(undo)

    def remove(self) -> None:
        """Undo the method; a second call does nothing.

        Raises:
            ValueError: another method replaced the same part of the host after this one and is still applied.
        """
        for owner, name, _, ours in self._replaced:
            if vars(owner).get(name, _ABSENT) is not ours:
                raise ValueError(
                    f"{type(self.method).__name__} cannot be removed: {type(owner).__name__}.{name} was replaced again "
                    "after it; remove the methods that were applied later first"
                )
        self._replaced.clear()
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def apply(host: Host, method: Method) -> Handle:
    """Apply a method to a host model.

    Args:
        host: a model; or a class of models, where the method says that it changes classes.
        method: what to do to it.

    Returns:
        A handle, which is also a context manager: leaving the block undoes the method.

    Raises:
        TypeError: not a method, or the method does not work on this kind of host.
        ValueError: a setting does not fit the host. The host is then as it was.
    """
    if not isinstance(method, Method):
        raise TypeError(f"{method!r} is not a method; give an instance of a heed.Method")
    if not (isinstance(host, nn.Module) or (isinstance(host, type) and issubclass(host, nn.Module))):
        raise TypeError(f"a method is applied to a torch module, not to {type(host).__name__}; pass the model itself")
    handle = Handle(method)
    try:
        handle.state = method.attach(host, handle)
    except BaseException:
        handle.remove()
        raise
    return handle


def _put_back(owner: Any, name: str, before: Any) -> None:
    if before is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, before)
