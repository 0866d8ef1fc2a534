"""What all tests share: the interpreter where there is no GPU, one thread, a device, forked ranks."""

import functools
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # Triton reads this once, when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch._dynamo  # noqa: F401  forked ranks would each import it again, eight seconds at a time
import torch.distributed as dist

from fastmoco.parallel import Parallel

START = "spawn" if torch.cuda.is_available() else "fork"  # of ranks
torch.set_num_threads(1)  # the last bits of a sum depend on the number of threads


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one precision are for one worker: others would compile the same kernels again."""
    for item in items:
        precision = getattr(item, "callspec", None) and item.callspec.params.get("precision")
        if precision:
            item.add_marker(pytest.mark.xdist_group(precision))


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

    Forked, but where there is a GPU: autograd has started threads for it, and refuses to work in a fork.

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
