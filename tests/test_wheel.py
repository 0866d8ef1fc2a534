"""The built package: a wheel holds every module, kernels and benchmarks among them, and runs far from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastmoco

ROOT = Path(__file__).parents[1]
FOLDERS, FILES = ("fastmoco", "kernels", "bench"), ("setup.py", "pyproject.toml", "README.md", "LICENSE", "launch.py")
pytestmark = [
    pytest.mark.skipif(find_spec("pip") is None or find_spec("setuptools") is None, reason="needs pip and setuptools"),
    pytest.mark.xdist_group("wheel"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree, built without a network."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(made)]
    home = {**os.environ, "HOME": str(made)}  # pip asks rustc for its version, which may write into the home
    done = subprocess.run(command, cwd=source, env=home, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = made.glob("*.whl")
    return path


def test_a_wheel_holds_every_module_under_its_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    modules = {f"fastmoco/{path.relative_to(ROOT / 'fastmoco')}" for path in (ROOT / "fastmoco").rglob("*.py")}
    for folder in ("kernels", "bench"):  # which stand at the top of the tree, behind links
        modules |= {f"fastmoco/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
    assert "fastmoco/kernels/cpu/loops.py" in modules and "fastmoco/bench/command.py" in modules
    assert modules - held == set() and "fastmoco/py.typed" in held
    assert {name.split("/")[0] for name in held} == {"fastmoco", f"fastmoco-{fastmoco.__version__}.dist-info"}


def test_the_package_is_described(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = f"fastmoco-{fastmoco.__version__}.dist-info"
        metadata = archive.read(f"{folder}/METADATA").decode()
        scripts = archive.read(f"{folder}/entry_points.txt").decode()
    assert f"\nVersion: {fastmoco.__version__}\n" in metadata and "Requires-Dist: torch" in metadata
    assert "fastmoco = fastmoco.__main__:start" in scripts


def test_the_containerfile_builds_from_what_is_there() -> None:
    """As far as that shows without building it: an instruction begins each line, sources exist, shells can parse."""
    text = (ROOT / "Containerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    words = {line.split()[0] for line in lines}
    assert words <= {"FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "VOLUME", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    for line in lines:
        kind, _, rest = line.partition(" ")
        if kind == "COPY" and not rest.startswith("--from"):
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), line
        elif kind == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)
        elif kind in ("ENTRYPOINT", "CMD"):
            assert json.loads(rest)
    ignored = (ROOT / ".dockerignore").read_text()
    assert all(f"!{name}" in ignored for name in (*FOLDERS, *FILES, "constraints.txt"))


@pytest.mark.slow
def test_installed_elsewhere_it_runs_from_another_folder(wheel: Path, images: Path, flags, tmp_path: Path) -> None:
    """In an environment that has the packages of this one, but not the checkout."""
    venv.create(tmp_path / "env", system_site_packages=True, symlinks=True)
    place = next((tmp_path / "env").glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    # The packages of the environment that runs this test, which need not be the system's.
    (place / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    def run(*words: str) -> str:
        command = [str(tmp_path / "env/bin/python"), "-m", "fastmoco", *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    code = "import fastmoco, fastmoco.bench.command, fastmoco.kernels; print(fastmoco.__file__)"
    place_of = subprocess.run(
        [tmp_path / "env/bin/python", "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert place_of.stdout.strip() == str(place / "fastmoco/__init__.py"), place_of.stderr
    run("pretrain", "demo", *flags, "--data", str(images), "--stop-after", "4", "--log-every", "2", "--no-knn")
    assert (folder / "runs/demo/summary.json").is_file()
