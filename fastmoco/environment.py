"""The circumstances of a number: versions, devices, cores, commit."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from fastmoco import __version__

PACKAGES = ("torch", "triton", "nvidia-dali-cuda130", "numpy", "pillow", "safetensors", "tyro")


SPIN = "5000"  # rounds of a waiting loop, 0.02 ms; GNU's OpenMP otherwise takes 300,000


def spin_briefly() -> None:
    """Make idle OpenMP threads sleep after about 0.02 ms. Call it before torch is imported; OMP_WAIT_POLICY wins.

    On free cores a step takes 4 % longer; beside one busy process, a third of the time (bench/NOTES.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_memory() -> None:
    """Let glibc keep memory that is freed, unless the environment tunes it (MALLOC_*, GLIBC_TUNABLES).

    It gives tensors of more than 32 MB back at once, and the next one costs a page fault for every 4 KiB: a sixth of a
    step of ResNet-50 at 224 px on a CPU (bench/NOTES.md), for a sixth more memory. Other C libraries stay as they are.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


def versions() -> dict[str, str]:
    """Version of Python, of this package and of each package that matters; "none" where one is not installed."""
    return {"fastmoco": __version__, "python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


CODE = ("--", ".", ":!bench/records", ":!docs", ":!*.md")  # of a checkout, as git names it


def commit() -> str:
    """Commit of the checkout this package runs from, with "+changes" where files differ, but for records and documents.

    Outside of one, in a copy of the files without their history, what FASTMOCO_COMMIT says, or "none".
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get("FASTMOCO_COMMIT") or "none"
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    return f"{head}+changes" if head != "none" and _git(root, "status", "--porcelain", "-uno", *CODE) else head


def moment() -> dict[str, object]:
    """What differs from run to run on one machine.

    torch's threads, OMP_NUM_THREADS (None where it is not set), time of day, and the load average of the last minute
    divided by the cores (None where the system keeps none).
    """
    import torch

    return {
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load": round(os.getloadavg()[0] / cores(), 2) if hasattr(os, "getloadavg") else None,
        "time": f"{datetime.now(timezone.utc):%H:%M} UTC",
    }


def command() -> str:
    """The command line of this process."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def describe() -> dict[str, object]:
    """Everything `env` prints: versions, commit, processor, cores, memory, GPUs."""
    import torch

    facts: dict[str, object] = {**versions(), "commit": commit(), "platform": platform.platform()}
    facts["processor"] = processor()
    facts["cores"] = cores()
    facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    facts["cuda"] = torch.version.cuda or "none"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.total_memory / 2**30:.1f} GiB, {gpu.multi_processor_count} multiprocessors"
        facts[f"gpu{index}"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {size}"
    facts["dali_loads"] = _dali_loads()
    return facts


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores() -> int:
    """Cores for each of the processes that torchrun started on this machine, at least one."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def run(options) -> None:
    """`env`: print `describe()`, as JSON where asked."""
    facts = describe()
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        print(f"{name:<22}{value}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _git(root: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return result.stdout.strip() if result.returncode == 0 else "none"


def _dali_loads() -> str:
    try:
        import nvidia.dali  # noqa: F401  importing is the test
    except Exception as error:  # whatever it raises is what the user needs to read
        return f"no: {error}"
    return "yes"
