"""`pretrain PRESET --help`: the flags that a user decides, under headings; `--help-all` lists all the others too.

Parsing is tyro's. It shows one box for each dataclass, and a pretraining run has two of them with eighty flags.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

INDENT = 24
NARROW = 60  # columns; a narrower terminal breaks lines itself

# Heading, then the fields under it. What stands in no row is shown by --help-all alone.
HEADINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Images, and the folder of the run", ("data", "val", "out", "resume", "recipe", "dry_run", "stop_after")),
    ("Network", ("arch", "width", "stem", "head", "start_from")),
    ("Contrast", ("dictionary", "queue_size", "ema_momentum", "temperature", "symmetric", "bn_group")),
    ("Training", ("batch_size", "epochs", "lr", "schedule", "warmup_epochs", "weight_decay", "seed")),
    ("Views", ("crop_size", "crop_scale", "jitter_p", "gray_p", "blur_p")),
    ("Machine", ("device", "threads", "precision", "graph")),
    ("Checkpoints, and what stops a run", ("save_minutes", "save_every", "keep", "on_nonfinite")),
    ("Log and evaluation", ("log_every", "knn", "knn_every", "tensorboard", "track")),
)
REST = "Rarely changed"


class Flag(NamedTuple):
    """One flag: the field it sets, the values it takes, its default in this preset, its help."""

    field: str
    values: str
    default: object
    text: str

    @property
    def spelling(self) -> str:
        """As it is typed: `--lr FLOAT`, `--knn, --no-knn`."""
        name = f"--{self.field.replace('_', '-')}"
        return f"{name}, --no-{name[2:]}" if isinstance(self.default, bool) else f"{name} {self.values}"


def page(command: str, about: str, settings: Any, everything: bool = False) -> str:
    """The help of `command`: `settings` is a dataclass whose fields, or whose fields' fields, are the flags.

    Defaults are the values that `settings` holds. With `everything` the flags that stand under no heading follow.
    """
    by_field = {flag.field: flag for flag in flags(settings)}
    blocks = [f"usage: {command} [flags]\n\n{about}"]
    blocks += [_block(title, (by_field.pop(name) for name in names)) for title, names in HEADINGS]
    if everything:
        blocks.append(_block(REST, by_field.values()))
    else:
        blocks.append(f"{command} --help-all shows {len(by_field)} more flags.")
    return "\n\n".join(blocks)


def flags(settings: Any) -> Iterator[Flag]:
    """The fields of a dataclass object as flags, those of dataclasses inside it among them."""
    texts = field_help(settings.__class__)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from flags(value)
        else:
            yield Flag(field.name, _values(str(field.type), value), value, texts.get(field.name, ""))


@functools.cache
def field_help(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass, on one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    pairs = zip(body.body, body.body[1:], strict=False)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _values(annotation: str, value: object) -> str:
    """`Literal["a", "b"]` is {a,b}; of numbers and paths the type is named, once for each of a tuple."""
    if "ARCHITECTURES" in annotation:
        return "NAME"
    if "Literal[" in annotation:
        inner = annotation.partition("Literal[")[2].partition("]")[0]
        words = "{" + ",".join(word.strip().strip("\"'") for word in inner.split(",")) + "}"
        kind = annotation.partition("|")[0].strip()
        return f"{kind.upper()}|{words}" if kind in ("int", "float") else words
    if annotation == "Device":
        return "{auto,cpu,cuda}"
    if isinstance(value, tuple):
        return " ".join([type(value[0]).__name__.upper()] * len(value)) if "..." not in annotation else "INT ..."
    return annotation.partition("|")[0].strip().upper()


def _block(title: str, items: Iterable[Flag]) -> str:
    width = max(NARROW, min(shutil.get_terminal_size().columns, 100))
    wrap = textwrap.TextWrapper(width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT)
    lines = [f"{title}:"]
    for flag in items:
        spelling = f"  {flag.spelling}"
        text = wrap.fill(f"{flag.text} ({_text(flag.default)})").lstrip()
        fits = len(spelling) < INDENT - 1
        lines.append(f"{spelling:<{INDENT}}{text}" if fits else f"{spelling}\n{' ' * INDENT}{text}")
    return "\n".join(lines)


def _text(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
