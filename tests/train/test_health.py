"""Warnings: one of a kind, not before the queue is full, not for a run that learns."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from fastmoco.contrast import backends
from fastmoco.contrast import dictionary as dictionary_module
from fastmoco.contrast import views as views_module
from fastmoco.contrast.step import Step
from fastmoco.options import Options
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS
from fastmoco.process.stop import StopRequest, stop_on_signal
from fastmoco.runs import checkpoint
from fastmoco.runs.lines import read_lines
from fastmoco.train.health import BAD_IN_A_ROW, ROLLBACKS, Health, NonFiniteError
from fastmoco.train.loop import Run

RECIPE = replace(PRESETS["demo"][1], queue_size=999, batch_size=100, bn_group=50)  # 5 in 1000 queries hit by chance
CHANCE = 0.5


def line(**changes: float) -> dict[str, float]:
    return {"step": 70, "epoch": 2.0, "queue_filled": 1.0, "spread": 0.8, "top5": 40.0, **changes}


def test_a_run_that_learns_gets_no_warning():
    health = Health(RECIPE)
    assert not any(health.warnings(line(top5=share), 10) for share in (3.0, 10.0, 90.0) for _ in range(10))


def test_collapsed_keys_are_warned_of_once():
    health = Health(RECIPE)
    assert health.warnings(line(spread=0.001, queue_filled=0.5), 10) == []
    [warning] = health.warnings(line(spread=0.001), 10)
    assert "collapsed at step 70" in warning and "0.001" in warning and warning.count("\n") == 0
    assert health.warnings(line(spread=0.001), 10) == []


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (CHANCE, 1), (1.9 * CHANCE, 1), (2.2 * CHANCE, 0)])
def test_accuracy_at_chance_is_warned_of_once_there_are_enough_queries(share, expected):
    health = Health(RECIPE)
    assert health.warnings(line(top5=share), 10) == []  # 1000 queries: 5 hits by chance, too few to judge
    warnings_seen = [warning for _ in range(20) for warning in health.warnings(line(top5=share), 10)]
    assert len(warnings_seen) == expected and all("at chance" in warning for warning in warnings_seen)


def test_a_batch_is_judged_after_its_first_epoch_and_the_warm_up():
    recipe = replace(PRESETS["simclr-cifar"][1], warmup_epochs=3.0)
    for epoch, expected in ((0.9, 0), (2.0, 0), (3.1, 1)):
        warnings_seen = [text for _ in range(20) for text in Health(recipe).warnings(line(epoch=epoch, top5=0.0), 100)]
        assert len(warnings_seen) == 20 * expected and all("in batches of this size" in text for text in warnings_seen)


def test_skipping_gives_up_only_where_nothing_is_finite_for_long():
    health = Health(RECIPE)
    assert all(health.skip(9, 1) for _ in range(50)) and health.skipped == 450
    assert all(health.skip(10, 0) for _ in range(BAD_IN_A_ROW // 10 - 1))
    assert not health.skip(10, 0)


STEPS, BAD = 9, 6
"""The spoiled step; the checkpoint before it is of step 4, and the interval that tells of it ends at step 7."""


@contextmanager
def spoiled(what: str, on_rank: int, rank: int) -> Iterator[None]:
    """Make the loss, its gradient or an input NaN in step BAD, the first time that it is trained, on one rank."""
    train, see, loss = Step.step, views_module.photometric, dictionary_module.info_nce
    state = {"spoil": False, "spoilt": False}

    def spoiling(self: Step, batch, lr: float):
        state["spoil"] = batch.step + 1 == BAD and rank == on_rank and not state["spoilt"]
        state["spoilt"] |= state["spoil"]
        return train(self, batch, lr)

    def seeing(*arguments, rows=None, **keywords):
        spoil = state["spoil"] and what == "input" and rows is None  # key crops have rows to go to
        return see(*arguments, rows=rows, **keywords) * (math.nan if spoil else 1)

    def losing(z_q, *arguments):
        if state["spoil"] and what == "gradient":
            z_q.register_hook(lambda gradient: gradient * math.nan)
        losses, ranks = loss(z_q, *arguments)
        return (losses * math.nan if state["spoil"] and what == "loss" else losses), ranks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "step", spoiling)
        patch.setattr(views_module, "photometric", seeing)
        patch.setattr(dictionary_module, "info_nce", losing)
        yield


def train(parallel: Parallel, recipe, images, out, what: str, on_rank: int, policy: str):
    """The summary of a run with one spoiled step, or the message of its error."""
    options = Options(
        data=images,
        out=out,
        device="cpu",
        threads=1,
        knn=False,
        log_every=7,
        save_every=4,
        save_minutes=0,
        stop_after=STEPS,
        on_nonfinite=policy,
    )
    with spoiled(what, on_rank, parallel.rank), stop_on_signal() as stop_request:
        run = Run(recipe, options, "custom", parallel)
        try:
            return run.train(stop_request)
        except NonFiniteError as error:
            return str(error)


def finite(path) -> bool:
    return all(value.isfinite().all() for value in checkpoint.load(path).state.values() if value.is_floating_point())


@pytest.mark.parametrize("on_rank", [0, 1])
@pytest.mark.parametrize(
    "what", ["loss", pytest.param("gradient", marks=pytest.mark.slow), pytest.param("input", marks=pytest.mark.slow)]
)
def test_a_step_that_is_not_finite_stops_both_ranks(what, on_rank, run_ranks, recipe, images, tmp_path):
    """Before its update, and naming the rank where that can be known."""
    out = tmp_path / "run"
    said = run_ranks(2, train, recipe, images, out, what, on_rank, "stop")
    who = "gradients" if what == "gradient" else f"the loss of rank {on_rank}"
    for message in said:
        assert f"{who} became infinite or NaN in step {BAD}, its update was left out" in message
    assert "last good checkpoint is of step 4" in said[0]
    newest = checkpoint.latest(out)
    assert newest.name == "step_00000004" and finite(newest)


def test_an_update_that_does_not_look_spoils_the_checkpoint(recipe, images, tmp_path, monkeypatch):
    """The control: SGD and the average in plain torch, and nobody who stops."""

    def careless(table, gradients, lr, momentum, decay, ema_momentum, *_, **__) -> None:
        for q, velocity, k, gradient in zip(table.q, table.velocity, table.k, gradients, strict=True):
            velocity.mul_(momentum).add_(gradient + decay * q)
            q.sub_(lr * velocity)
            k.lerp_(q, 1 - ema_momentum)

    for honest in (True, False):
        out = tmp_path / str(honest)
        train(Parallel(), recipe, images, out, "gradient", 0, "skip")
        assert finite(checkpoint.latest(out)) == honest
        monkeypatch.setattr(backends, "sgd_ema", careless)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_step_that_is_not_finite_can_be_left_behind(policy, recipe, images, tmp_path, capsys):
    out = tmp_path / "run"
    summary = train(Parallel(), recipe, images, out, "input", 0, policy)
    output = capsys.readouterr().err
    assert summary["steps"] == STEPS and summary["skipped_steps"] == (policy == "skip")
    assert summary["rollbacks"] == (policy == "rollback")
    assert checkpoint.latest(out).name == f"step_{STEPS:08d}" and finite(checkpoint.latest(out))
    assert f"loss of rank 0 became infinite or NaN in step {BAD}" in output
    assert ("its update was left out" if policy == "skip" else f"state after step 4, on with step {BAD + 1}") in output
    log = read_lines(out / "log.jsonl")
    assert [line["step"] for line in log] == [7, 9] and all(math.isfinite(line["loss"]) for line in log)


def test_two_ranks_go_back_together(run_ranks, recipe, images, tmp_path):
    summaries = run_ranks(2, train, recipe, images, tmp_path / "run", "loss", 1, "rollback")
    assert [summary["stopped"] for summary in summaries] == [False, False] and summaries[0]["rollbacks"] == 1
    assert finite(checkpoint.latest(tmp_path / "run"))


def test_a_rollback_before_the_first_checkpoint_goes_back_to_the_start(recipe, images, tmp_path, monkeypatch):
    """A NaN learning rate spoils the weights in step 1, which shows in step 2."""
    options = Options(
        data=images,
        out=tmp_path / "run",
        device="cpu",
        threads=1,
        knn=False,
        log_every=1,
        stop_after=3,
        on_nonfinite="rollback",
    )
    step = Step.step
    monkeypatch.setattr(Step, "step", lambda self, batch, lr: step(self, batch, math.nan if batch.step == 0 else lr))
    run = Run(recipe, options, "custom", Parallel())
    summary = run.train(StopRequest())
    assert summary["steps"] == 3 and summary["rollbacks"] == 1 and finite(checkpoint.latest(tmp_path / "run"))


def test_rollbacks_have_an_end(recipe, images, tmp_path, monkeypatch):
    options = Options(
        data=images,
        out=tmp_path / "run",
        device="cpu",
        threads=1,
        knn=False,
        log_every=1,
        stop_after=20,
        on_nonfinite="rollback",
    )
    loss = dictionary_module.info_nce
    monkeypatch.setattr(
        dictionary_module, "info_nce", lambda *arguments: [each * math.nan for each in loss(*arguments)]
    )
    with pytest.raises(NonFiniteError, match=f"in step {ROLLBACKS + 1}"):
        Run(recipe, options, "custom", Parallel()).train(StopRequest())
