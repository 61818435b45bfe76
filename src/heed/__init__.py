"""heed: choose what a model pays attention to.

The public face: `attend` and `patterns` (the engine), `create_model` and `from_pretrained` (models by name),
`create_layer` (attention layers by name), `apply` (methods on host models) and `catalogue` (the 72 systems).
"""

import sys

from heed import catalogue
from heed.engine import patterns
from heed.engine.attend import attend
from heed.engine.bias import RelativeBias, RelativeLogits
from heed.layers.registry import create_layer
from heed.methods import Method, apply
from heed.models import create_model, from_pretrained

__all__ = [
    "Method",
    "RelativeBias",
    "RelativeLogits",
    "apply",
    "attend",
    "catalogue",
    "create_layer",
    "create_model",
    "from_pretrained",
    "patterns",
]
sys.modules["heed.patterns"] = patterns  # so that `from heed.patterns import Window` works as well

__version__ = "0.1.0"
