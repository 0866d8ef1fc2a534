"""The step's benchmark times the step that trains, against bounds in the right order."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from fastmoco.bench import roofline, step
from fastmoco.bench.journal import Journal
from fastmoco.bench.timing import Machine
from fastmoco.presets import PRESETS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
V2 = PRESETS["v2"][1]
SMALL = dataclasses.replace(V2, arch="resnet18", width=0.125, batch_size=32, crop_size=16, queue_size=100)


def test_every_provider_runs_also_where_the_queue_is_no_multiple_of_the_batch():
    for name, provider in step.providers(SMALL, CPU).items():
        call = provider.start()
        call(), call()
        assert provider.precision in name


@pytest.mark.parametrize("name", ["simclr", "end-to-end", "bank"])
def test_the_other_dictionaries_have_providers_too(name):
    recipe = dataclasses.replace(PRESETS[name][1], arch="resnet18", width=0.125, batch_size=32, crop_size=16)
    if name == "bank":
        recipe = dataclasses.replace(recipe, queue_size=100)
    found = step.providers(recipe, CPU)
    assert list(found) == list(step.providers(SMALL, CPU))
    for words in ("published fp32", "channels-last bf16 autocast", "fastmoco fp32"):
        found[words].start()()
    config = step.config_of(recipe)
    assert config.get("bank") == (100 if name == "bank" else None) and "queue" not in config


def test_the_bound_of_an_h100_is_the_known_one():
    assert step.pairs_bound(V2, Machine("h100", 3e12, 790e12), 2) == pytest.approx(6296, rel=1e-3)
    assert step.pairs_bound(V2, Machine("h100", 3e12, 790e12), 4) < 3400


def test_the_practical_bounds_of_an_h100_and_an_h200_are_those_of_their_convolutions(monkeypatch):
    """The rates that MLPerf's results on both imply, at each one's own bandwidth; a physical bound is never below."""
    gpus = {"NVIDIA H100 80GB HBM3": (3e12, (4558, 5043)), "NVIDIA H200": (4.3e12, (5365, 6113))}
    for name, (bandwidth, expected) in gpus.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        step.convolution_rates.cache_clear()
        machine, rates = Machine(name, bandwidth, 790e12), step.convolution_rates(GPU, "bf16")
        assert step.practical_bounds(V2, machine, rates, 2) == pytest.approx(expected, rel=1e-3)
        assert max(expected) < step.pairs_bound(V2, machine, 2)
    step.convolution_rates.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA B200")
    assert step.convolution_rates(GPU, "bf16") == roofline.ASSUMED_CONVOLUTION_RATES["B200"]
    step.convolution_rates.cache_clear()
    fast = Machine("toy", 3e12, 1e9)
    assert step.practical_bounds(V2, fast, (1e12,), 2) == [step.pairs_bound(V2, fast, 2)]


def test_other_machines_have_their_convolutions_timed(monkeypatch):
    monkeypatch.setattr(step, "measure_convolutions", lambda device, dtype: 5e9 if dtype == torch.float32 else 7e9)
    step.convolution_rates.cache_clear()
    assert step.convolution_rates(CPU, "fp32") == (5e9,) and step.convolution_rates(CPU, "bf16") == (7e9,)
    step.convolution_rates.cache_clear()


def test_a_cpu_that_multiplies_fp32_faster_has_that_for_its_ceiling(monkeypatch):
    rates = {torch.float32: 9e9, torch.bfloat16: 7e9}
    monkeypatch.setattr(step, "measure_machine", lambda device, dtype, tf32=False: Machine("toy", 1e9, rates[dtype]))
    monkeypatch.setattr(step, "measure_convolutions", lambda device, dtype: rates[dtype] / 2)
    step.convolution_rates.cache_clear()
    assert step.machine_at(CPU, "bf16").flops == 9e9 and step.convolution_rates(CPU, "bf16") == (4.5e9,)
    step.convolution_rates.cache_clear()


def test_the_bound_of_a_cpu_counts_what_winograds_algorithm_multiplies(monkeypatch):
    """Or a step could be faster than its bound. Where nothing is saved, and on a GPU, all of it counts."""
    fast = 1e15  # bytes a second: arithmetic alone decides
    bounds = {}
    for saving in (1.0, 4.0):
        monkeypatch.setattr(roofline, "saving", lambda layer, dtype, saving=saving: saving)
        bounds[saving] = [step.pairs_bound(V2, Machine(name, fast, 1e12), 2) for name in ("cpu", "h100")]
    assert bounds[1.0][0] == bounds[1.0][1] == bounds[4.0][1]
    assert bounds[4.0][0] == pytest.approx(4 * bounds[1.0][0], rel=0.01)


def test_a_gpu_has_the_published_step_in_every_form_and_ours_by_backend():
    names = set(step.providers(SMALL, torch.device("cuda", 0)))
    assert {"published tf32", "published fp16 autocast", "channels-last fp16 autocast"} <= names
    assert {"compiled channels-last fp16 autocast", "published bf16 autocast", "fastmoco bf16"} <= names
    encoders = ("eager encoder", "compiled encoder")
    assert {f"fastmoco bf16, {how}" for how in ("no graph", "finished views", *encoders)} <= names


@pytest.mark.parametrize(("dictionary", "size"), [("queue", 100), ("batch", V2.queue_size), ("bank", 100)])
def test_ours_on_finished_views_makes_none(monkeypatch, dictionary, size):
    monkeypatch.setattr("fastmoco.contrast.views.photometric", lambda *_, **__: pytest.fail("a view was made"))
    sources = step.providers(dataclasses.replace(SMALL, dictionary=dictionary, queue_size=size), CPU)
    with pytest.raises(pytest.fail.Exception, match="a view was made"):
        sources["fastmoco bf16"].start()()
    sources["fastmoco bf16, finished views"].start()()


def choose(group: str, only: str = "", skip: str = "", device: torch.device = GPU) -> set[str]:
    return set(step.choose(step.providers(SMALL, device), "", group, only, skip))


def test_the_groups_share_the_baseline_alone_and_leave_nothing_out():
    core, more, compiled = (choose(group) for group in ("core", "more", "compiled"))
    assert core == {
        "published fp16 autocast",
        "channels-last fp16 autocast",
        "fastmoco bf16",
        "fastmoco fp16",
        "fastmoco bf16, no graph",
        "fastmoco bf16, deterministic",
    }
    assert core & more == more & compiled == core & compiled == {"published fp16 autocast"}
    assert core | more | compiled == choose("all") and all("compiled" in name for name in compiled - core)
    assert choose("core", device=CPU) == choose("all", device=CPU)
    assert choose("more", device=CPU) == {"published fp32"}


def test_words_choose_and_leave_out():
    assert choose("core", "fp16 autocast, fastmoco bf16", "graph, deterministic") == {
        "published fp16 autocast",
        "channels-last fp16 autocast",
        "fastmoco bf16",
    }
    assert choose("core", skip="autocast, no graph, deterministic") == {
        "fastmoco bf16",
        "fastmoco fp16",
    }
    with pytest.raises(ValueError, match="nothing to time is left: the providers are published tf32; "):
        choose("core", "nonsense")


def stand_ins(monkeypatch: pytest.MonkeyPatch, **starts: Callable) -> None:
    table = {name: step.Provider(start, "fp32") for name, start in starts.items()}
    monkeypatch.setattr(step, "providers", lambda recipe, device: table)
    monkeypatch.setattr(step, "machine_at", lambda *_: Machine("toy", 1e9, 1e9))
    monkeypatch.setattr(step, "convolution_rates", lambda *_: (1e8, 2e8))


def test_a_provider_that_fails_costs_its_own_row_and_rows_are_kept_round_by_round(monkeypatch):
    countdown, saved = iter(range(6)), []

    def no_room() -> None:
        raise torch.OutOfMemoryError("no room")

    stand_ins(monkeypatch, good=lambda: lambda: None, big=no_room, wears_out=lambda: lambda: next(countdown))
    monkeypatch.setattr("fastmoco.bench.timing.SHORTEST_SAMPLE", 0.0)
    journal = Journal(lambda so_far: saved.append({row.provider: len(row.samples) for row in so_far.rows}))
    rows = step.run(SMALL, CPU, rounds=4, warmup=3, journal=journal)
    assert {row.provider: len(row.samples) for row in rows} == {"good": 4, "wears_out": 2}
    assert saved == [{"good": n, "wears_out": min(n, 2)} for n in (1, 2, 3, 4)]
    assert set(journal.failures) == {"big", "wears_out"} and "no room" in journal.failures["big"]


def test_where_all_fail_there_are_no_rows(monkeypatch):
    stand_ins(monkeypatch, bad=lambda: 1 / 0)
    journal = Journal()
    assert step.run(SMALL, CPU, rounds=1, journal=journal) == [] and set(journal.failures) == {"bad"}


def test_a_row_knows_the_bounds_of_all_levels(monkeypatch):
    stand_ins(monkeypatch, good=lambda: lambda: None)
    (row,) = step.run(SMALL, CPU, rounds=1)
    assert row.extra["bounds"]["bnrelu"] == row.bound and list(row.extra["bounds"]) == list(step.LEVELS)
    assert sorted(row.extra["bounds"].values()) == list(row.extra["bounds"].values())
    assert row.extra["convolutions"] == [1e8, 2e8]
    assert row.extra["practical"][0] < row.extra["practical"][1] < row.bound


def test_a_step_that_must_be_captured_is_never_timed_eagerly(monkeypatch):
    calls = []
    monkeypatch.setattr(step, "runner", lambda made, batch, graph, pool: calls.append(graph))
    monkeypatch.setattr(step, "Step", lambda *_, **__: None)
    monkeypatch.setattr(step, "noise_batch", lambda *_: None)
    monkeypatch.setattr(step, "_with_finished_views", lambda batch: batch)
    monkeypatch.setattr(step, "Parallel", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    for name, provider in step.providers(SMALL, GPU).items():
        if name.startswith("fastmoco"):
            provider.start()
            assert calls.pop() == ("off" if "no graph" in name else "on"), name


def test_each_step_sets_tf32_for_itself_and_leaves_the_switch_as_it_was(monkeypatch):
    records = []
    switch = lambda: (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())  # noqa: E731

    class Published:
        def __init__(self, *_: object) -> None: ...

        def __call__(self, *_: object) -> None:
            records.append(switch())

    monkeypatch.setattr(step, "plain_step", Published)
    monkeypatch.setattr(step, "runner", lambda *_, **__: lambda *_: records.append(switch()))
    theirs, ours = step.published(SMALL, CPU), step.ours(SMALL, CPU, "fp32")
    before = switch()
    theirs(), ours(), theirs()
    assert records == [(True, "highest"), (False, "highest"), (True, "highest")] and switch() == before
