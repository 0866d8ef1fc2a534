"""Tables in a terminal: no line is wider than it, and no word of a cell is lost."""

import io

import pytest

from fastmoco import terminal

WIDE = """Rows of the step, with a caption that is longer than any terminal of eighty columns would like:

| provider | median | 20 % to 80 % | n | against baseline | share of bound |
|---|---:|---:|---:|---:|---:|
| fastmoco | 14.1 pairs/s | 13.9 to 14.3, unsteady | 5 | 1.49 x published bf16 autocast | 62 % |
| channels-last bf16 autocast (launched by the host) | 15.3 pairs/s | 15.1 to 15.4 | 5 | | 104 %, over |

Below the table."""


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_lost(width):
    text = terminal.fit(WIDE, width)
    assert max(map(len, text.splitlines())) <= width and "|" not in text
    letters, found = (sorted(each.translate(str.maketrans("", "", "|:- \n"))) for each in (WIDE, text))
    assert letters == found


def test_columns_line_up():
    header, rule, first, second = terminal.fit("| a | b |\n|---|---:|\n| x | 1 |\n| yy | 22 |", 80).splitlines()
    assert (header, rule, first, second) == ("a    b", "--  --", "x    1", "yy  22")


def test_a_pipe_gets_markdown_and_a_terminal_does_not(monkeypatch):
    pipe = io.StringIO()
    assert terminal.lay_out(WIDE, pipe) == WIDE
    monkeypatch.setattr(pipe, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert terminal.lay_out(WIDE, pipe) == terminal.fit(WIDE, 80)


def test_a_terminal_of_a_few_columns_ends():
    assert terminal.fit(WIDE, 1)


def test_a_count_has_its_noun_in_the_singular_or_the_plural():
    assert [terminal.counted(count, "file") for count in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    assert [terminal.counted(count, "class", "classes") for count in (1, 3)] == ["1 class", "3 classes"]
