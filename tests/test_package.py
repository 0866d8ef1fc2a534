"""The package as others import it: a version, types, a light import, and kernels that static tools see."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

import fastmoco
from fastmoco import environment

ROOT = Path(__file__).parents[1]


def test_the_version_is_said_once() -> None:
    assert environment.versions()["fastmoco"] == fastmoco.__version__
    assert (ROOT / "fastmoco" / "py.typed").is_file()


def test_the_folder_above_a_clone_finds_the_installed_package(tmp_path: Path) -> None:
    """There Python meets the clone's folder first, which has the package's name and is none."""
    if not any(metadata.distributions(name="fastmoco")):
        pytest.skip("it is not installed here")
    (tmp_path / "fastmoco" / "tests").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import fastmoco; print(fastmoco.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == fastmoco.__version__, done.stderr


def test_importing_the_package_imports_no_torch_until_a_step_is_asked_for() -> None:
    code = "import sys, fastmoco; fastmoco.Recipe(); assert 'torch' not in sys.modules; "
    code += "fastmoco.Step; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'Stride'"):
        fastmoco.Stride


def test_every_name_of_the_library_is_listed_and_explained() -> None:
    assert {"PRESETS", "Recipe", "Step", "embed", "kernels", "load"} <= set(dir(fastmoco))
    for name in set(dir(fastmoco)) - {"PRESETS"}:
        if not name.startswith("__"):
            assert inspect.getdoc(getattr(fastmoco, name)), name


def test_help_tells_a_stranger_what_to_do() -> None:
    """In a process of its own, because help may have imported torch, and `import fastmoco` must not."""
    pytest.importorskip("nvidia.dali")
    code = "import sys, fastmoco; assert 'torch' not in sys.modules; dir(fastmoco); assert 'torch' not in sys.modules; "
    done = subprocess.run(
        [sys.executable, "-c", code + "help(fastmoco)"], check=True, timeout=120, capture_output=True, text=True
    )
    first = done.stdout[:2500]
    assert all(word in first for word in ("fastmoco pretrain demo", "fastmoco.load(", "fastmoco.embed(", "docs/python"))
    assert "load(source: 'str | os.PathLike'" in done.stdout


def test_the_kernels_are_one_line_to_import() -> None:
    from fastmoco.kernels import __all__, batch_norm_act, ema, info_nce, nt_xent, photometric, sgd_ema

    for kernel in (batch_norm_act, ema, info_nce, nt_xent, photometric, sgd_ema):
        assert callable(kernel) and kernel.__name__ in __all__ and getattr(fastmoco.kernels, kernel.__name__) is kernel


def _public() -> list[tuple[str, Callable]]:
    names = [(name, getattr(fastmoco, name)) for name in fastmoco.__all__]
    names += [(name, getattr(fastmoco.kernels, name)) for name in fastmoco.kernels.__all__]
    return [(name, value) for name, value in names if callable(value)]


def test_docstrings_name_every_argument_and_what_is_raised() -> None:
    """Of what users call; ruff's rules D see to it that there is one. `impl` is told of once, for all kernels."""
    for name, value in _public():
        text = inspect.getdoc(value) or ""
        if isinstance(value, type):  # fields of data have a text below each, which a test of the recipe's help checks
            text += inspect.getsource(value)
        kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
        asked = [p.name for p in inspect.signature(value).parameters.values() if p.kind not in kinds]
        assert [each for each in asked if each != "impl" and not re.search(rf"\b{each}\b", text)] == [], name
        if not isinstance(value, type):
            assert "aises ValueError" in text or "aises UsageError" in text or "aises TypeError" in text, name


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
    result = subprocess.run([*command, str(user)], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert "Tensor" in result.stdout.split("Revealed type", 1)[1].splitlines()[0], result.stdout + result.stderr
