"""The notebook runs from top to bottom, in a kernel of its own, and finds more after training than before."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples/own_folder.ipynb"


def test_it_is_kept_without_results() -> None:
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(cells) > 5 and not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    book = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        book, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    said = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.text for output in said if output.output_type == "stream" and output.text.startswith("{")]
    shares = {name: int(share.rstrip("%")) for name, share in ast.literal_eval(shown[-1]).items()}
    assert shares["trained"] > shares["untrained"] > 100 / 6, shares
    assert any("image/png" in output.get("data", {}) for output in said), "the contact sheet"
    assert (tmp_path / "runs/first/summary.json").is_file()
