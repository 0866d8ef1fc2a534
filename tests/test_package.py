"""The package as others import it: a version, types, a light import, and kernels that static tools see."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import fastmoco
from fastmoco import environment

ROOT = Path(__file__).parents[1]


def test_the_version_is_said_once() -> None:
    assert environment.versions()["fastmoco"] == fastmoco.__version__
    assert (ROOT / "fastmoco" / "py.typed").is_file()


def test_importing_the_package_imports_no_torch_until_a_step_is_asked_for() -> None:
    code = "import sys, fastmoco; fastmoco.Recipe(); assert 'torch' not in sys.modules; "
    code += "fastmoco.Step; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'Stride'"):
        fastmoco.Stride


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs the extra lint")
def test_a_type_checker_knows_the_kernels(tmp_path: Path) -> None:
    """Through the link `fastmoco/kernels`. Without it every kernel was `Any`."""
    user = tmp_path / "user.py"
    user.write_text("from fastmoco.kernels.info_nce import info_nce\nreveal_type(info_nce)\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--cache-dir",
        str(tmp_path),
    ]
    done = subprocess.run([*command, str(user)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert "Tensor" in done.stdout.split("Revealed type", 1)[1].splitlines()[0], done.stdout + done.stderr
