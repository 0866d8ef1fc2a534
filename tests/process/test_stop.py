"""Stop requests: the first is noted, an echo is none, the second ends the process; ranks agree."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastmoco.contrast.step import Step
from fastmoco.options import Options, Pretrain
from fastmoco.parallel import Parallel
from fastmoco.process import stop
from fastmoco.process.stop import EVERY, SIGNALS, StopRequest, Vote, stop_on_signal
from fastmoco.runs import checkpoint
from fastmoco.runs.lines import read_lines
from fastmoco.train import loop

ASKING = """
import os, signal, sys, time
from pathlib import Path
told, place, name, visit, number, *command = sys.argv[1:]
from fastmoco.cli import load, main
owner, visits = load(place), []
honest = getattr(owner, name)

def ask():
    Path(told).write_text(f"{time.monotonic()} {time.process_time()}")
    os.kill(os.getpid(), int(number))

def asking(*arguments, **keywords):
    visits.append(name)
    if len(visits) == int(visit):
        ask()
        time.sleep(0.1)
    return honest(*arguments, **keywords)

def stuck(*arguments):
    os.kill(os.getpid(), int(number))
    time.sleep(0.6)
    ask()
    time.sleep(60)

setattr(owner, name, stuck if visit == "twice" else asking)
sys.exit(main(command))
"""
"""A program that runs a command of ours and sends itself a signal at a visit of a function, noting both clocks."""

SITUATIONS = {  # where the signal comes, at which visit, and the step after which the run must have stopped
    "in the kNN before the first step": ("fastmoco.train.loop:Run", "_stop_between", 1, 0),
    "while the first batch is awaited": ("fastmoco.data.loader:Loader", "__next__", 1, 1),
    "in the first step": ("fastmoco.contrast.step:Step", "step", 1, 1),
    "in a later step": ("fastmoco.contrast.step:Step", "step", 3, 3),
    "while a line is logged": ("fastmoco.train.monitor:Monitor", "interval", 1, 4),
    "while a copy is made": ("fastmoco.train.saver:Saver", "_copy", 1, 5),
    "while the thread writes": ("fastmoco.train.saver:checkpoint", "_write", 1, None),
    "in a kNN between two steps": ("fastmoco.train.loop:Run", "_stop_between", 3, 5),
    "in the kNN after the last step": ("fastmoco.train.loop:Run", "_stop_between", 5, 6),
    "twice, in a step that is stuck": ("fastmoco.contrast.step:Step", "step", "twice", -1),
}
QUICK = {"in the first step", "while the thread writes"}


def wait_for(process: subprocess.Popen, told: Path) -> tuple[int, float, float]:
    """Exit code of a program that asks itself, and the seconds from the signal to its end: wall clock, processor."""
    _, status, used = os.wait4(process.pid, 0)
    end = time.monotonic()
    wall, processor = (float(clock) for clock in told.read_text().split())
    return os.waitstatus_to_exitcode(status), end - wall, used.ru_utime + used.ru_stime - processor


def left_of(session: int) -> list[str]:
    """Processes that a program which began this session has left."""
    return [path.name for path in Path("/proc").glob("[0-9]*") if session_of(path) == session]


def session_of(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    except OSError:
        return 0


@pytest.fixture(scope="module")
def compiled(flags, images, tmp_path_factory) -> None:
    """The loops of a CPU are compiled when they first run, some ten seconds that a signal has to wait for once."""
    out = tmp_path_factory.mktemp("compiled") / "run"
    command = ["pretrain", "demo", f"--data={images}", f"--out={out}", *flags, "--device=cpu", "--stop-after=1"]
    subprocess.run([sys.executable, "-m", "fastmoco", *command], check=True, capture_output=True)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    "situation", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SITUATIONS]
)
def test_a_signal_is_honoured_within_a_step_wherever_it_comes(situation, flags, images, quiet, tmp_path):
    """From the signal to the end of the process. The wall clock of a busy machine tells of the others."""
    place, name, visit, step = SITUATIONS[situation]
    number, out = SIGNALS[(list(SITUATIONS).index(situation) + 1) % 3], tmp_path / "run"
    command = [
        "pretrain",
        "demo",
        f"--data={images}",
        f"--out={out}",
        *flags,
        *"--device=cpu --threads=1 --knn-every=1 --log-every=4 --save-every=4 --stop-after=6 --save-minutes=0".split(),
    ]
    asking = [sys.executable, "-c", ASKING, tmp_path / "told", place, name, str(visit), str(int(number)), *command]
    process = subprocess.Popen(asking, start_new_session=True)
    code, wall, processor = wait_for(process, tmp_path / "told")
    print(f"{signal.Signals(number).name} {situation}: {wall:.2f} s wall clock, {processor:.2f} s of processor time")
    assert code == (stop.unsaved_code(number) if visit == "twice" else 143)
    assert processor < 3 and wall < (3 if quiet else 15) and left_of(process.pid) == []
    stopped_after(out, step)


def run_until_asked(parallel: Parallel, recipe, images, out, ranks: tuple[int, ...]) -> int:
    """Exit code of a run in which `ranks` are asked to stop in the third step. In a process made for it."""
    loop.Parallel.start = lambda _: parallel
    train = Step.step

    def asking(self, batch, lr):
        if batch.step == 2 and parallel.rank in ranks:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train(self, batch, lr)

    Step.step = asking
    options = Options(
        data=images, out=out, device="cpu", threads=1, knn=False, log_every=4, save_minutes=0, stop_after=6
    )
    return loop.run(Pretrain("custom", recipe, options))


@pytest.mark.parametrize("ranks", [(1,), *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in ((0,), (0, 1)))])
def test_a_signal_to_any_rank_stops_all_at_one_step(ranks, run_ranks, recipe, images, tmp_path):
    assert run_ranks(2, run_until_asked, recipe, images, tmp_path / "run", ranks) == [143, 143]
    stopped_after(tmp_path / "run", 3)


def stopped_after(out, step: int | None) -> None:
    """A checkpoint of that step is there, of any step for None, and none for -1."""
    newest = checkpoint.latest(out)
    assert (newest is None) == (step == -1)
    if step is not None and step >= 0:
        assert newest.name == f"step_{step:08d}"
    if step and step > 0:
        assert read_lines(out / "log.jsonl")[-1]["step"] == step
    assert not (out / "summary.json").exists() and not list(out.rglob("*.writing"))


def ask_twice(pause: float) -> None:
    with stop_on_signal():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        os._exit(7)


@pytest.mark.parametrize(("pause", "code"), [(0.1, 7), (0.7, 130)])
def test_a_second_signal_ends_the_process_and_an_echo_does_not(pause, code, in_fork):
    """A terminal and a launcher both pass on one Ctrl-C: that is one request."""
    assert in_fork(ask_twice, pause) == code


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_is_a_request_and_the_handlers_are_put_back(number):
    started_under = signal.signal(number, signal.SIG_DFL)  # nohup and a shell's background ignore some
    try:
        with stop_on_signal() as stop_request:
            assert not stop_request
            signal.raise_signal(number)
            assert stop_request and stop_request.signal == number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, started_under)


def vote(parallel: Parallel, every: int, wished_at: int, calls: int) -> tuple[list[int], int]:
    """Calls that returned a wish, and how many collectives that took; the second rank wishes once."""
    asked, plain = [], Parallel.mean

    def mean(self: Parallel, value: object) -> object:
        asked.append(1)
        return plain(self, value)

    Parallel.mean = mean
    ballot = Vote(parallel, every)
    answers = [ballot.cast(parallel.rank == 1 and call == wished_at, False) for call in range(calls)]
    Parallel.mean = plain
    assert not any(second for _, second in answers)
    return [call for call, (first, _) in enumerate(answers) if first], len(asked)


def test_one_ranks_wish_counts_for_all_at_one_step(run_ranks):
    assert run_ranks(2, vote, 1, 2, 4) == [([2], 4)] * 2


@pytest.mark.parametrize(("wished_at", "known_at"), [(0, 15), (7, 15), (8, 23), (14, 23)])
def test_ranks_on_gpus_vote_now_and_then_and_read_it_later(run_ranks, wished_at, known_at):
    """No wish is lost between two votes, all learn of it in the same step, and it counts once."""
    assert run_ranks(2, vote, EVERY, wished_at, 40) == [([known_at], 5)] * 2


def test_how_often_ranks_vote_follows_from_the_device():
    assert Vote(Parallel(world=2))._every == 1
    assert Vote(Parallel(world=2, device=torch.device("cuda", 0)))._every == EVERY


def test_an_echo_is_measured_from_the_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    exits = []
    monkeypatch.setattr(stop.os, "_exit", exits.append)
    stop_request = StopRequest()
    for moment, expected in ((100.0, []), (100.4, []), (100.6, [1])):
        now[0] = moment
        stop_request.receive(signal.SIGTERM, None)
        assert exits == expected  # 143 would say that it has saved
