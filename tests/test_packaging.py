"""What the installed package promises: a light import, types, one version, every file it needs."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import heed

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Modules of the extras, and matplotlib and timm, which are needed by pictures and by models only.
HEAVY = (
    "accelerate",
    "datasets",
    "jinja2",
    "matplotlib",
    "pandas",
    "PIL",
    "psutil",
    "ray",
    "skimage",
    "sklearn",
    "timm",
    "torchmetrics",
    "torchvision",
    "transformers",
)


def _loaded_by(statements: str) -> set[str]:
    program = f"import sys\n{statements}\nprint(*sys.modules)"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_import_is_light() -> None:
    assert not _loaded_by("import heed") & set(HEAVY)


def test_models_and_layers_need_no_extra() -> None:
    """What is not among the dependencies must not be imported by creating things by name."""
    names = "import heed; heed.create_layer('hilo', 8, 2, (4, 4)); heed.create_model('vit_micro')"
    extras = {"accelerate", "datasets", "pandas", "psutil", "ray", "skimage", "sklearn", "torchmetrics", "transformers"}
    assert not _loaded_by(names) & extras


def test_one_version() -> None:
    assert importlib.metadata.version("heed") == heed.__version__


def test_types_are_shipped() -> None:
    assert (Path(heed.__file__).parent / "py.typed").is_file()


def test_public_names_exist_and_are_documented() -> None:
    for name in heed.__all__:
        assert getattr(heed, name).__doc__, name


@pytest.mark.parametrize("extra", ["compare", "ray"])
def test_the_extras_of_the_readme_exist(extra: str) -> None:
    assert extra in PROJECT["optional-dependencies"]
