"""Code that executes attention under a pattern.

Each backend is a module with `refuse(call) -> str | None` (why it cannot run the call, or None) and
`run(call) -> Result`. The table below is the only place that knows them all; a new backend, such as hand-written Triton
kernels over the same plans, adds its module and one line.
"""

from __future__ import annotations

from types import ModuleType

from heed.engine.backends import flex, reference, sdpa, tiled

BACKENDS: dict[str, ModuleType] = {"reference": reference, "sdpa": sdpa, "tiled": tiled, "flex": flex}
