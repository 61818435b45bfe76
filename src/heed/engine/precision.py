"""Computing in float32 where half precision would lose what matters."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Operations on the device of x keep the precision of their inputs inside; autocast knows no meta device."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def at_least_float32(x: Tensor) -> torch.dtype:
    """float32 for half precision, and else the dtype of x."""
    return torch.promote_types(x.dtype, torch.float32)
