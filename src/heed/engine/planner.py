"""From a pattern to its plan: by boxes where it has axes, by blocks where it has not; static plans are kept."""

from __future__ import annotations

from collections.abc import Callable

import torch

from heed.engine.blocks import block_plan
from heed.engine.boxes import box_plan
from heed.engine.constants import kept
from heed.engine.pattern import Pattern
from heed.engine.plan import Plan


def _plan_for(pattern: Pattern, n: int, m: int, device: torch.device, batch: int = 1, heads: int = 1) -> Plan:
    """The plan of a pattern for n queries and m keys; static patterns get theirs once and keep it."""
    if pattern.static:
        return _static_plan(pattern, n, m, device)
    return block_plan(pattern, n, m, device, batch, heads)


# A plan depends on values, which a traced graph does not have.
plan_for: Callable[..., Plan] = torch.compiler.disable(  # type: ignore[assignment] - it returns what it is given
    _plan_for,
    reason="the tiled backend splits the graph where it makes its plan; with fullgraph=True use backend='sdpa'",
)


@kept
def _static_plan(pattern: Pattern, n: int, m: int, device: torch.device) -> Plan:
    axes = pattern.axes(n, m)
    if axes is None:
        return block_plan(pattern, n, m, device)
    plan = box_plan(axes, n, m)
    return Plan(n, m, tuple(group.to(device) for group in plan.groups), plan.empty)
