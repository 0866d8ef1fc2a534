"""Imports go down only: each room imports itself and the rooms before it, and no two files import each other.

All imports count, wherever they stand: at the top of a file, inside a function, or for types alone.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room is a folder, or a file that stands beside the folders. `kernels` imports nothing of the others.
ORDER = (
    "kernels recipe presets recipe_file atomic plots terminal options usage environment parallel process encoder data "
    "contrast runs evaluate detection interop train page report bench cli calls completion __main__ launch"
).split()
HOMES = {"fastmoco": "fastmoco", "fastmoco.kernels": "kernels", "fastmoco.bench": "bench"}


def files(root: Path) -> dict[str, Path]:
    """Source files below `root` by the name of their module."""
    modules = {"launch": root / "launch.py"}
    for package, folder in HOMES.items():
        for path in (root / folder).rglob("*.py"):
            inner = path.relative_to(root / folder)
            if package != "fastmoco" or inner.parts[0] not in ("kernels", "bench"):  # links to the other two
                name = ".".join([package, *inner.with_suffix("").parts])
                modules[name.removesuffix(".__init__")] = path
    return modules


def graph(root: Path) -> dict[str, set[str]]:
    """The modules of the project that each of its modules imports; the bare package `fastmoco` is left out."""
    sources = files(root)
    edges = {name: imports_of(path.read_text(encoding="utf-8"), sources) for name, path in sources.items()}
    return {name: targets - {name, "fastmoco"} for name, targets in edges.items()}


def imports_of(source: str, modules: dict[str, Path]) -> set[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {module for module in (_module(name, modules) for name in names) if module}


def _module(name: str, modules: dict[str, Path]) -> str:
    """The longest beginning of `name` that is a module; of `package.module.function` that is `package.module`."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def room(module: str) -> str:
    """`fastmoco.data.plan` stands in `data`, `fastmoco.cli` in `cli`; what starts a program stands above all."""
    parts = module.split(".")
    if parts[-1] == "__main__":
        return "__main__"
    return parts[min(1, len(parts) - 1)]


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports of a room that comes later in ORDER."""
    height = {name: number for number, name in enumerate(ORDER)}
    return sorted(
        f"{module} imports {target}"
        for module, targets in edges.items()
        for target in targets
        if module != "fastmoco" and height[room(target)] > height[room(module)]
    )


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Modules that reach themselves, each with the others on its circle."""
    reach = {name: _reach(name, edges) for name in edges}
    modules = {
        frozenset(other for other in reach[name] if name in reach[other]) for name in edges if name in reach[name]
    }
    return sorted(" <-> ".join(sorted(group)) for group in modules)


def _reach(start: str, edges: dict[str, set[str]]) -> set[str]:
    visits: set[str] = set()
    ahead = list(edges[start])
    while ahead:
        name = ahead.pop()
        if name not in visits:
            visits.add(name)
            ahead += edges[name]
    return visits


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources in a folder of their own, for controls that change them."""
    for folder in set(HOMES.values()):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "records")
        )
    shutil.copy(ROOT / "launch.py", tmp_path)
    return tmp_path


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {room(module) for module in files(ROOT)} - {"fastmoco"}
    assert rooms == set(ORDER), "name a new room in ORDER, above what it imports and below what imports it"


def test_imports_go_down_only() -> None:
    assert upward(graph(ROOT)) == []


def test_no_two_files_import_each_other() -> None:
    assert circles(graph(ROOT)) == []


def test_kernels_import_nothing_of_the_trainer() -> None:
    outside = {name: targets for name, targets in graph(ROOT).items() if room(name) == "kernels"}
    assert {room(target) for targets in outside.values() for target in targets} == {"kernels"}


@pytest.mark.parametrize("where", ["at the top", "inside a function", "for types alone"])
def test_control_an_upward_import_is_seen(copy: Path, where: str) -> None:
    lines = {
        "at the top": "from fastmoco.train import loop\n",
        "inside a function": "def late():\n    from fastmoco.train import loop\n",
        "for types alone": "if TYPE_CHECKING:\n    from fastmoco.train import loop\n",
    }
    (copy / "kernels" / "stray.py").write_text(lines[where])
    assert upward(graph(copy)) == ["fastmoco.kernels.stray imports fastmoco.train.loop"]


def test_control_a_circle_is_seen(copy: Path) -> None:
    (copy / "bench" / "one.py").write_text("from fastmoco.bench import two\n")
    (copy / "bench" / "two.py").write_text("from fastmoco.bench.one import anything\n")
    assert "fastmoco.bench.one <-> fastmoco.bench.two" in circles(graph(copy))


def test_no_module_shadows_the_standard_library() -> None:
    """Python puts a script's own folder first on its path: `kernels/inspect.py` would break every import there."""
    import sys

    hidden = {path for path in files(ROOT).values() if path.stem in sys.stdlib_module_names}
    # `profile` is imported by `cProfile` alone, and never by torch.
    assert sorted(str(path.relative_to(ROOT)) for path in hidden if path.stem != "__main__") == []


def test_the_architecture_page_names_every_file_and_none_that_is_gone() -> None:
    import re

    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\(\.\./([\w/.]+)\)", page)
    assert [name for name in linked if not (ROOT / name).is_file()] == []
    sources = {str(path.relative_to(ROOT)) for path in files(ROOT).values() if path.name != "__init__.py"}
    assert sources - set(linked) - {"launch.py"} == set()
    assert {f"{room}/" for room in ("kernels", "bench", "data", "contrast", "train", "runs")} <= set(
        re.findall(r"[\w]+/", page)
    )
