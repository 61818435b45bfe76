"""Plans: every query once, every kept pair visited, masks shared, made once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heed.engine.pattern import Pattern
from heed.engine.patterns import Blocks, Causal, Grouped, Halo, Neighborhood, Selected, Strided, Window
from heed.engine.plan import Plan
from heed.engine.planner import plan_for

CPU = torch.device("cpu")
STATIC = [
    (Window(20), 500),
    (Causal() & Window(33), 333),
    (Causal(), 700),
    (Neighborhood((20, 23), 5, (2, 1)), 460),
    (Blocks((7, 7), (3, 3), (28, 21)), 588),
    (Halo((16, 24), 8, 3), 384),
    (Grouped(torch.arange(300) % 7), 300),
    (Causal() & (Window(20) | Strided(50)), 500),
]


def visited(plan: Plan, heads: int = 1) -> Tensor:
    """(heads, n, m) how often each pair is scored with a finite mask."""
    counts = torch.zeros(heads, plan.n + 1, plan.m + 64, dtype=torch.long)
    for group in plan.groups:
        tokens = (group.keys[..., None] * group.key_block + torch.arange(group.key_block)).flatten(2)
        for h in range(heads):
            keys = tokens[h % len(tokens)]
            kept = torch.ones(group.tiles, group.tile, group.width, dtype=torch.long)
            if group.mask is not None:
                masks = group.mask[group.mask_of[h % len(group.mask_of)]]  # (T, slots, tile, width of a slot)
                kept = (masks == 0).transpose(1, 2).flatten(2).long()
            index = (group.queries[:, :, None].expand_as(kept), keys[:, None, :].expand_as(kept))
            counts[h].index_put_(index, kept, accumulate=True)
    return counts[:, : plan.n, : plan.m]


@pytest.mark.parametrize(("pattern", "n"), STATIC, ids=[str(p) for p, _ in STATIC])
def test_a_plan_visits_every_kept_pair_once(pattern: Pattern, n: int) -> None:
    assert torch.equal(visited(plan_for(pattern, n, n, CPU))[0], pattern.mask(n).long())


def test_a_chosen_plan_visits_every_kept_pair_once() -> None:
    pattern = Selected(torch.randint(-1, 5, (2, 3, 5, 3))) & Causal()
    plan = plan_for(pattern, 300, 300, CPU, 2, 3)
    assert torch.equal(visited(plan, 6).view(2, 3, 300, 300), pattern.mask(300, batch=2, heads=3).long())


def test_a_static_plan_is_made_once() -> None:
    assert plan_for(Window(5), 100, 100, CPU) is plan_for(Window(5), 100, 100, CPU)
    assert plan_for(Window(5), 100, 100, CPU) is not plan_for(Window(5), 101, 101, CPU)


def test_work_stays_near_the_density() -> None:
    for pattern, n in ((Window(128), 4096), (Neighborhood((56, 56), 7), 3136), (Blocks(64), 4096)):
        assert plan_for(pattern, n, n, CPU).work <= 5 * pattern.density(n)
    assert plan_for(Blocks(64), 4096, 4096, CPU).work == Blocks(64).density(4096)


def test_windows_are_read_in_place_and_share_masks() -> None:
    plan = plan_for(Window(128), 4096, 4096, CPU)
    interior = max(plan.groups, key=lambda group: group.tiles)
    assert interior.band is not None
    assert interior.rows is not None
    assert interior.mask is not None
    assert len(interior.mask) <= 5
