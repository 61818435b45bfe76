"""Keeping tables and plans that depend on a pattern and on sizes alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
T = TypeVar("T")


def kept(function: Callable[P, T]) -> Callable[P, T]:
    """Keep the results of a function of hashable arguments, as real tensors even while a model is being traced.

    Exporting runs code on fake tensors, and inference mode makes tensors that training refuses; one of those that was
    kept would poison every later call.
    """

    @lru_cache(maxsize=256)
    def real(*args: P.args, **kwargs: P.kwargs) -> T:
        with _disable_current_modes(), torch.inference_mode(False):
            return function(*args, **kwargs)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_dynamo_compiling():  # the compiler folds constants itself
            return function(*args, **kwargs)
        return real(*args, **kwargs)

    call.forget = real.cache_clear  # type: ignore[attr-defined]
    return call
