"""The plan of the check for a GPU: what is run in which time, that it fits, and that every command it names works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastmoco.bench import gpu_plan
from fastmoco.bench.gpu_plan import GATE, Form, Part, fit, parts, select, table
from fastmoco.bench.options import Bench
from fastmoco.cli import main, parse
from fastmoco.options import UsageError

H100 = "2026-01-01-nvidia-h100-80gb-hbm3"
SECONDS = (115, 295, 535, 895)  # of 2, 5, 9 and 15 minutes, less what the report takes
# Rehearsed in this process; the others in a call of gpu15.sh (test_gpu_check.py), and in tests of their own.
OURS = ("proof", "decode", "train", "loader", "kernels", "memory")


def whole(tmp_path: Path) -> list[Part]:
    return parts(tmp_path, H100, tmp_path)


def part(name: str, *limits: int, needs: str = "") -> Part:
    return Part(name, tuple(Form(limit, limit // 2, ("true",)) for limit in limits), needs=needs)


def test_what_is_worth_most_and_least_known_comes_first(tmp_path):
    names = [each.name for each in whole(tmp_path)]
    first = [GATE, "step", "proof", "decode", "data", "resume", "train", "loader", "step-32", "picture"]
    assert names[: len(first)] == first
    assert names[len(first) :][:2] == ["kernel-tests", "kernels"] and len(set(names)) == len(names)


@pytest.mark.parametrize("seconds", SECONDS)
def test_the_limits_never_add_up_to_more_than_the_time(tmp_path, seconds):
    plan, rest = fit(whole(tmp_path), seconds)
    assert sum(form.limit for _, form in plan) <= seconds
    assert {one.name for one, _ in plan} | {one.name for one in rest} == {one.name for one in whole(tmp_path)}
    assert all(form in one.forms and form.expected <= form.limit for one, form in plan)


def test_more_time_is_more_parts_and_the_first_ones_always_fit(tmp_path):
    plan = [[one.name for one, _ in fit(whole(tmp_path), seconds)[0]] for seconds in SECONDS]
    assert plan[0] == [GATE, "step"]
    assert plan[1] == [GATE, "step", "proof", "decode", "data"]
    assert plan[2] == [GATE, "step", "proof", "decode", "data", "resume", "train", "loader", "step-32"]
    assert set(plan[2]) < set(plan[3]) and {"picture", "kernel-tests", "kernels"} <= set(plan[3])


def test_time_left_goes_to_longer_forms_in_order():
    whole_plan = [part("a", 10, 30, 50), part("b", 10, 40), part("c", 100)]
    choice = {one.name: form.limit for one, form in fit(whole_plan, 55)[0]}
    assert choice == {"a": 30, "b": 10}
    assert {one.name: form.limit for one, form in fit(whole_plan, 75)[0]} == {"a": 50, "b": 10}
    assert {one.name: form.limit for one, form in fit(whole_plan, 200)[0]} == {"a": 50, "b": 40, "c": 100}
    assert fit(whole_plan, 5) == ([], whole_plan)


def test_the_plan_is_printed_with_its_sum_and_what_is_missing():
    plan, rest = fit([part("a", 10), part("b", 90), part("c", 20)], 40)
    text = table(plan, rest, [part("d", 5, needs="nvidia.dali")], 40)
    assert "| a | 10 | 5 | 10 | `true` |\n| c | 20 | 10 | 30 | `true` |" in text
    assert "The limits add up to 30 of 40 s, what an H100 should need to 15 s." in text
    assert "Only if time is left: b." in text and "Not installed: d (needs nvidia.dali)." in text


def test_parts_are_chosen_and_left_out_by_name():
    whole_plan = [part("a", 1), part("b", 1), part("c", 1)]
    assert [one.name for one in select(whole_plan, "", "")] == ["a", "b", "c"]
    assert [one.name for one in select(whole_plan, "c, a", "")] == ["a", "c"]  # in the plan's order
    assert [one.name for one in select(whole_plan, "", "b")] == ["a", "c"]
    for words in (("x", ""), ("", "x"), ("a", "a")):
        with pytest.raises(UsageError, match="the parts are a, b, c"):
            select(whole_plan, *words)


def test_what_is_not_installed_is_known(monkeypatch):
    assert part("a", 1).there and part("a", 1, needs="torch").there and part("a", 1, needs=sys.executable).there
    assert not part("a", 1, needs="no.such.module").there and not part("a", 1, needs="no-such-tool").there


def test_what_reads_images_needs_dali_and_nothing_else_does(tmp_path):
    needing = {one.name for one in whole(tmp_path) if one.needs == gpu_plan.DALI}
    assert needing == {"decode", "data", "resume", "train", "loader"}


def test_each_record_is_a_file_of_its_own_and_its_command_names_no_path_of_this_machine(tmp_path):
    by_name = parts(gpu_plan.ROOT / "bench/records", H100, Path("/scratch"))
    records = [one.record for one in by_name if one.record]
    assert len(set(records)) == len(records) == 11
    assert not any(
        Path(word).is_absolute() for one in by_name if one.record for form in one.forms for word in form.command[1:]
    )
    (picture,) = [one.picture[1] for one in whole(tmp_path) if one.picture]
    assert picture.parent == tmp_path and picture.name.endswith("-step.svg")


@pytest.mark.parametrize("rehearse", [False, True])
def test_its_commands_name_files_flags_and_kernels_that_exist(tmp_path, rehearse):
    for one in parts(tmp_path, H100, tmp_path, rehearse):
        for form in one.forms:
            for word in form.command:
                assert not word.startswith("tests/") or (gpu_plan.ROOT / word).exists()
            if form.command[1:3] == ("-m", "fastmoco"):
                _, options = parse(form.command[3:])
                assert not isinstance(options, Bench) or options.json == one.record
                assert options.device == ("cpu" if rehearse else "cuda" if isinstance(options, Bench) else "auto")
    (memcheck,) = [one for one in whole(tmp_path) if one.name == "memcheck"]
    kernels = {word.removeprefix("kne=") for word in memcheck.forms[0].command if word.startswith("kne=")}
    assert len(kernels) > 8 and all(re.fullmatch(r"\w+", name) for name in kernels)


def test_tests_are_spread_over_processes_where_xdist_is_there(monkeypatch):
    monkeypatch.setattr(gpu_plan.importlib.util, "find_spec", lambda name: object())
    assert ("-n", "8") == gpu_plan._tests(1, 1, 8, "tests").command[4:6]
    monkeypatch.setattr(gpu_plan.importlib.util, "find_spec", lambda name: None)
    assert "-n" not in gpu_plan._tests(1, 1, 8, "tests").command


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_a_part_of_ours_is_rehearsed(tmp_path, name, capsys):
    """At a toy size on this machine: its command ends well, and leaves the record or the picture that it is run for."""
    (one,) = [each for each in parts(tmp_path, "rehearsal", tmp_path, rehearse=True) if each.name == name]
    assert main(one.forms[0].command[3:]) == 0, capsys.readouterr().err[-2000:]
    assert (one.record or one.picture[0]).is_file()


def collected(one: Part) -> list[str]:
    """The tests that a part of the plan selects here."""
    workers = {word for form in one.forms for word in form.command if word.isdigit()}
    words = [word for word in one.forms[0].command[4:] if word not in {"-n", "--dist", "loadgroup", *workers}]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *words]
    listed = subprocess.run(command, cwd=gpu_plan.ROOT, capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if "::" in line]


@pytest.mark.slow
def test_the_selections_of_tests_hold_what_they_are_meant_to(tmp_path):
    tests = collected(next(one for one in whole(tmp_path) if one.name == GATE))
    # Replays against steps in two settings, a hundred steps with and without a graph, one step that waits for nothing;
    # and launches that overlap, of batch norm's three forms.
    assert len(tests) == 8 and sum("overlap" in line for line in tests) == 3, tests
    assert sum("hundred_steps" in line for line in tests) == 2 and any("bf16-plain-sgd" in line for line in tests)
    # What a rehearsal runs in their place needs no GPU, or it would show nothing.
    rehearsed = {one.name: one for one in parts(tmp_path, "rehearsal", tmp_path, rehearse=True)}
    for name in (GATE, "data", "more-tests"):
        assert rehearsed[name].tests and len(collected(rehearsed[name])) > 3
