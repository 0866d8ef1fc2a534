"""What `bench gpu-check` runs, and which of it fits a given time.

The parts stand in the order of what is worth most and least known. Each has a limit, which is what it may take on a
machine whose caches are cold, and says what an H100 is expected to need. Some have longer forms. `fit` first gives
every part its shortest form, in order, as long as there is room, and then longer forms, in order: so the limits of
what is planned never add up to more than the time given, and a part that overruns costs nothing but itself. A longer
form may be the same command with more time, where most of it goes into starting processes and compilers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastmoco.bench import targets
from fastmoco.bench.profiler import PICTURE
from fastmoco.kernels.compile_gate import kernel_modules
from fastmoco.options import UsageError

ROOT = Path(__file__).resolve().parent.parent
OURSELVES = (sys.executable, "-m", "fastmoco")
GATE = "gate"
# Replays against steps in the arithmetic that everything is timed in, with and without deterministic algorithms; a
# hundred steps that wait for nothing; and batch norm, whose launches overlap on Hopper, against itself one by one.
GATE_TESTS = "bf16-plain-sgd or fastest_algorithms or hundred_steps or (waits_for_nothing and bf16-sgd) or overlap"
GATE_FILES = ("tests/contrast", "tests/kernels/test_batch_norm.py")
MORE_TESTS = ("tests/data", "tests/train")
# What a rehearsal runs in place of tests that need a GPU: a pytest that skips all of them would show nothing.
REHEARSED_GATE = (
    "tests/contrast/test_graph.py",
    "-m",
    "not gpu",
    "-k",
    "noise_batch or caller or another_shape or freed",
)
REHEARSED_DATA = ("tests/data/test_batch.py", "tests/train/test_saver.py", "-m", "not gpu and not slow")
DALI = "nvidia.dali"
ON_GPU = ("-m", "gpu")
# What a rehearsal on a CPU asks of every benchmark: toy sizes and a single round.
SMALL = ("--device", "cpu", "--arch", "resnet18", "--batch-size", "32", "--crop-size", "32", "--queue-size", "256")
TOY = (*SMALL, "--rounds", "1")
SLOWER = 6  # times as long may a part of a rehearsal take


class Form(NamedTuple):
    """One form of a part: seconds that it may take, seconds that an H100 should need, its command."""

    limit: int
    expected: int
    command: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """One process of the check: its name, its forms, the shortest first, and what it leaves behind.

    `record` is the file that it writes itself; `picture` is copied to a place of its own once it has passed. `needs`
    names a module or a program without which it is not run, and that is no failure. `tests`: it is a run of pytest,
    which ends well also where it skips all of them.
    """

    name: str
    forms: tuple[Form, ...]
    record: Path | None = None
    picture: tuple[Path, Path] | None = None
    needs: str = ""
    tests: bool = False

    @property
    def there(self) -> bool:
        """Whether what it needs is installed."""
        return not self.needs or shutil.which(self.needs) is not None or _importable(self.needs)


class PlannedPart(NamedTuple):
    """A part and the form of it that is to be run."""

    part: Part
    form: Form


def fit(parts: Sequence[Part], seconds: float) -> tuple[list[PlannedPart], list[Part]]:
    """What is run within `seconds`, in order, and the parts for which there is no room."""
    choice: dict[str, int] = {}
    for part in parts:
        if part.forms[0].limit <= seconds:
            choice[part.name] = 0
            seconds -= part.forms[0].limit
    for part in parts:
        for number in range(1, len(part.forms) if part.name in choice else 0):
            more = part.forms[number].limit - part.forms[choice[part.name]].limit
            if more <= seconds:
                choice[part.name] = number
                seconds -= more
    plan = [PlannedPart(part, part.forms[choice[part.name]]) for part in parts if part.name in choice]
    return plan, [part for part in parts if part.name not in choice]


def table(plan: Sequence[PlannedPart], rest: Sequence[Part], missing: Sequence[Part], seconds: float) -> str:
    """The plan as a Markdown table, with what there is no room for and what is not installed."""
    lines = ["| part | limit s | an H100 should need s | ends by s | command |", "|---|---:|---:|---:|---|"]
    end = 0
    for part, form in plan:
        end += form.limit
        words = " ".join("python" if word == sys.executable else word for word in form.command)
        text = words if len(words) <= 160 else words[:157] + "..."
        lines.append(f"| {part.name} | {form.limit} | {form.expected} | {end} | `{text}` |")
    expected = sum(form.expected for _, form in plan)
    lines += ["", f"The limits add up to {end} of {seconds:.0f} s, what an H100 should need to {expected} s."]
    if rest:
        lines.append(f"Only if time is left: {', '.join(part.name for part in rest)}.")
    if missing:
        lines.append(f"Not installed: {', '.join(f'{part.name} (needs {part.needs})' for part in missing)}.")
    return "\n".join(lines)


def select(parts: Sequence[Part], only: str, skip: str) -> list[Part]:
    """The parts that `only` names, separated by commas (all where it is empty), without those that `skip` names.

    Raises UsageError, which lists the names, if a word names none of them or nothing is left.
    """
    names = {part.name for part in parts}
    keep, drop = (tuple(word.strip() for word in words.split(",") if word.strip()) for words in (only, skip))
    strange = [word for word in (*keep, *drop) if word not in names]
    selection = [part for part in parts if (not keep or part.name in keep) and part.name not in drop]
    if strange or not selection:
        what = f"there is no part {strange[0]}" if strange else "no part is left"
        raise UsageError(f"{what}: the parts are {', '.join(part.name for part in parts)}")
    return selection


def parts(records: Path, stem: str, scratch: Path, rehearse: bool = False) -> list[Part]:
    """All parts, in order. Records are `records`/`stem`-NAME.json; `rehearse` gives each its toy size on a CPU."""
    make = _Maker(records, stem, rehearse)
    plan = [*_first_parts(make, scratch / "profile"), *_more_parts(make)]
    return [_for_rehearsal(part) for part in plan] if rehearse else plan


def _first_parts(make: _Maker, profile: Path) -> Iterator[Part]:
    core, others = "step --providers core", "--skip 'graph, deterministic'"
    small = f"{core} --batch-size {targets.SMALL}"
    drawing = ("profile", "v2", "--out", str(profile), *((*SMALL, "--steps", "1") if make.rehearse else ()))
    yield make.tests(GATE, 50, 35, 5, *ON_GPU, *GATE_FILES, "-k", GATE_TESTS, toy=REHEARSED_GATE, longer=(90,))
    brief = f"{core} --only 'fp16 autocast, fastmoco bf16' {others} --rounds 5"
    yield make.bench("step", (60, 45, brief), (90, 45, brief), (150, 75, f"{core} --rounds 10"), (200, 130, core))
    yield make.bench("proof", (75, 60, "proof --rounds 20"))
    yield make.bench("decode", (40, 20, "decode"), needs=DALI)
    yield make.tests("data", 50, 40, 3, *ON_GPU, *MORE_TESTS, toy=REHEARSED_DATA, needs=DALI)
    yield make.bench("resume", (60, 45, "resume"), (90, 45, "resume"), needs=DALI)
    yield make.bench("train", (75, 55, "train"), (110, 80, "train --rounds 10"), needs=DALI)
    brief = "loader --only 'fastmoco, decoding' --skip photometric"
    yield make.bench("loader", (60, 40, brief), (110, 80, "loader"), needs=DALI)
    brief = f"{small} --only 'published fp16, fastmoco bf16' {others} --rounds 10"
    yield make.bench("step-32", (55, 45, brief), (80, 60, small))
    picture = (profile / PICTURE, make.records / f"{make.stem}-step.svg")
    yield Part("picture", (Form(45, 35, (*OURSELVES, *drawing)),), picture=picture)


def _more_parts(make: _Maker) -> Iterator[Part]:
    toy = ("tests/kernels", "-k", "enqueue")
    yield make.tests("kernel-tests", 120, 100, 8, "tests/kernels", "-m", "not slow", toy=toy)
    most = "kernels --only 'info_nce, sgd_ema, batch_norm, photometric, enqueue'"
    brief = "kernels --only 'info_nce, sgd_ema, batch_norm' --rounds 10"
    # NT-Xent comes early in all of them, at five sizes, for each of which torch.compile is asked anew.
    yield make.bench("kernels", (60, 40, brief), (110, 75, most), (300, 200, "kernels"), toy=("--only", "enqueue"))
    yield make.tests("more-tests", 90, 60, 8, *ON_GPU, "tests/contrast", toy=("tests/contrast/test_shuffle.py",))
    yield make.bench("memory", (60, 50, "memory"))
    yield _sanitizer("memcheck", 60)
    yield _sanitizer("racecheck", 60)
    yield make.bench("step-more", (100, 80, "step --providers more"))
    yield make.bench("step-compiled", (300, 200, "step --providers compiled"))


class _Maker(NamedTuple):
    """Makes parts whose records are `records`/`stem`-NAME.json; with `rehearse` each has its toy size on a CPU."""

    records: Path
    stem: str
    rehearse: bool

    def bench(self, name: str, *forms: tuple[int, int, str], needs: str = "", toy: Sequence[str] = ()) -> Part:
        """A part of `fastmoco bench`; of each form its limit and expected seconds, and the words after `bench`."""
        path = self.records / f"{self.stem}-{name}.json"
        return Part(name, tuple(self._form(path, *form, toy) for form in forms), path, needs=needs)

    def _form(self, path: Path, limit: int, expected: int, words: str, toy: Sequence[str]) -> Form:
        # The record names its command, and is committed: no path of this machine, where it can be helped.
        target = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        subject, *flags = shlex.split(words)
        size = (subject, *toy, *TOY) if self.rehearse else (subject, *flags, "--device", "cuda")
        return Form(limit, expected, (*OURSELVES, "bench", *size, "--json", str(target)))

    def tests(
        self,
        name: str,
        limit: int,
        expected: int,
        workers: int,
        *words: str,
        toy: Sequence[str],
        needs: str = "",
        longer: Sequence[int] = (),
    ) -> Part:
        """A part of pytest over `words`, with forms of `longer` limits."""
        form = _tests(limit, expected, workers, *(toy if self.rehearse else words))
        return Part(name, (form, *(form._replace(limit=more) for more in longer)), needs=needs, tests=True)


def _for_rehearsal(part: Part) -> Part:
    # Two cores import and collect as long as a GPU machine computes.
    shortest = part.forms[0]
    return dataclasses.replace(part, forms=(shortest._replace(limit=SLOWER * shortest.limit),))


def _tests(limit: int, expected: int, workers: int, *words: str) -> Form:
    # Most of the time goes into compiling kernels, one after the other in each process, each for one precision.
    spread = ("-n", str(workers), "--dist", "loadgroup") if importlib.util.find_spec("xdist") else ()
    return Form(limit, expected, (sys.executable, "-m", "pytest", "-q", *spread, *words))


def _sanitizer(tool: str, limit: int) -> Part:
    # Other people's kernels are left alone: they take most of the time, and what they do is theirs.
    names = sorted({variant.fn.__name__ for module in kernel_modules() for variant in module.variants(90)})
    ours = [word for name in names for word in ("--kernel-name", f"kne={name}")]
    flags = ("--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no", *ours)
    command = ("compute-sanitizer", *flags, sys.executable, "-m", "fastmoco.bench.gpu_check")
    return Part(tool, (Form(limit, limit, command),), needs="compute-sanitizer")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
