"""The python blocks of the pages run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Page -> whether its blocks build on each other; otherwise each block is a program of its own.
PAGES = {
    "README.md": False,
    "CONTRIBUTING.md": True,
    "docs/guide/engine.md": False,
    "docs/guide/layers.md": False,
    "docs/guide/models.md": False,
    "docs/guide/timm.md": False,
    "docs/guide/compare.md": False,
    "docs/guide/methods.md": True,
    "docs/guide/language.md": True,
}
_RUN = """
import sys
shared = {"__name__": "page"}
for block in sys.stdin.read().split("\\0"):
    names = shared if sys.argv[1] == "shared" else {"__name__": "page"}
    exec(compile(block, sys.argv[2], "exec"), names)
"""


def python_blocks(page: str) -> list[str]:
    """The blocks, padded with empty lines so that errors name the lines of the page."""
    text = (ROOT / page).read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str, tmp_path: Path) -> None:
    blocks = python_blocks(page)
    assert blocks
    command = [sys.executable, "-c", _RUN, "shared" if PAGES[page] else "apart", page]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        command, input="\0".join(blocks), capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_links_of_the_readme_lead_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            assert (ROOT / target).exists(), f"{page}: {target}"
