"""The command line: its surface is frozen in golden files, its help is instant, its mistakes are one line."""

import ast
import gc
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

from fastmoco import cli
from fastmoco.cli import COMMANDS, main, parse
from fastmoco.options import Options, Pretrain, PretrainFlags, UsageError
from fastmoco.presets import PRESETS
from fastmoco.recipe import Recipe

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def flags_of(options, default=None) -> list[str]:
    """Each flag with its default, nested dataclasses flattened, as the command line has them."""
    lines = []
    for field in fields(options):
        value = getattr(default, field.name) if default is not None else field.default
        if is_dataclass(value):
            lines += flags_of(type(value), value)
        else:
            positional = default is None and field.default is field.default_factory
            lines.append(field.name.upper() if positional else f"--{field.name.replace('_', '-')} {value}")
    return lines


def surface() -> str:
    text = []
    for name, command in COMMANDS.items():
        preset = name.removeprefix("pretrain ") if name.startswith("pretrain ") else None
        default = PretrainFlags(recipe=PRESETS[preset][1]) if preset else None
        text += [f"{name}: {command.help}", *(f"  {line}" for line in flags_of(cli.load(command.options), default)), ""]
    return "\n".join(text)


def test_the_flags_and_defaults_are_those_of_the_golden_file():
    """A flag is a promise. Where a change is meant: FASTMOCO_WRITE_GOLDEN=1 python -m pytest tests/test_cli.py"""
    path = GOLDEN / "flags.txt"
    if os.environ.get("FASTMOCO_WRITE_GOLDEN"):
        path.write_text(surface())
    assert surface() == path.read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_flag_with_its_doc(name, capsys):
    assert main([*name.split(), "--help-all"]) == 0
    output = capsys.readouterr().out
    kind = cli.load(COMMANDS[name].options)
    default = PretrainFlags() if name.startswith("pretrain ") else None
    for line in flags_of(kind, default):
        assert not line.startswith("--") or line.split()[0] in output, line
    words = " ".join(re.sub(r"[│╭╰─╮╯]", " ", output).split())
    if kind is PretrainFlags:
        assert "Multiplier of every channel count of the encoder." in words
        assert "Probability of a Gaussian blur." in words and "Newest checkpoints that are kept" in words


def test_every_row_of_the_table_can_be_loaded():
    for name, command in COMMANDS.items():
        module, function = command.run.split(":")
        assert callable(getattr(importlib.import_module(module), function)), name
        assert is_dataclass(cli.load(command.options)), name


@pytest.mark.parametrize("collecting", [True, False])
def test_a_command_is_imported_without_looking_for_garbage(collecting, tmp_path, monkeypatch):
    """Nor is what was imported looked at while the command runs; afterwards the collector is as it was before."""
    name = f"imported_{collecting}"
    (tmp_path / f"{name}.py").write_text(
        "import gc\nwhile_imported = gc.isenabled()\n"
        "def run(options):\n    global then\n    then = gc.isenabled(), gc.get_freeze_count() > 1000\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "env", COMMANDS["env"]._replace(run=f"{name}:run"))
    if not collecting:
        gc.disable()
    try:
        assert main(["env"]) == 0
        module = sys.modules[name]
        assert (module.while_imported, *module.then) == (False, collecting, True)
        assert main(["env", "--no-such-flag"]) == 2
        assert (gc.isenabled(), gc.get_freeze_count()) == (collecting, 0)
    finally:
        gc.enable()


def test_help_of_every_command_is_instant_and_imports_no_torch():
    for name in ["", *COMMANDS]:
        code = f"import sys; from fastmoco.cli import main; main({[*name.split(), '--help']!r}); "
        code += "print(sorted({'torch', 'numpy', 'nvidia', 'matplotlib', 'triton'} & set(sys.modules)))"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        output = python(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert ast.literal_eval(output.splitlines()[-1]) == [], name
        # Processor time, which other work on the machine does not change: 0.2 s measured, torch alone takes 2 s.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.6, name


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "usage"),
        (["pretain", "v2"], "perhaps you meant 'pretrain v2'"),
        (["pretrain", "v3"], "perhaps you meant 'pretrain v2'"),
        (["pretrain"], "needs one of v1, v2, cifar, simclr, simclr-cifar, end-to-end, bank, small, demo"),
        (["frobnicate"], "--help lists the commands"),
        (["--frobnicate"], "no command was given"),
        (["pretrain", "v2", "--batchsize", "64"], "--batch-size"),
        (["pretrain", "v2", "--temprature", "1"], "--temperature"),
        (["pretrain", "v2", "--log-every", "often"], "--log-every"),
        (["pretrain", "v2", "--batch-size", "300"], "use --batch-size 288 or 320"),
        (["pretrain", "v2", "--queue-size", "0"], "queue_size is 0: use a whole number of at least 1"),
        (["pretrain", "v2", "--blur-p", "2"], "blur_p is 2.0: use a probability from 0 to 1"),
        (["pretrain", "v2", "--keep", "1"], "--keep is 1: use a number of at least 2"),
        (["pretrain", "v2", "--timeout-seconds", "inf"], "--timeout-seconds is inf: use a number from 0 to 1000000000"),
        (
            ["pretrain", "v2", "--watchdog-seconds", "nan"],
            "--watchdog-seconds is nan: use a number from 0 to 1000000000",
        ),
        (["evaluate", "finetune", "x", "--timeout-seconds", "inf"], "use a number from 1 to 1000000000"),
        (["pretrain", "v2", "--out", "x"], "needs --data"),
        (["pretrain", "v2", "--resume"], "--out RUN"),
        (["evaluate", "knn"], "PATH"),
        (["evaluate", "knn", "/nonexistent"], "is no run"),
        (["data", "scan", "/nonexistent"], "no such folder"),
    ],
)
def test_wrong_use_exits_2_and_says_what_to_do(argv, says, capsys):
    assert main(argv) == 2
    output = capsys.readouterr()
    assert says in output.err + output.out
    if "error:" in output.err:
        assert output.err.count("\n") == 1, "one line"


def test_values_reach_the_recipe_and_the_options(tmp_path):
    flags = "--batch-size 512 --lr 0.1 --crop-scale 0.1 0.9 --milestones 3 4 --symmetric --no-shuffle-bn --hue 0.2"
    argv = ["pretrain", "v2", "--data", str(tmp_path), "--out", str(tmp_path / "x"), *flags.split(), "--keep", "5"]
    command, settings = parse(argv)
    assert command.distributed and isinstance(settings, Pretrain) and settings.preset == "v2"
    v2 = PRESETS["v2"][1]
    assert settings.recipe == replace(
        v2,
        batch_size=512,
        lr=0.1,
        milestones=(3, 4),
        symmetric=True,
        shuffle_bn=False,
        augmentation=replace(v2.augmentation, crop_scale=(0.1, 0.9), hue=0.2),
    )
    assert settings.options == Options(data=tmp_path, out=tmp_path / "x", keep=5)


def start_run(run: Path, recipe: Recipe, preset: str = "v2") -> Path:
    run.mkdir()
    facts = {"preset": preset, "recipe": recipe.as_dict(), "options": {"data": "/images", "val": None}}
    (run / "recipe.json").write_text(json.dumps(facts))
    return run


def test_resume_takes_the_recipe_of_the_run(tmp_path):
    recipe = replace(PRESETS["v2"][1], batch_size=64, temperature=0.3)
    argv = ["pretrain", "v2", "--resume", "--out", str(start_run(tmp_path / "run", recipe))]
    settings = parse(argv)[1]
    assert settings.recipe == recipe and settings.options.data == Path("/images")
    assert parse([*argv, "--knn-k", "7", "--data", "/moved"])[1].recipe == replace(recipe, knn_k=7)
    with pytest.raises(UsageError, match="started with temperature 0.3, not 0.2"):
        parse([*argv, "--temperature", "0.2"])
    with pytest.raises(UsageError, match="started with preset v2, not v1"):
        parse(["pretrain", "v1", *argv[2:]])
    (tmp_path / "run/recipe.json").write_text("{")
    with pytest.raises(UsageError, match="is damaged"):
        parse(argv)


def test_a_run_that_was_started_deterministic_stays_so(tmp_path):
    run = start_run(tmp_path / "run", PRESETS["v2"][1])
    facts = json.loads((run / "recipe.json").read_text())
    for before, after in (("off", "off"), ("on", "on"), (None, "off")):
        facts["options"] = {key: value for key, value in facts["options"].items() if key != "deterministic"}
        facts["options"] |= {} if before is None else {"deterministic": before}
        (run / "recipe.json").write_text(json.dumps(facts))
        assert parse(["pretrain", "v2", "--resume", "--out", str(run)])[1].options.deterministic == after


def test_a_run_from_before_lars_is_one_of_sgd(tmp_path):
    """Its recipe.json has no such fields; whoever resumes it can ask for nothing else."""
    run = start_run(tmp_path / "run", PRESETS["v2"][1])
    facts = json.loads((run / "recipe.json").read_text())
    assert (facts["recipe"].pop("optimizer"), facts["recipe"].pop("lars_eta")) == ("sgd", 0.001)
    (run / "recipe.json").write_text(json.dumps(facts))
    argv = ["pretrain", "v2", "--resume", "--out", str(run)]
    assert parse(argv)[1].recipe == parse([*argv, "--optimizer", "sgd"])[1].recipe == PRESETS["v2"][1]
    with pytest.raises(UsageError, match="started with optimizer sgd, not lars"):
        parse([*argv, "--optimizer", "lars"])
    with pytest.raises(UsageError, match="started with lars_eta 0.001, not 0.002"):
        parse([*argv, "--lars-eta", "0.002"])


def test_a_run_is_never_overwritten(tmp_path, capsys):
    run = start_run(tmp_path / "run", PRESETS["v2"][1])
    before = (run / "recipe.json").read_bytes()
    assert main(["pretrain", "v2", "--data", str(tmp_path), "--out", str(run)]) == 2
    assert "exists: continue it with --resume, or give --out another name" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["recipe.json"] and (run / "recipe.json").read_bytes() == before


def test_bad_data_leaves_nothing_behind(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    assert main(["pretrain", "v2", "--data", str(tmp_path / "images"), "--out", str(tmp_path / "run")]) == 2
    output = capsys.readouterr().err
    assert "no images" in output and output.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(_):
        return int("seven")  # a ValueError that a library raised

    monkeypatch.setattr(cli, "load", lambda name: broken if name.endswith(":run") else cli_load(name))
    with pytest.raises(ValueError, match="seven"):
        main(["env"])


cli_load = cli.load


def launch(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "launch.py", *argv],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_the_launcher_checks_before_it_starts_anything():
    for argv, says in (
        (["--nproc", "0", "env"], "--nproc is 0"),
        (["--nproc"], "--nproc needs a value"),
        (["--nproc", "2", "pretrain", "v2"], "needs --data"),
        (["pretrain", "v2", "--batchsize", "3"], "--batch-size"),
    ):
        result = launch(*argv)
        assert result.returncode == 2 and says in result.stderr, argv


def test_the_launcher_passes_torchruns_flags_on():
    spec = importlib.util.spec_from_file_location("launch", ROOT / "launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    argv = ["--nnodes", "2", "--nproc=4", "--rdzv-backend=c10d", "pretrain", "v2", "--out", "x"]
    assert module.split(argv) == ("4", ["--nnodes=2", "--rdzv-backend=c10d"], ["pretrain", "v2", "--out", "x"])
    assert len((ROOT / "launch.py").read_text().splitlines()) < 80


def test_env_prints_json():
    command = [sys.executable, "-m", "fastmoco", "env", "--json"]
    facts = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60).stdout)
    assert {"torch", "python", "nvidia-dali-cuda130", "cores", "commit", "processor"} <= facts.keys()


@pytest.mark.parametrize("command", [["--help"], ["env"], ["pretrain", "v2", "--help-all"], ["data", "scan", "images"]])
def test_a_reader_that_goes_away_ends_a_command_without_a_word(tmp_path, command):
    if "scan" in command:
        pytest.importorskip("nvidia.dali")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images/a.png")
    reader, writer = os.pipe()
    os.close(reader)
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    where = {"cwd": tmp_path, "stdout": writer, "stderr": subprocess.PIPE, "text": True, "env": here}
    result = subprocess.run([sys.executable, "-m", "fastmoco", *command], **where)
    os.close(writer)
    assert result.stderr == "" and result.returncode == 141


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("{} data scan images >&-", 0, ""),
        ("{} data scan images >&- 2>&-", 0, ""),
        ("{} data scan images > /dev/full", 1, "fastmoco: error: cannot write: No space left on device"),
        ("ulimit -f 0; {} data scan images --json a.json", 1, "fastmoco: error: cannot write: File too large"),
        ("{} data scan images <&- > /dev/null", 0, ""),
        ("{} data scan images --json images", 2, "--json is 'images': name a file, not a folder"),
        ("{} data scan images --json new/a.json > /dev/null; test -s new/a.json", 0, ""),
    ],
)
def test_a_shell_that_closes_or_fills_what_is_written_to(tmp_path, shell, code, said):
    pytest.importorskip("nvidia.dali")
    Image.new("RGB", (8, 8)).save((tmp_path / "images.png"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images.png").rename(tmp_path / "images/a.png")
    command = shell.format(f"{sys.executable} -m fastmoco")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert said in done.stderr and done.stderr.count("\n") <= 1


@pytest.mark.parametrize("columns", ["1", "0", "7", "abc", "-3", "100000"])
@pytest.mark.parametrize("command", ["pretrain v2 --help", "embed --help"])
def test_help_ends_at_any_width(columns, command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(command.split()) == 0
    assert "--data" in capsys.readouterr().out and os.environ["COLUMNS"] == columns
