"""The command line: a table of commands, their typed flags, and one line for every mistake.

A command is a row of `COMMANDS`: help, a dataclass of options and a function that takes them, the last two by name.
The dataclass lives in a module that imports no torch; the function's module is imported only when it is called. So
every `--help` is instant, and adding a command means adding a row.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import difflib
import errno
import gc
import importlib
import io
import itertools
import os
import select
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastmoco import __version__, environment, recipe_file, usage
from fastmoco.options import Pretrain, PretrainFlags, UsageError, check_places, is_restart
from fastmoco.presets import PRESETS
from fastmoco.process import interrupt
from fastmoco.recipe import HARMLESS_ON_RESUME, UNUSED, Recipe, RecipeError
from fastmoco.runs.facts import RECIPE, go_on, read_facts

PROG = "fastmoco"
LEAST_COLUMNS = 40
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HELP = {"-h", "--help", "--help-all"}


class Command(NamedTuple):
    """One row of the table; `options` and `run` are "module:name"."""

    help: str
    options: str
    run: str
    distributed: bool = False
    """Whether the launcher starts one process per GPU for it."""


BENCH = "fastmoco.bench"


def _presets() -> dict[str, Command]:
    row = ("fastmoco.options:PretrainFlags", "fastmoco.train.loop:run", True)
    return {f"pretrain {name}": Command(text, *row) for name, (text, _) in PRESETS.items()}


def _benchmarks() -> dict[str, Command]:
    return {
        "bench": Command("measure speed beside baselines and bounds", f"{BENCH}.options:Bench", f"{BENCH}.command:run"),
        "bench compare": Command(
            "tell whether B is slower than A", f"{BENCH}.options:BenchCompare", f"{BENCH}.command:compare"
        ),
        "bench report": Command(
            "write the pages of records", f"{BENCH}.options:BenchReport", f"{BENCH}.command:write_pages"
        ),
        "bench tune": Command("time tile sizes on this GPU", f"{BENCH}.options:BenchTune", f"{BENCH}.tune:run"),
        "bench gpu-check": Command(
            "tests and benchmarks that need a GPU", f"{BENCH}.options:BenchGpuCheck", f"{BENCH}.gpu_check:run"
        ),
    }


def _profiles() -> dict[str, Command]:
    return {
        f"profile {name}": Command(
            "show where the time goes",
            f"{BENCH}.options:Profile",
            f"{BENCH}.profiler:{name.replace('-', '_')}",
        )
        for name in PRESETS
    }


COMMANDS: dict[str, Command] = {
    **_presets(),
    "presets": Command("list the recipes that have names", "fastmoco.options:Presets", "fastmoco.cli:list_presets"),
    "evaluate knn": Command(
        "classify images by their nearest neighbours", "fastmoco.options:EvaluateKnn", "fastmoco.evaluate.knn:run"
    ),
    "evaluate linear": Command(
        "train a classifier on the frozen backbone", "fastmoco.options:EvaluateLinear", "fastmoco.evaluate.linear:run"
    ),
    "evaluate finetune": Command(
        "train backbone and classifier on labelled images, or on few of them",
        "fastmoco.evaluate.options:EvaluateFinetune",
        "fastmoco.evaluate.finetune:run",
        distributed=True,
    ),
    "evaluate detection": Command(
        "fine-tune a detector and judge it as PASCAL VOC does",
        "fastmoco.evaluate.options:EvaluateDetection",
        "fastmoco.detection.command:run",
        distributed=True,
    ),
    "embed": Command("write the features of images", "fastmoco.options:Embed", "fastmoco.evaluate.embed:run"),
    "search": Command(
        "find the images that look most like given ones",
        "fastmoco.evaluate.options:Search",
        "fastmoco.evaluate.search:run",
    ),
    "duplicates": Command(
        "find images that are nearly the same",
        "fastmoco.evaluate.options:Duplicates",
        "fastmoco.evaluate.duplicates:run",
    ),
    "report": Command("write one HTML page about a run", "fastmoco.options:Report", "fastmoco.report:run"),
    "export": Command(
        "write the weights as other projects read them", "fastmoco.options:Export", "fastmoco.interop.export:command"
    ),
    "import": Command(
        "bring a MoCo checkpoint or torchvision weights", "fastmoco.options:Import", "fastmoco.interop.load:command"
    ),
    "checkpoint verify": Command(
        "check a run's checkpoints, byte by byte",
        "fastmoco.options:CheckpointVerify",
        "fastmoco.runs.inventory:verify",
    ),
    "checkpoint list": Command(
        "list a run's checkpoints", "fastmoco.options:CheckpointList", "fastmoco.runs.inventory:show"
    ),
    "data scan": Command("check a set of images", "fastmoco.options:DataScan", "fastmoco.data.scan_report:run"),
    "data pack": Command(
        "write images as tar shards with an index", "fastmoco.options:DataPack", "fastmoco.data.pack:run"
    ),
    "data synth": Command("write the embedded image set", "fastmoco.options:DataSynth", "fastmoco.cli:synthesise_data"),
    **_benchmarks(),
    **_profiles(),
    "completion": Command(
        "print a script for a shell's completion", "fastmoco.options:Completion", "fastmoco.completion:run"
    ),
    "env": Command("print versions, devices and cores", "fastmoco.options:Env", "fastmoco.environment:run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 wrong use, 3 bad data or checkpoint, 143 asked to stop."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed by whoever started this, as daemons are
            setattr(sys, name, open(os.devnull, "w"))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # a file's name may hold bytes that no encoding knows
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _stdout_is_gone():
            raise
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is not None or error.errno not in DISK_IS_FULL:
            raise
        with contextlib.suppress(OSError):
            print(f"{PROG}: error: cannot write: {error.strerror}: make room, then try again", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains as it leaves
        return 1


def _stdout_is_gone() -> bool:
    # Whoever read, as in `| head`, has read enough.
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains as it leaves
    return True


def _main(argv: Sequence[str]) -> int:
    environment.spin_briefly()
    try:
        with _imports_are_no_garbage():
            command, options = parse(argv)
            work = load(command.run)
        atexit.register(gc.freeze)  # or the interpreter, as it ends, searches all that torch has made: 0.4 s or more
        with interrupt.as_exceptions():
            return work(options) or 0
    except SystemExit as stop:  # tyro's way out of --help and of a wrong flag
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return complain(error)
    except KeyboardInterrupt:
        return 130
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _imports_are_no_garbage() -> Iterator[None]:
    # To look for garbage among them takes a tenth of their time, and as much again at every full collection.
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_on:
            gc.enable()


def parse(argv: Sequence[str]) -> tuple[Command, Any]:
    """The command that `argv` names and its options, checked.

    SystemExit with code 0 after help, 2 after a wrong flag; UsageError or RecipeError on a wrong value.
    """
    name, rest = _split(argv)
    command = COMMANDS[name]
    kind = load(command.options)
    if kind is not PretrainFlags:
        return command, _flags(kind, name, ["--help" if word == "--help-all" else word for word in rest])
    preset = name.split()[1]
    if HELP.intersection(rest):
        settings = PretrainFlags(recipe=PRESETS[preset][1])
        print(usage.page(f"{PROG} {name}", PRESETS[preset][0], settings, everything="--help-all" in rest))
        raise SystemExit(0)
    flags = pretrain_settings(preset, rest)
    # The first rank may have made RUN while the others are still here, or before it was restarted.
    first = os.environ.get("RANK", "0") == "0" and not is_restart()
    check_places(preset, flags.options, is_main=first)
    return command, flags


def pretrain_settings(preset: str, argv: Sequence[str]) -> Pretrain:
    """The flags of `pretrain PRESET`: those of a recipe file first, and on resume the recipe that the run has."""
    name, file = f"pretrain {preset}", _recipe_of(argv)
    if file is not None:
        argv = [*_of_file(file, preset), *argv]  # of a flag that is there twice the last one counts
    start = PretrainFlags(recipe=_starting_recipe(PRESETS[preset][1], argv))
    settings = _flags(PretrainFlags, name, argv, start)
    if settings.options.resume or _goes_on(settings.options):
        settings = _resume(preset, argv, settings)
    return Pretrain(preset, settings.recipe, settings.options)


def _starting_recipe(recipe: Recipe, argv: Sequence[str]) -> Recipe:
    # What the preset says of its dictionary is nothing that somebody asked of another one.
    values = [after for flag, after in itertools.pairwise([*argv, ""]) if flag == "--dictionary"]
    values += [flag.partition("=")[2] for flag in argv if flag.startswith("--dictionary=")]
    return recipe.with_dictionary(values[-1]) if values and values[-1] in UNUSED else recipe


def _of_file(path: Path, preset: str) -> list[str]:
    file = recipe_file.read(path)
    if file.preset not in (None, preset):
        raise UsageError(f"{path} starts from preset {file.preset}, not {preset}: leave the preset out, or name that")
    return recipe_file.words(file.values)


def _flags(kind: type, name: str, argv: Sequence[str], default: Any = None) -> Any:
    import tyro  # here, so that the launcher may import this module before anything is installed

    kwargs = {} if default is None else {"default": default}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _wide_enough():
            return tyro.cli(kind, prog=f"{PROG} {name}", args=list(argv), config=style(), **kwargs)
    except SystemExit as stop:
        # tyro frames whatever a field's check says; one plain line is better, and its box stays for typing mistakes.
        ours = _cause(stop)
        if ours is not None:
            raise ours from None
        sys.stderr.write(errors.getvalue())
        raise


def style() -> tuple[Any, ...]:
    """How fields become flags: without prefixes all are flat, --batch-size and not --recipe.batch-size."""
    import tyro

    return tyro.conf.OmitArgPrefixes, tyro.conf.PositionalRequiredArgs, tyro.conf.DisallowNone


@contextlib.contextmanager
def _wide_enough() -> Iterator[None]:
    # tyro's help never ends in a terminal of a few columns.
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(max(LEAST_COLUMNS, shutil.get_terminal_size().columns))
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _cause(error: BaseException | None) -> Exception | None:
    while error is not None and not isinstance(error, (RecipeError, UsageError)):
        error = error.__context__
    return error


def _resume(preset: str, argv: Sequence[str], settings: PretrainFlags) -> PretrainFlags:
    run = settings.options.out
    assert run is not None, "--resume without --out is refused"
    facts = read_facts(run, "check --out, or leave --resume out")
    if facts["preset"] in PRESETS and facts["preset"] != preset:
        raise UsageError(f"{run} was started with preset {facts['preset']}, not {preset}: give that one")
    before = Recipe.from_dict(facts["recipe"])
    # The run's own recipe takes the preset's place, so that the flags it was started with need not be repeated.
    settings = _flags(PretrainFlags, f"pretrain {preset}", argv, PretrainFlags(recipe=before))
    if facts.get("images"):  # an imported run may know of none
        settings = dataclasses.replace(settings, recipe=settings.recipe.for_images(facts["images"]))
        before = before.for_images(facts["images"])  # what was still open is settled by the images
    for name, (old, new) in before.differences(settings.recipe).items():
        if name not in HARMLESS_ON_RESUME:
            raise UsageError(
                f"{run} was started with {name} {old}, not {new}: leave the flag out, or start another run"
            )
    places: dict[str, Any] = {
        key: Path(value) for key, value in facts["options"].items() if key in ("data", "val", "start_from") and value
    }
    places |= {key: getattr(settings.options, key) for key in ("data", "val") if getattr(settings.options, key)}
    if facts["options"].get("deterministic") == "on":  # or what was promised of the run would end here
        places["deterministic"] = "on"
    return PretrainFlags(dataclasses.replace(settings.options, resume=True, **places), settings.recipe)


def _goes_on(options: Any) -> bool:
    return is_restart() and options.out is not None and (options.out / RECIPE).is_file()


def _split(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    if argv and argv[0] in ("-V", "--version"):
        print(f"{PROG} {__version__}")
        raise SystemExit(0)
    words = [word for word in argv[:2] if not word.startswith("-")]
    if words == ["pretrain"] and (file := _recipe_of(argv)) is not None:
        return f"pretrain {recipe_file.preset_of(file)}", argv[1:]
    for count in range(len(words), 0, -1):
        name = " ".join(words[:count])
        if name in COMMANDS and list(argv[:count]) == words[:count]:
            return name, argv[count:]
    if any(word in ("-h", "--help") for word in argv) or not argv:
        group = words[0] if words and argv[0] == words[0] else ""
        print(_overview(group))
        raise SystemExit(0 if argv else 2)
    raise UsageError(_preset_of_run(argv) if words == ["pretrain"] and "--resume" in argv else _unknown(words))


def _recipe_of(argv: Sequence[str]) -> Path | None:
    """The file that --recipe names, before flags are looked at: they are checked together with what it says."""
    file = _value(argv, "--recipe")
    return None if file is None else Path(file)


def _value(argv: Sequence[str], flag: str) -> str | None:
    for word, after in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        name, joined, value = word.partition("=")
        if name == flag:
            return value if joined else after
    return None


def _overview(group: str = "") -> str:
    rows = {name: row.help for name, row in COMMANDS.items() if not group or name.split()[0] == group}
    width = max(map(len, rows or COMMANDS)) + 2
    lines = [f"usage: {PROG} COMMAND [flags]      ({PROG} COMMAND --help lists the flags)", ""]
    return "\n".join(lines + [f"  {name:<{width}}{text}" for name, text in (rows or COMMANDS).items()])


def _preset_of_run(argv: Sequence[str]) -> str:
    """What to say where the preset of a run that is to go on was left out."""
    run = _value(argv, "--out")
    if run is None or not (Path(run) / RECIPE).is_file():
        return _unknown(["pretrain"])
    return f"pretrain needs the preset that {run} was started with: {go_on(Path(run))}"


def _unknown(words: Sequence[str]) -> str:
    command = " ".join(words)
    if not words:
        return f"no command was given: {PROG} --help lists them"
    groups = {name.split()[0] for name in COMMANDS}
    if words[0] in groups:
        seconds = [name.split()[1] for name in COMMANDS if name.startswith(words[0] + " ")]
        if len(words) == 1:
            return f"{words[0]} needs one of {', '.join(seconds)} after it: {PROG} {words[0]} {seconds[0]}"
        near = difflib.get_close_matches(words[1], seconds, 1, 0.4)
        return _nearest(command, [f"{words[0]} {near[0]}"] if near else [], f"{words[0]} takes {', '.join(seconds)}")
    near = difflib.get_close_matches(command, COMMANDS, 1) or difflib.get_close_matches(words[0], sorted(groups), 1)
    return _nearest(command, near, f"{PROG} --help lists the commands")


def _nearest(command: str, near: Sequence[str], otherwise: str) -> str:
    return f"there is no command '{command}': " + (f"perhaps you meant '{near[0]}'" if near else otherwise)


def load(name: str) -> Any:
    """The object that "module:name" names."""
    module, attribute = name.split(":")
    return getattr(importlib.import_module(module), attribute)


def _exit_code(error: Exception) -> int | None:
    """None for a bug: our code raises ValueError for users only, so one that a library raised is a mistake of ours."""
    if isinstance(error, OSError):
        return 2 if error.filename is not None else None
    here = error.__traceback__
    while here is not None and here.tb_next is not None:
        here = here.tb_next
    raised_by = here.tb_frame.f_globals.get("__name__", "") if here else ""
    return getattr(error, "exit_code", 2 if raised_by.split(".")[0] == PROG else None)


def complain(error: Exception) -> int:
    """Print one line about a user's mistake and return its exit code; what is no user's mistake is raised again."""
    code = _exit_code(error)
    if code is None:
        raise error
    if isinstance(error, OSError):
        error = UsageError(f"{error.filename}: {error.strerror}: check the path, its permissions and the disk")
    rank = os.environ.get("RANK", "0")
    # Every rank finds the same mistake in the same flags; what happens to one rank alone, that rank reports.
    if rank == "0" or not isinstance(error, (RecipeError, UsageError)):
        where = f" (rank {rank})" if rank != "0" else ""
        print(f"{PROG}: error{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return code


def list_presets(options: Any) -> None:
    """`presets`: name, purpose and main settings of each; or one as a TOML file to start from."""
    if options.toml is not None:
        if options.toml not in PRESETS:
            raise UsageError(f"there is no preset {options.toml}: use one of {', '.join(PRESETS)}")
        print(recipe_file.toml(options.toml))
        return
    for name, (about, recipe) in PRESETS.items():
        print(f"{name}\n    {about}\n    {_in_short(recipe)}")


def _in_short(recipe: Recipe) -> str:
    keys = {"queue": f"queue of {recipe.queue_size}", "bank": f"{recipe.queue_size} of a bank", "batch": "its batch"}
    return (
        f"{recipe.arch}, {recipe.crop_size} px, batch {recipe.batch_size}, {keys[recipe.dictionary]}, "
        f"T {recipe.temperature:g}, {recipe.epochs or '20 to 400'} epochs, {recipe.optimizer}"
    )


def synthesise_data(options: Any) -> None:
    """`data synth`: write the embedded image set."""
    from fastmoco.data import synthetic

    print(synthetic.make(options.path))
