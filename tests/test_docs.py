"""The pages build as a site without a warning, and a link to what is not there is one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(find_spec("material") is None, reason="needs the extra docs")


def build(root: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The pages, and what they link to, in a folder of their own."""
    root = tmp_path / "tree"
    for folder in ("docs", "bench", "kernels", "fastmoco", "examples", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=ignored)
    for file in ("mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "launch.py"):
        shutil.copy(ROOT / file, root)
    return root


def test_every_page_is_built_and_links_lead_somewhere(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {path.parent.name for path in (tmp_path / "site").glob("*/index.html")} == pages - {"index"}
    shown = (tmp_path / "site/python/index.html").read_text()
    assert "fastmoco.load" in shown and "fonts.googleapis" not in shown and not (tmp_path / "site/links.py").exists()


@pytest.mark.parametrize("link", ["[gone](gone.md)", "[gone](../fastmoco/gone.py)"])
def test_control_a_link_to_nothing_ends_the_build(copy: Path, link: str) -> None:
    (copy / "docs/python.md").write_text(f"{(copy / 'docs/python.md').read_text()}\n{link}\n")
    done = build(copy, copy / "site")
    assert done.returncode == 1 and "gone" in done.stderr
