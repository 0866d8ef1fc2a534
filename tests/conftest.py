"""What all tests share: the interpreter where there is no GPU, one thread, a device, forked ranks."""

import atexit
import functools
import importlib.util
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe

if "FASTMOCO_TEST_CACHES" not in os.environ:
    # Ours, Triton's, numba's, matplotlib's and torch's: in a folder of this session, which its child processes share.
    CACHES = os.environ["FASTMOCO_TEST_CACHES"] = tempfile.mkdtemp(prefix="fastmoco-tests-")
    places = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR")
    places += ("NUMBA_CACHE_DIR",)
    os.environ.update({name: str(Path(CACHES, name.lower())) for name in places})
    atexit.register(lambda owner: os.getpid() == owner and shutil.rmtree(CACHES, ignore_errors=True), os.getpid())
if not torch.cuda.is_available():
    # Triton reads this once, when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch._dynamo  # noqa: F401  forked ranks would each import it again, eight seconds at a time
import torch.distributed as dist

from fastmoco.parallel import Parallel

# How ranks are started. A torch that was built for CUDA starts threads of autograd, which do not survive a fork, also
# where there is no GPU.
START = "spawn" if torch.backends.cuda.is_built() else "fork"
torch.set_num_threads(1)  # the last bits of a sum depend on the number of threads


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one precision are for one worker: others would compile the same kernels again."""
    for item in items:
        precision = getattr(item, "callspec", None) and item.callspec.params.get("precision")
        if precision:
            item.add_marker(pytest.mark.xdist_group(precision))


def needs_dali(error: object) -> bool:
    """Whether a test could not be collected, or failed, because DALI is not installed: a GPU machine may lack it."""
    absent = importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None
    return absent and "No module named 'nvidia" in str(error)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """A file of tests that imports DALI is skipped where that is not installed."""
    report = yield
    if report.failed and needs_dali(report.longrepr):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, "Skipped: needs DALI")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """So is a test that imports it, or whose child process does."""
    report = yield
    if report.failed and call.excinfo is not None and needs_dali(report.longrepr):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, "Skipped: needs DALI")
    return report


@pytest.fixture(autouse=True)
def exact_fp32() -> Iterator[None]:
    """No TF32 in what kernels are compared with, whatever torch's defaults and the steps of earlier tests say."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: the GPU, or the interpreter on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def quiet() -> bool:
    """Whether whoever started the tests says (FASTMOCO_QUIET) that the machine does nothing else: wall clocks hold."""
    return "FASTMOCO_QUIET" in os.environ


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list]:
    """run_ranks(n, body, *args): body(parallel, *args) in n gloo ranks on the CPU; their results, by rank.

    Forked where torch was built for CPUs only, else spawned.

    A rank that raises, dies or takes longer than a minute fails the test, with its traceback.
    """
    return functools.partial(_run_ranks, tmp_path)


def _run_ranks(folder: Path, world: int, body: Callable, *args: object) -> list:
    folder = Path(tempfile.mkdtemp(dir=folder))
    context = torch.multiprocessing.get_context(START)
    ranks = [context.Process(target=_be_rank, args=(folder, rank, world, body, args)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    for process in ranks:
        if process.is_alive():
            process.kill()
            process.join()
    errors = [path.read_text() for path in sorted(folder.glob("error*"))]
    assert not errors, "\n".join(errors)
    assert [process.exitcode for process in ranks] == [0] * world
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(world)]


def _be_rank(folder: Path, rank: int, world: int, body: Callable, args: tuple) -> None:
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
        parallel = Parallel(rank, rank, world)
        torch.save(body(parallel, *args), folder / f"result{rank}")
        parallel.close()
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """40 training and 12 validation images of two classes: stripes that run down, stripes that run across."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.RandomState(0)
    for split, count in (("train", 20), ("val", 6)):
        for label in ("across", "down"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                height, width = random.randint(20, 40, 2)
                stripes = np.sin(np.arange(width) * random.uniform(0.5, 1.5)) * 80 + 128
                pixels = np.broadcast_to(stripes, (height, width)) + random.randn(height, width) * 10
                pixels = pixels.T if label == "across" else pixels
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")
                image.save(root / split / label / f"{number}.jpg")
    return root


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """Five steps an epoch, six epochs, a queue whose length is no multiple of the batch."""
    return replace(
        PRESETS["demo"][1],
        width=0.125,
        crop_size=16,
        batch_size=8,
        bn_group=4,
        queue_size=20,
        epochs=6,
        lr=0.05,
        knn_k=5,
    )


@pytest.fixture(scope="session")
def flags(recipe) -> list[str]:
    """The command line's way from the demo preset to `recipe`."""
    names = ("width", "crop_size", "batch_size", "bn_group", "queue_size", "epochs", "lr", "knn_k")
    return [f"--{name.replace('_', '-')}={getattr(recipe, name)}" for name in names]


@pytest.fixture
def in_fork(tmp_path: Path) -> Callable[..., int]:
    """in_fork(body, *args): exit code of body(*args) in a forked process, minus the signal where it was killed.

    What it says on stderr goes to tmp_path/said.
    """

    def run(body: Callable, *args: object) -> int:
        process = multiprocessing.get_context("fork").Process(target=_speaking_to, args=(tmp_path / "said", body, args))
        process.start()
        process.join(240)
        alive = process.is_alive()
        process.kill()
        assert not alive
        return process.exitcode

    return run


def _speaking_to(message: Path, body: Callable, args: tuple) -> None:
    os.dup2(os.open(message, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = open(2, "w", closefd=False)
    torch.set_num_threads(1)
    sys.exit(body(*args))
