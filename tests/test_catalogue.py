"""The catalogue: all 72, and every built one complete."""

from __future__ import annotations

import importlib

import pytest

from heed.catalogue import ROOMS, system, systems
from heed.demos.registry import demos

BUILT = [entry.slug for entry in systems(built=True)]


def test_all_seventy_two_are_there() -> None:
    assert [entry.number for entry in systems()] == list(range(1, 73))
    assert len({entry.slug for entry in systems()}) == 72
    assert {entry.room for entry in systems()} <= set(ROOMS)
    assert all(entry.title and entry.paper for entry in systems())


def test_a_system_is_found_by_slug_name_and_number() -> None:
    assert system("23-hilo") is system("hilo") is system("23")
    assert system("4") is system("04") is system("halonet")


@pytest.mark.parametrize("slug", BUILT)
def test_a_built_system_has_documented_names_and_a_demo(slug: str) -> None:
    for name in system(slug).names:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, f"{name} has no docstring"
    assert slug in demos.names()
