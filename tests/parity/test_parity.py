"""Every golden case through its system's adapter. HEED_GOLDEN=/some/dir runs another folder of cases."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from case import GOLDEN, compare, find_cases, read_case

CASES = find_cases()


def test_there_are_cases() -> None:
    assert CASES, f"no cases under {GOLDEN}"


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_case(path: Path) -> None:
    case = read_case(path)
    adapter = importlib.import_module(f"adapter_{case.system.replace('-', '_')}")
    compare(case, adapter.run(case))
