"""The proof sees what it is there to see: a graph that differs, runs that differ anyway, a host that waits."""

import dataclasses

import pytest
import torch
from tiny import TINY

from fastmoco.bench import proof
from fastmoco.bench.journal import Journal
from fastmoco.bench.proof import EAGER, EQUAL, GRAPH, OTHER, READ, REPEAT, REPLAYED, ProofError
from fastmoco.bench.record_files import Row
from fastmoco.contrast.graph import GraphStep
from fastmoco.contrast.step import Metrics
from fastmoco.data.batch import Batch
from fastmoco.recipe import Recipe

CPU = torch.device("cpu")
RECIPE = Recipe(**TINY)


# The origins of the crops are read by a memory bank alone, and the proof's recipe has a queue.
INPUTS = tuple(field.name for field in dataclasses.fields(Batch) if field.type == "Tensor" and field.name != "origins")


def proven(steps: int = 3) -> tuple[dict[str, float], dict[str, str]]:
    journal = Journal()
    rows = proof.run(RECIPE, CPU, rounds=steps, journal=journal)
    assert all(row.name == EQUAL and row.config["steps"] == steps for row in rows)
    return {row.provider: row.median for row in rows}, journal.failures


def test_a_replayed_run_is_the_eager_one_and_another_learning_rate_is_seen():
    actual, failures = proven()
    assert failures == {} and actual[EAGER] == actual[GRAPH] == actual[REPEAT] == 0 < actual[OTHER]


@pytest.mark.parametrize("inputs", [INPUTS, *((name,) for name in INPUTS)])
def test_a_graph_that_does_not_read_all_its_inputs_is_seen(inputs, monkeypatch):
    plain = GraphStep.step

    def step(graph: GraphStep, batch: Batch, lr: float) -> Metrics:
        stale = {name: getattr(graph._batch, name) for name in inputs}
        return plain(graph, dataclasses.replace(batch, **stale), lr)

    monkeypatch.setattr(GraphStep, "step", step)
    actual, failures = proven(2)
    assert actual[EAGER] == 0 < actual[GRAPH]
    assert "replayed steps are not the eager ones" in failures[f"{EQUAL}, deterministic on"]


def test_runs_that_differ_anyway_are_not_blamed_on_the_graph(monkeypatch):
    plain, runs = proof.train, []

    def unsteady(*args: object, **options: object) -> proof.Results:
        runs.append(0)
        return plain(*args, **options) | {"queue": torch.full((), float(len(runs)))}

    monkeypatch.setattr(proof, "train", unsteady)
    actual, failures = proven()
    assert actual[EAGER] == 1
    (why,) = failures.values()
    assert "two eager runs differ, so the question is not about graphs: 1 of" in why and "by 1 at most" in why


def test_differences_are_of_bits():
    a = {"zero": torch.tensor([0.0, 1.0]), "nan": torch.tensor(float("nan")), "count": torch.tensor([3])}
    assert proof.differences(a, {name: value.clone() for name, value in a.items()}) == ([], 0.0)
    other = a | {"zero": torch.tensor([-0.0, 1.5]), "count": torch.tensor([1])}
    assert proof.differences(a, other) == (["zero", "count"], 2.0)
    assert proof.differences(a, a | {"zero": torch.tensor([-0.0, 1.0])}) == (["zero"], 0.0)


def rows(**values: float) -> list[Row]:
    names = {"again": EAGER, "graph": GRAPH, "repeat": REPEAT, "other": OTHER, "replayed": REPLAYED, "read": READ}
    extra = {"compared": 7, "largest": 0.5, "calls": {"cudaStreamSynchronize": 1}}
    return [Row("x", names[name], "calls", (value,), extra=extra) for name, value in values.items()]


def test_a_blind_comparison_or_count_proves_nothing():
    proof.judge_equality(rows(again=0, graph=0, repeat=0, other=1))
    with pytest.raises(ProofError, match="the comparison is blind"):
        proof.judge_equality(rows(again=0, graph=0, repeat=0, other=0))
    with pytest.raises(ProofError, match="two replayed runs differ"):
        proof.judge_equality(rows(again=0, graph=0, repeat=1, other=1))
    proof.judge_waits(rows(replayed=0, read=6))
    with pytest.raises(ProofError, match="the loss was read 3 times, and 2 waits were seen"):
        proof.judge_waits(rows(replayed=0, read=2))
    with pytest.raises(ProofError, match="the host waits: .*cudaStreamSynchronize"):
        proof.judge_waits(rows(replayed=1, read=6))


@pytest.mark.parametrize(
    ("again", "repeat", "graph", "fails"),
    [
        (0.0, 0.0, 0.0, False),
        (0.0, 0.0, 1e-7, True),
        (0.1, 0.0, 0.9, False),
        (0.0, 0.1, 0.9, False),  # the two eager runs were alike by chance
        (0.1, 0.1, 1.1, True),
    ],
)
def test_where_runs_of_a_kind_may_differ_replays_may_not_stray_much_further(again, repeat, graph, fails):
    values = {EAGER: again, GRAPH: graph, REPEAT: repeat, OTHER: 5.0}
    rows = [Row("x", name, "x", (float(v > 0),), extra={"largest": v, "compared": 7}) for name, v in values.items()]
    if not fails:
        return proof.judge_equality(rows, exact=False)
    with pytest.raises(ProofError, match="not the eager ones|stray further"):
        proof.judge_equality(rows, exact=False)


@dataclasses.dataclass
class Waiting:
    """Stands for a step's metrics on a GPU: reading the loss waits."""

    calls: list[str]

    @property
    def loss(self) -> "Waiting":
        return self

    def item(self) -> None:
        self.calls += ["cudaStreamSynchronize", "Memcpy DtoH"]


@pytest.mark.parametrize("waiting", [False, True])
def test_waits_are_counted_beside_a_control(monkeypatch, waiting):
    calls: list[str] = []

    def advance(batch: object, lr: float) -> Waiting:
        calls.extend(["cudaDeviceSynchronize"] * waiting)
        return Waiting(calls)

    def recorded(call, steps, device, path) -> tuple[list[str], list[float]]:
        calls.clear()
        for _ in range(steps):
            call()
        return list(calls), []

    monkeypatch.setattr(proof, "record_events", recorded)
    monkeypatch.setattr(proof, "waits", lambda events: {name: events.count(name) for name in events})
    replayed, read = proof.watch(advance, None, 10, CPU, {})
    assert (replayed.median, replayed.config["steps"]) == (10 * waiting, 10)
    assert (read.median, read.config["steps"]) == (6 + 3 * waiting, 3)
