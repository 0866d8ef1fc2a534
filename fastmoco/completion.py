"""`fastmoco completion SHELL`: a script that lets a shell complete commands, flags and their values."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Union

from fastmoco.cli import COMMANDS, PROG, load, style
from fastmoco.options import Completion, PretrainFlags
from fastmoco.presets import PRESETS


def run(options: Completion) -> None:
    """Print the script; it is tyro's, of one parser of all commands."""
    import tyro

    arguments = ["--tyro-write-completion", options.shell, "-"]
    with contextlib.suppress(SystemExit):  # its way out when it has printed
        tyro.cli(_all_commands(), prog=PROG, args=arguments, config=(*style(), tyro.conf.OmitSubcommandPrefixes))


def _all_commands() -> Any:
    import tyro

    groups: dict[str, list[Any]] = {}
    for name in COMMANDS:
        first, _, second = name.partition(" ")
        groups.setdefault(first, []).extend([_row(name, second)] if second else [])
    tops = [
        Annotated[Union[tuple(rows)], tyro.conf.subcommand(first)] if rows else _row(first, first)
        for first, rows in groups.items()
    ]
    return Union[tuple(tops)]


def _row(name: str, shown: str) -> Any:
    import tyro

    command = COMMANDS[name]
    kind = load(command.options)
    default: dict[str, Any] = {"default": PretrainFlags(recipe=PRESETS[shown][1])} if kind is PretrainFlags else {}
    return Annotated[kind, tyro.conf.subcommand(shown, description=command.help, **default)]
