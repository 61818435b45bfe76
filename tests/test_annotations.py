"""The shapes that public signatures promise, checked while the code runs.

jaxtyping's import hook makes beartype check every annotated call in heed. It has to be installed before heed is
imported, so each check is a small program in a process of its own, and a violation ends that program with an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

_SOURCE = Path(__file__).parents[1] / "src"
# The modules that promise shapes. In the others torch.library may have to read annotations from the bare function.
_MODULES = [
    ".".join(path.relative_to(_SOURCE).with_suffix("").parts)
    for path in sorted(_SOURCE.rglob("*.py"))
    if "from jaxtyping import" in path.read_text()
]

_BEFORE = """
import sys
import types
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeCallHintViolation, BeartypeDecorHintPep673Exception
from jaxtyping import install_import_hook

annotated = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for pyright

def check(function):
    try:
        return annotated(function)
    except BeartypeDecorHintPep673Exception:  # Self, which needs the whole class
        return function

checker = sys.modules["checker"] = types.ModuleType("checker")
checker.check = check
with install_import_hook(sys.argv[1].split(","), "checker.check"):
    import heed
    from heed.catalogue import load_rooms

    load_rooms()

import pytest
import torch
from heed.layers.registry import layers
from heed.engine.patterns import Causal, Full, Neighborhood, Selected, Window

torch.manual_seed(0)
wrong = pytest.raises((BeartypeCallHintViolation, TypeError), match="(?s)hint|parameter|Float")
"""


def _run(body: str) -> None:
    program = _BEFORE + textwrap.dedent(body)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, ",".join(_MODULES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]


def test_attend() -> None:
    _run(
        """
        kept = torch.randint(0, 4, (2, 4, 4, 2))
        grid = Neighborhood((8, 8), 3)
        q = torch.randn(2, 4, 64, 8, requires_grad=True)
        k, v = torch.randn(2, 2, 64, 8, requires_grad=True), torch.randn(2, 2, 64, 6, requires_grad=True)
        key_mask = torch.rand(2, 64) > 0.2
        for backend in ("reference", "sdpa", "tiled"):
            for pattern, bias in (
                (Full(), None),
                (Causal() & Window(9), torch.randn(4, 64, 64)),
                (grid, heed.RelativeBias(torch.randn(4, 5, 5))),
                (grid, heed.RelativeLogits((torch.randn(2, 4, 64, 5),) * 2, (2, 2))),
                (Selected(kept, (16, 16)), None),
            ):
                for options in (
                    {}, {"bias": bias, "key_mask": key_mask}, {"scale": torch.rand(4, 1, 1) + 0.5}, {"scale": 0.3}
                ):
                    out = heed.attend(q, k, v, pattern, backend=backend, **options)
                    assert out.shape == (2, 4, 64, 6)
                    out.sum().backward()
        with wrong:
            heed.attend(q, k[:, :, :32], v, Full())  # fewer keys than values
        with wrong:
            heed.attend(q, k, v, Full(), key_mask=key_mask[:, :32])
        with wrong:
            heed.attend(q[0], k, v, Full())
        """
    )


def test_every_layer() -> None:
    _run(
        """
        for name in layers.names():
            layer = heed.create_layer(name, 16, 2, (4, 4))
            x = torch.randn(2, 4, 4, 16, requires_grad=True)
            y = layer(x)
            assert y.shape == x.shape, name
            y.sum().backward()
            assert x.grad.isfinite().all(), name
            with pytest.raises((ValueError, TypeError, BeartypeCallHintViolation)):
                layer(torch.randn(2, 4, 4, 12))
            with wrong:
                layer(torch.randint(0, 9, (2, 4, 4, 16)))  # not floating point
        """
    )


def test_small_models() -> None:
    _run(
        """
        from heed.models import models
        from heed.vision.backbone import Backbone

        names = [name for name in models.names() if name.endswith("_micro")]
        assert {"vit_micro", "litv2_micro"} <= set(names)
        for name in names:
            settings = models.get(name).config
            model = heed.create_model(name, num_classes=5)
            if not isinstance(model, Backbone):
                continue
            side = getattr(settings, "img_size", 32)
            images = torch.randn(2, getattr(settings, "in_chans", 3), side, side)
            logits = model(images)
            assert logits.shape == (2, 5), name
            logits.sum().backward()
            assert len(model.forward_intermediates(images)[1]) == len(model.feature_info), name
            with pytest.raises((ValueError, TypeError, BeartypeCallHintViolation)):
                model(images[0])  # one image without a batch axis
        """
    )


def test_analyses() -> None:
    _run(
        """
        from heed.explain.attention import attention_map, layer_attention

        layer = heed.create_layer("neighborhood", 16, 2, (6, 6))
        assert layer_attention(layer, torch.randn(6, 6, 16), (2, 3)).shape == (6, 6)
        model = heed.create_model("vit_micro")
        assert attention_map(model, torch.randn(1, 8, 8), (0, 0)).shape == (4, 4)
        """
    )
