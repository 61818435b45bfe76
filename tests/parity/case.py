"""Golden cases: the authors' inputs, weights and outputs at a tiny size, and how a result is judged."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(os.environ.get("HEED_GOLDEN", Path(__file__).parents[1] / "golden"))


@dataclass(frozen=True, eq=False)
class Case:
    """One golden file. `tensors` holds input.*, state.*, rand.*, output.* and grad.*."""

    system: str
    name: str
    kind: str
    config: dict[str, Any]
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix`, without it: group("state") gives the weights by their authors' names."""
        start = f"{prefix}."
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.group("input")

    @property
    def state(self) -> dict[str, Tensor]:
        return self.group("state")

    def wanted(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.tensors.items() if key.startswith(("output.", "grad."))}


def find_cases(folder: Path = GOLDEN) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def read_case(path: Path) -> Case:
    meta = json.loads(path.with_suffix(".json").read_text())
    return Case(path.parent.name, path.stem, meta["kind"], meta["config"], meta, load_file(path))


def compare(case: Case, got: dict[str, Tensor]) -> None:
    """Every name the case holds, no other, and each within the case's tolerance."""
    wanted = case.wanted()
    assert sorted(got) == sorted(wanted), "missing or extra names"
    for name, want in wanted.items():
        have = got[name]
        tolerance = tolerance_of(case.meta, name)
        assert have.shape == want.shape, f"{name}: shape {tuple(have.shape)}, wanted {tuple(want.shape)}"
        if want.is_floating_point() and not case.meta.get("allow_inf"):
            assert torch.isfinite(want).all(), f"{name}: the case itself is not finite"
        torch.testing.assert_close(have.to(want.dtype), want, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def tolerance_of(meta: dict[str, Any], name: str) -> dict[str, float]:
    """rtol and atol of a tensor: a case may have others for gradients, and an atol for each of them."""
    found = meta["tolerance"]
    if name.startswith("grad."):
        found = meta.get("tolerance_grad", found)
    atol = found["atol"]
    return {"rtol": found["rtol"], "atol": atol[name] if isinstance(atol, dict) else atol}
