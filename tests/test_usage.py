"""The help of `pretrain`: what a user decides is on its first page, under headings; nothing is missing from both."""

from __future__ import annotations

import re

import pytest

from fastmoco import usage
from fastmoco.cli import main
from fastmoco.options import PretrainFlags
from fastmoco.presets import PRESETS

MOST = 45
EVERY = [flag.field for flag in usage.flags(PretrainFlags())]


def help_lines(argv: list[str], capsys: pytest.CaptureFixture) -> list[str]:
    assert main(argv) == 0
    return [name.replace("-", "_") for name in re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.M)]


@pytest.mark.parametrize("preset", PRESETS)
def test_help_shows_at_most_45_flags_and_help_all_every_one(preset: str, capsys: pytest.CaptureFixture) -> None:
    short = help_lines(["pretrain", preset, "--help"], capsys)
    assert short == [name for _, names in usage.HEADINGS for name in names] and len(short) <= MOST
    assert sorted(help_lines(["pretrain", preset, "--help-all"], capsys)) == sorted(EVERY)


def test_no_flag_stands_under_two_headings() -> None:
    named = [name for _, names in usage.HEADINGS for name in names]
    assert len(named) == len(set(named)) and set(named) <= set(EVERY)


def test_defaults_are_those_of_the_preset(capsys: pytest.CaptureFixture) -> None:
    main(["pretrain", "v1", "--help"])
    assert "Temperature T of InfoNCE. (0.07)" in capsys.readouterr().out
    main(["pretrain", "v2", "--help"])
    assert "Temperature T of InfoNCE. (0.2)" in capsys.readouterr().out


def test_every_flag_has_a_text_and_names_its_values() -> None:
    offered = {flag.field: flag for flag in usage.flags(PretrainFlags())}
    assert [name for name, flag in offered.items() if not flag.text] == []
    assert offered["lr"].spelling == "--lr FLOAT|{auto}"
    assert offered["crop_scale"].spelling == "--crop-scale FLOAT FLOAT"
    assert offered["schedule"].spelling == "--schedule {step,cosine,constant}"
    assert offered["knn"].spelling == "--knn, --no-knn"


@pytest.mark.parametrize("columns", ["", "0", "1", "20", "79", "1000", "wide"])
def test_any_width_of_the_terminal_will_do(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    page = usage.page("fastmoco pretrain v2", "about", PretrainFlags(), everything=True)
    assert max(map(len, page.splitlines())) <= 100
