"""What needs no images runs where DALI is not installed: on a machine that only times or profiles the step."""

import subprocess
import sys

import pytest

WITHOUT_DALI = """
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("nvidia.dali", "nvidia.nvimgcodec")):
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
STEP = ["contrast.graph", "data.noise", "bench.profiler", "bench.command", "bench.gpu_check"]
BENCHES = ["bench.step", "bench.kernels", "bench.memory", "bench.scaling", "bench.train"]


@pytest.mark.parametrize(
    ("modules", "works"), [([*STEP, *BENCHES], True), (["data.loader"], False)], ids=["step", "control"]
)
def test_the_step_needs_no_dali(modules: list[str], works: bool) -> None:
    names = [f"fastmoco.{name}" for name in modules]
    result = subprocess.run([sys.executable, "-c", WITHOUT_DALI, *names], capture_output=True, text=True)
    assert (result.returncode == 0) == works, result.stderr
    assert works or "nvidia" in result.stderr
