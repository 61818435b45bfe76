"""Which backend `auto` takes, and why."""

from __future__ import annotations

from heed.engine.call import Call


def choose(call: Call) -> tuple[str, str]:
    """(backend name, reason) for a call."""
    if call.weights:
        return "reference", "the weights are asked for"
    return "reference", "first stone"
