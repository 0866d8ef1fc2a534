"""The launcher with two real processes: the run of one, one common step at a signal, ranks that fail, exit codes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.runs import checkpoint
from fastmoco.runs.lines import read_lines

ROOT = Path(__file__).parent.parent
SMALL = "--width 0.125 --batch-size 32 --bn-group 8 --queue-size 100 --crop-size 16 --no-knn --device cpu"
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with 128 noisy images in it."""
    (tmp_path / "images").mkdir()
    random = np.random.RandomState(0)
    for number in range(128):
        pixels = random.randint(0, 256, (5, 5, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((24, 24)).save(tmp_path / "images" / f"{number}.jpg")
    return tmp_path


def start(folder: Path, *argv: str, program: Sequence[str | Path] = (ROOT / "launch.py",)) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *program, *argv, *SMALL.split()],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return output


def test_two_ranks_give_the_run_of_one(folder):
    """Up to rounding, which training amplifies: two steps are compared. A different seed is the control."""
    states = {}
    for name, ranks, seed in (("one", "1", "0"), ("two", "2", "0"), ("other", "1", "1")):
        flags = ("--data", "images", "--out", name, "--stop-after", "2", "--log-every", "1", "--precision", "fp32")
        flags += ("--seed", seed)
        finish(start(folder, "--nproc", ranks, "pretrain", "demo", *flags))
        states[name] = checkpoint.load(checkpoint.latest(folder / name)).state
    assert states["one"].keys() == states["two"].keys()
    for name, value in states["one"].items():
        torch.testing.assert_close(states["two"][name].float(), value.float(), rtol=0, atol=1e-3, msg=name)
    assert (states["one"]["queue"] - states["other"]["queue"]).abs().max() > 0.1
    one, two = (read_lines(folder / name / "log.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2]
    assert all(abs(line["loss"] - other["loss"]) < 1e-5 for line, other in zip(one, two))
    assert json.loads((folder / "two/recipe.json").read_text())["ranks"] == 2


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run / "log.jsonl")]


SHORT = "pretrain demo --data images --stop-after 2 --log-every 1 --precision fp32"


def test_torchrun_and_two_machines_give_the_run_of_one_process(folder):
    """As docs/many-gpus.md writes them. The machines are two launchers of two ranks each, which meet on loopback."""
    finish(start(folder, *SHORT.split(), "--out", "one"))
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    finish(start(folder, *SHORT.split(), "--out", "torchrun", program=[*torchrun, ROOT / "launch.py"]))
    machines = start_machines(folder, *SHORT.split(), "--out", "four", nproc=2)
    output = [finish(machine) for machine in machines]
    assert sum("2 steps in" in each for each in output) == 1  # the first rank of all alone speaks
    for name, ranks in (("one", 1), ("torchrun", 2), ("four", 4)):
        assert json.loads((folder / name / "recipe.json").read_text())["ranks"] == ranks
        assert losses(folder / name) == pytest.approx(losses(folder / "one"), rel=1e-5), name


@pytest.mark.parametrize(
    ("harm", "machine", "code", "says"),
    [(signal.SIGKILL, 1, 1, "was killed by SIGKILL"), (signal.SIGSTOP, 1, 124, "was stopped")]
    + [(signal.SIGSTOP, 0, 124, "was stopped")],
    ids=["killed", "stopped", "stopped where the launchers meet"],
)
def test_a_rank_lost_on_one_machine_ends_the_job_on_both(harm, machine, code, says, folder):
    machines = start_machines(folder, "pretrain", "demo", *ENDLESS, "--timeout-seconds", "3")
    train_until(machines[0], folder / "run/log.jsonl", 4)
    lost = pid_of(machines[machine])
    os.kill(lost, harm)
    (other, said_there, more), (left, output, seconds) = (end_of(machines[each]) for each in (machine, 1 - machine))
    assert (left, other, seconds + more < LIMIT) == (1, code, True), (seconds, output, more, said_there)
    assert re.match(r"fastmoco: error: rank [01] .* failed: ", last_line(output))
    assert f"(process {lost} on " in last_line(said_there) and says in last_line(said_there)


def test_a_job_that_loses_a_machine_goes_on_with_the_ranks_that_are_left(folder):
    flags = (
        "--data",
        "images",
        "--out",
        "run",
        "--epochs",
        "1000",
        "--log-every",
        "2",
        "--save-minutes",
        "0",
        "--save-every",
        "4",
        "--stop-after",
        "200",
        "--timeout-seconds",
        "3",
    )
    restarts = ("--max-restarts", "1", "--rdzv-conf", "last_call_timeout=3")
    machines = start_machines(folder, *restarts, "pretrain", "demo", *flags, nnodes="1:2")
    log = folder / "run/log.jsonl"
    train_until(machines[0], log, 6)
    worker = pid_of(machines[1])
    for process in (machines[1].pid, worker):
        os.kill(process, signal.SIGKILL)
    machines[1].communicate()
    finish(machines[0])
    facts = json.loads((folder / "run/recipe.json").read_text())
    assert facts["ranks"] == 2 and [part["ranks"] for part in facts["resumed"]] == [1]
    assert [line["step"] for line in read_lines(log)] == list(range(2, 201, 2))


def listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("localhost", port)) == 0


def start_machines(folder: Path, *argv: str, nproc: int = 1, nnodes: str = "2") -> list[subprocess.Popen]:
    """Two launchers that meet on loopback, at the first one's."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    meet = f"--nproc {nproc} --nnodes {nnodes} --rdzv-backend c10d --rdzv-endpoint localhost:{port} --rdzv-id demo"
    machines = []
    for _ in range(2):
        machines.append(start(folder, *meet.split(), *argv))
        while not listens(port):
            assert machines[0].poll() is None
            time.sleep(0.1)
    return machines


def test_a_signal_to_the_launcher_stops_all_ranks_at_one_step(folder, quiet):
    flags = ("--data", "images", "--epochs", "1000", "--log-every", "2", "--out", "run")
    process = start(folder, "--nproc", "2", "pretrain", "demo", *flags)
    log, began = folder / "run/log.jsonl", time.monotonic()
    while len(read_lines(log)) < 2:
        assert process.poll() is None and time.monotonic() - began < 200
        time.sleep(0.2)
    ranks = [pid_of(process, rank) for rank in (0, 1)]
    process.send_signal(signal.SIGTERM)
    code, output, seconds = end_of(process)
    print(f"SIGTERM to the launcher of two ranks: {seconds:.2f} s wall clock")
    assert (code, seconds < (3 if quiet else LIMIT)) == (143, True), (code, seconds, output)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    newest = checkpoint.latest(folder / "run")
    step = checkpoint.load(newest).step
    assert step == read_lines(log)[-1]["step"] and f"saved after step {step}" in output
    flags += ("--resume", "--stop-after", str(step + 2))
    finish(start(folder, "--nproc", "2", "pretrain", "demo", *flags))
    assert checkpoint.load(checkpoint.latest(folder / "run")).step == step + 2


def test_a_mistake_that_the_ranks_find_is_said_once_and_exits_2(folder):
    (folder / "empty").mkdir()
    process = start(folder, "--nproc", "2", "pretrain", "demo", "--data", "empty", "--out", "run")
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 2, output
    assert output.count("no images in it") >= 1 and not (folder / "run").exists()


# Ranks that fail. Limits are seconds from the disturbance to the end of the job.

ENDLESS = ("--data", "images", "--out", "run", "--epochs", "1000", "--log-every", "2", "--save-minutes", "0")
READS = ("--decoded-cache", "0")  # every file in every epoch, so that one which is harmed meanwhile is met
LIMIT = 15


def train_until(process: subprocess.Popen, log: Path, step: int) -> None:
    began = time.monotonic()
    while not any(line["step"] >= step for line in read_lines(log)):
        assert process.poll() is None and time.monotonic() - began < 200
        time.sleep(0.1)


def pid_of(launcher: subprocess.Popen, rank: int | None = None) -> int:
    """The process of `rank`, or the launcher's only one."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    mark = b"\0RANK=" if rank is None else f"\0RANK={rank}\0".encode()
    return next(int(pid) for pid in children if mark in Path(f"/proc/{pid}/environ").read_bytes())


def end_of(process: subprocess.Popen) -> tuple[int, str, float]:
    began = time.monotonic()
    output = process.communicate(timeout=100)[0]
    return process.returncode, output, time.monotonic() - began


def last_line(message: str) -> str:
    return [line for line in message.splitlines() if line.startswith("fastmoco: error: ")][-1]


def test_a_killed_rank_ends_the_job_and_is_named(folder):
    process = start(folder, "--nproc", "2", "pretrain", "demo", *ENDLESS)
    train_until(process, folder / "run/log.jsonl", 4)
    os.kill(pid_of(process, 1), signal.SIGKILL)
    code, output, seconds = end_of(process)
    assert (code, seconds < LIMIT) == (1, True), (code, seconds, output)
    assert re.match(r"fastmoco: error: rank 1 \(process \d+ on .*\) was killed by SIGKILL", last_line(output))


def test_a_hung_rank_ends_the_job_with_stacks_that_show_where(folder):
    """A file that never gives its bytes, as on a dead file server."""
    # Where nothing is compiled yet, the first step takes longer than the watchdog below waits.
    finish(start(folder, "pretrain", "demo", "--data", "images", "--out", "first", "--stop-after", "1"))
    process = start(
        *(folder, "--nproc", "2", "pretrain", "demo"),
        *(*ENDLESS, *READS, "--timeout-seconds", "3", "--watchdog-seconds", "5"),
    )
    train_until(process, folder / "run/log.jsonl", 4)
    os.mkfifo(folder / "pipe")
    (folder / "pipe").rename(folder / "images/7.jpg")
    code, output, seconds = end_of(process)
    assert (code, seconds < LIMIT) == (124, True), (code, seconds, output)
    assert "made no progress for too long: its stacks are above" in last_line(output)
    assert "manifest.py" in output.split("the stacks of all threads follow")[1]  # where it waits for the file
    assert "Timed out waiting 3000ms" in output  # the other rank's side of it


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_ends_the_job_and_is_named(rank, folder):
    """SIGSTOP, as by a debugger or a suspended container: no thread of it runs, no watchdog and no handler."""
    process = start(folder, "--nproc", "2", "pretrain", "demo", *ENDLESS, "--timeout-seconds", "3")
    train_until(process, folder / "run/log.jsonl", 4)
    ranks = [pid_of(process, each) for each in (0, 1)]
    os.kill(ranks[rank], signal.SIGSTOP)
    code, output, seconds = end_of(process)
    assert (code, seconds < LIMIT) == (124, True), (code, seconds, output)
    assert re.match(rf"fastmoco: error: rank {rank} \(process {ranks[rank]} on .*\) was stopped", last_line(output))
    assert re.search("Timed out waiting 3000ms|Connection closed by peer", output)  # the other rank's side of it
    assert not any(Path(f"/proc/{each}").exists() for each in ranks)


def test_a_rank_that_raises_ends_the_job_with_its_own_exit_code(folder):
    process = start(folder, "--nproc", "2", "pretrain", "demo", *ENDLESS, *READS, "--no-quarantine")
    train_until(process, folder / "run/log.jsonl", 4)
    (folder / "images/7.jpg").write_bytes(b"this was a JPEG")
    code, output, seconds = end_of(process)
    assert (code, seconds < LIMIT) == (3, True), (code, seconds, output)
    assert "7.jpg" in output and re.match(r"fastmoco: error: rank [01] \(.*\) failed: exit code 3", last_line(output))


def test_with_restarts_a_killed_rank_costs_time_and_nothing_else(folder):
    flags = (
        "--data",
        "images",
        "--epochs",
        "1000",
        "--stop-after",
        "60",
        "--log-every",
        "2",
        "--save-minutes",
        "0",
        "--save-every",
        "4",
        "--out",
    )
    finish(start(folder, "--nproc", "2", "pretrain", "demo", *flags, "whole"))
    process = start(folder, "--nproc", "2", "--max-restarts", "1", "pretrain", "demo", *flags, "run")
    train_until(process, folder / "run/log.jsonl", 6)
    os.kill(pid_of(process, 1), signal.SIGKILL)
    output = finish(process)
    assert "resumed after step" in output
    one, other = (checkpoint.load(checkpoint.latest(folder / name)) for name in ("whole", "run"))
    assert one.step == other.step == 60
    assert [name for name in one.state if not torch.equal(one.state[name], other.state[name])] == []
    assert [line["step"] for line in read_lines(folder / "run/log.jsonl")] == list(range(2, 61, 2))


def test_a_signal_to_one_rank_alone_stops_the_run(folder, quiet):
    process = start(folder, "--nproc", "2", "pretrain", "demo", *ENDLESS)
    train_until(process, folder / "run/log.jsonl", 4)
    ranks = [pid_of(process, rank) for rank in (0, 1)]
    os.kill(ranks[1], signal.SIGUSR1)
    code, output, seconds = end_of(process)
    print(f"SIGUSR1 to one rank of two: {seconds:.2f} s wall clock")
    assert (code, seconds < (3 if quiet else LIMIT)) == (143, True), (code, seconds, output)
    assert checkpoint.load(checkpoint.latest(folder / "run")).step == read_lines(folder / "run/log.jsonl")[-1]["step"]
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
