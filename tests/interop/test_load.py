"""Imports: round trips are bit-equal, published files go on as their authors' code would, foreign ones are refused."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from fastmoco.cli import main
from fastmoco.contrast.step import Step
from fastmoco.encoder import build_encoder
from fastmoco.interop import load
from fastmoco.interop.export import export
from fastmoco.interop.foreign import ForeignFileError
from fastmoco.options import Import
from fastmoco.parallel import Parallel
from fastmoco.runs import run_folder


def published_code():
    """The published algorithm as tests/contrast/test_parity.py writes it, in float64 and with none of our step."""
    path = Path(__file__).parent.parent / "contrast/test_parity.py"
    spec = importlib.util.spec_from_file_location("parity_oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def differing(one: dict, other: dict) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]


def bring_in(content: dict, folder: Path, **options) -> load.ImportedRun:
    torch.save(content, folder / "a.pth.tar")
    return load.convert(load.foreign.read(folder / "a.pth.tar"), Import(folder / "a.pth.tar", folder / "b", **options))


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16])
def test_export_then_import_is_bit_equal(make_run, make_recipe, tmp_path, head, queue_dtype):
    make_run(tmp_path / "a", make_recipe(head), queue_dtype=queue_dtype)
    export(tmp_path / "a", "moco", tmp_path / "a.pth.tar")
    assert main(["import", str(tmp_path / "a.pth.tar"), "--out", str(tmp_path / "b")]) == 0
    before, after = run_folder.load(tmp_path / "a"), run_folder.load(tmp_path / "b")
    assert differing(before.state, after.state) == []
    assert (before.step, before.recipe, before.precision) == (after.step, after.recipe, after.precision)


def test_without_our_flag_the_owed_update_is_applied(make_run, make_recipe, tmp_path):
    """The control of the round trip, and the arithmetic of what the published order owes."""
    recipe = make_recipe()
    state = make_run(tmp_path / "a", recipe)
    content = torch.load(export(tmp_path / "a", "moco", tmp_path / "x.pth.tar"), weights_only=True)
    del content["fastmoco"]
    run = bring_in(content, tmp_path, batch_size=32)
    assert run.step == 7 and run.preset == "v2" and run.notes == []
    for name, value in run.state.items():
        if name.startswith("encoder_k.") and "running" not in name and "num_batches" not in name:
            k, q = state[name].double(), state[name.replace("encoder_k", "encoder_q")].double()
            torch.testing.assert_close(value.double(), 0.999 * k + (1 - 0.999) * q, rtol=0, atol=2e-7)
            assert not torch.equal(value, state[name])
        elif name != "queue_count":
            assert torch.equal(value, state[name]), name
    assert run.recipe.queue_size == 20 and run.recipe.head == "mlp" and run.recipe.dim == 16


def test_a_published_checkpoint_goes_on_as_the_published_code(make_recipe, tmp_path):
    """Three steps of the published code, its checkpoint, then three steps here and there, in float64."""
    code = published_code()
    recipe = make_recipe("mlp", batch_size=16, queue_size=40)
    theirs = code.Published(recipe, fp64_start(recipe), torch.float64)
    draw = torch.Generator().manual_seed(3)

    def views() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return list(torch.randn(2, 16, 3, 12, 12, generator=draw, dtype=torch.float64)), [torch.arange(16)]

    for _ in range(3):
        theirs.step(*views())
    run = bring_in(checkpoint_of(theirs, recipe), tmp_path, batch_size=32)
    ours = ours_from(run, recipe)
    reload_in_fp32(theirs)
    for step in range(3):
        pair, shuffle = views()
        loss, keys = continue_ours(ours, recipe, pair)
        expected = theirs.step(pair, shuffle)
        # The owed update was made in fp32 here and in float64 there: half an fp32 digit of the keys' weights.
        torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0, msg=lambda text: f"step {step}: {text}")
    theirs.update_keys()
    for name, value in theirs.k.items():
        torch.testing.assert_close(ours.update.k[name], value.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.dictionary.queue.keys, theirs.queue.T, rtol=0, atol=1e-5)
    assert int(ours.dictionary.queue.pointer) == theirs.pointer


def test_without_the_owed_update_it_goes_on_elsewhere(monkeypatch, make_recipe, tmp_path):
    """The control: leave the update out and the first loss is another."""
    code = published_code()
    recipe = make_recipe("mlp", batch_size=16, queue_size=40, ema_momentum=0.9)
    theirs = code.Published(recipe, fp64_start(recipe), torch.float64)
    draw = torch.Generator().manual_seed(3)
    pair = list(torch.randn(2, 16, 3, 12, 12, generator=draw, dtype=torch.float64))
    for _ in range(2):
        theirs.step(pair, [torch.arange(16)])
    monkeypatch.setattr(load, "_owed_update", lambda state, momentum: None)
    ours = ours_from(bring_in(checkpoint_of(theirs, recipe), tmp_path, batch_size=32), recipe)
    reload_in_fp32(theirs)
    loss, _ = continue_ours(ours, recipe, pair)
    expected = theirs.step(pair, [torch.arange(16)])
    assert (loss - expected).abs() > 1e-4 * expected


def fp64_start(recipe) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in Step(recipe, Parallel(), "fp64").state().items()}


def checkpoint_of(theirs, recipe) -> dict:
    """What upstream's save_checkpoint would write, from the oracle and torch's own optimiser layout."""
    weights = {"module.queue": theirs.queue.float(), "module.queue_ptr": torch.tensor([theirs.pointer])}
    for side, net in (("encoder_q", theirs.nets_q[0]), ("encoder_k", theirs.nets_k[0])):
        weights |= {
            f"module.{side}.{name}": value.float() if value.is_floating_point() else value
            for name, value in net.state_dict().items()
        }
    order = [name for name, _ in theirs.nets_q[0].named_parameters()]
    buffers = {index: {"momentum_buffer": theirs.velocity[name].float()} for index, name in enumerate(order)}
    groups = [{"lr": 0.03, "momentum": 0.9, "weight_decay": recipe.weight_decay, "params": list(range(2 * len(order)))}]
    return {
        "epoch": 1,
        "arch": "resnet18",
        "state_dict": weights,
        "optimizer": {"state": buffers, "param_groups": groups},
    }


def reload_in_fp32(theirs) -> None:
    """The oracle goes on from the numbers that the file holds."""
    with torch.no_grad():
        for value in [*theirs.q.values(), *theirs.k.values(), *theirs.velocity.values(), theirs.queue]:
            value.copy_(value.float().double())


def ours_from(run: load.ImportedRun, recipe) -> Step:
    ours = Step(recipe, Parallel(), "fp64")
    ours.load(run.state)
    return ours


def continue_ours(ours: Step, recipe, pair: list[torch.Tensor]):
    """One step of ours on given views; the key batch is not shuffled, as in the oracle's call above."""
    z_k = torch.nn.functional.normalize(ours.encoder_k(pair[1]).detach(), dim=1)
    z_q = ours.encoder_q(pair[0])
    from fastmoco.kernels import reference

    losses, _ = reference.info_nce(z_q, z_k, ours.dictionary.queue.keys, recipe.temperature)
    ours.update.lr.fill_(0.03)
    ours.update.backward(losses.mean())
    ours.update.apply()
    ours.dictionary.queue.enqueue(z_k)
    return losses.mean().detach(), z_k


def test_an_imported_run_is_resumed_evaluated_and_exported(make_recipe, make_run, tmp_path, capsys):
    recipe = make_recipe("linear", width=0.25, stem="imagenet")
    make_run(tmp_path / "a", recipe)
    content = torch.load(export(tmp_path / "a", "moco", tmp_path / "x.pth.tar"), weights_only=True)
    del content["fastmoco"]
    torch.save(content, tmp_path / "published.pth.tar")
    images = make_images(tmp_path / "images", 70)
    argv = ["--out", str(tmp_path / "b"), "--data", str(images), "--batch-size", "32", "--epochs", "2"]
    assert main(["import", str(tmp_path / "published.pth.tar"), *argv]) == 0
    facts = json.loads((tmp_path / "b/recipe.json").read_text())
    assert facts["imported"]["file"] == "published.pth.tar" and len(facts["imported"]["sha256"]) == 64
    assert run_folder.load(tmp_path / "b").step == content["epoch"] * 2  # two steps an epoch of 70 images
    resume = ["pretrain", "v1", "--resume", "--out", str(tmp_path / "b"), "--device", "cpu", "--threads", "1"]
    assert main([*resume, "--stop-after", "3"]) == 0
    assert run_folder.load(tmp_path / "b").step == 3
    assert main(["export", str(tmp_path / "b"), "--out", str(tmp_path / "c.pth")]) == 0


def make_images(folder: Path, count: int) -> Path:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    random = np.random.RandomState(0)
    for number in range(count):
        Image.fromarray(random.randint(0, 255, (20, 20, 3), np.uint8)).save(folder / f"{number}.jpg")
    return folder


def test_plain_weights_start_both_encoders(make_recipe, tmp_path):
    encoder = build_encoder(make_recipe(seed=9))
    weights = {f"module.{name}": value for name, value in encoder.state_dict().items()}
    run = bring_in({"state_dict": weights, "arch": "resnet18"}, tmp_path)
    assert run.step == 0 and "fresh projection head" in run.notes[0]
    for name, value in encoder.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(run.state[f"encoder_q.{name}"], value)
            assert torch.equal(run.state[f"encoder_k.{name}"], value)
    assert run.recipe.queue_size == 65536 and run.state["queue_count"] == 0
    del weights["module.layer2.0.bn1.weight"]
    with pytest.raises(ForeignFileError, match="lacks layer2.0.bn1.weight"):
        bring_in({"state_dict": weights}, tmp_path)


def listed(name: str) -> str:
    """lightly's name: the number of torchvision's child in place of its name."""
    stages = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    first, dot, rest = name.partition(".")
    return stages.get(first, first) + dot + rest


WRITERS = {
    "solo-learn": lambda net: (
        {f"backbone.{k}": v for k, v in net.items()}
        | {f"momentum_backbone.{k}": v + 1 for k, v in net.items()}
        | {"projector.0.weight": torch.zeros(3)}
    ),
    "mmselfsup": lambda net: {f"backbone.{k}": v for k, v in net.items()} | {"neck.mlp.0.weight": torch.zeros(3)},
    "Lightning": lambda net: {f"model.encoder.{k}": v for k, v in net.items()},
    "SwAV": lambda net: {f"module.{k}": v for k, v in net.items()} | {"module.prototypes.weight": torch.zeros(3)},
    "teacher first": lambda net: (
        {f"teacher.{k}": v + 1 for k, v in net.items()} | {f"student.{k}": v for k, v in net.items()}
    ),
    "lightly": lambda net: (
        {f"backbone.{listed(k)}": v for k, v in net.items()} | {"projection_head.layers.0.weight": torch.zeros(3)}
    ),
    "a list of children": lambda net: {listed(k): v for k, v in net.items()},
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_network_within_other_programs_models_is_found(make_recipe, tmp_path, writer):
    net = build_encoder(make_recipe(seed=9)).state_dict()
    body = {name: value for name, value in net.items() if not name.startswith("fc.")}
    found = bring_in({"state_dict": WRITERS[writer](body)}, tmp_path)
    for name, value in body.items():
        assert torch.equal(found.state[f"encoder_q.{name}"], value), name
    assert ("other parts" in " ".join(found.notes)) == (writer == "SwAV")


def test_a_network_with_more_in_its_blocks_is_no_residual_network_of_ours(make_recipe, tmp_path):
    net = build_encoder(make_recipe(seed=9)).state_dict()
    weights = {f"backbone.{name}": value for name, value in net.items() if not name.startswith("fc.")}
    weights["backbone.layer1.0.se.fc1.weight"] = torch.zeros(3)
    with pytest.raises(ForeignFileError, match="an unknown encoder_q.layer1.0.se.fc1.weight"):
        bring_in({"state_dict": weights}, tmp_path)


@pytest.mark.parametrize("lost", ["optimizer", "queue", "encoder_k"])
def test_what_a_file_lacks_is_said(make_run, make_recipe, tmp_path, lost):
    make_run(tmp_path / "a", make_recipe())
    content = torch.load(export(tmp_path / "a", "moco", tmp_path / "x.pth.tar"), weights_only=True)
    del content["fastmoco"]
    content.pop(lost, None)
    weights = content["state_dict"].items()
    content["state_dict"] = {name: value for name, value in weights if not name.startswith(f"module.{lost}")}
    run = bring_in(content, tmp_path, batch_size=32)
    says = {"optimizer": "no optimiser", "encoder_k": "no key encoder", "queue": "no queue"}[lost]
    assert len(run.notes) == 1 and says in run.notes[0]
    ours = Step(run.recipe, Parallel(), "fp32")
    ours.load(run.state)


def spoil(content: dict, how: str) -> dict:
    weights = content["state_dict"]
    if how == "nan":
        weights["module.encoder_q.layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    elif how == "shape":
        weights["module.encoder_k.fc.2.weight"] = torch.zeros(3, 3)
    elif how == "v3":
        content["state_dict"] = {"module.base_encoder.conv1.weight": torch.zeros(1)}
    elif how == "other network":
        content["state_dict"] = {"module.encoder_q.patch_embed.weight": torch.zeros(1)}
    elif how == "nothing":
        content["state_dict"] = {}
    elif how == "headless":
        content["state_dict"] = {name: value for name, value in weights.items() if ".fc." not in name}
    return content


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("nan", "holds infinite or NaN"),
        ("shape", "another shape of encoder_k.fc.2.weight"),
        ("v3", "MoCo v3"),
        ("other network", "no network that fastmoco knows"),
        ("nothing", "no weights"),
        ("headless", "no projection head"),
    ],
)
def test_foreign_files_are_one_line_and_exit_3(make_run, make_recipe, tmp_path, how, says, capsys):
    make_run(tmp_path / "a", make_recipe())
    content = torch.load(export(tmp_path / "a", "moco", tmp_path / "x.pth.tar"), weights_only=True)
    del content["fastmoco"]
    torch.save(spoil(content, how), tmp_path / "bad.pth.tar")
    assert main(["import", str(tmp_path / "bad.pth.tar"), "--out", str(tmp_path / "b"), "--batch-size", "32"]) == 3
    output = capsys.readouterr().err
    assert says in output and output.count("\n") == 1 and not (tmp_path / "b").exists()


class Malicious:
    """Makes a folder when it is unpickled carelessly."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.mkdir, (self.trace,)


def do_harm(data: bytes, how: str) -> bytes:
    if how == "flipped":
        data = bytearray(data)
        data[len(data) // 2] ^= 4
        return bytes(data)
    return {"cut": data[: len(data) // 2], "empty": b"", "page": b"<html>404</html>"}[how]


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "page", "malicious"])
def test_damaged_and_malicious_files_are_one_line_and_exit_3(make_run, make_recipe, tmp_path, how, capsys):
    make_run(tmp_path / "a", make_recipe())
    path, trace = export(tmp_path / "a", "moco", tmp_path / "x.pth.tar"), tmp_path / "trace"
    argv = ["import", str(path), "--out", str(tmp_path / "b")]
    if how == "malicious":
        content = torch.load(path, weights_only=True)
        torch.save(content | {"epoch": Malicious(trace)}, path)
    else:
        path.write_bytes(do_harm(path.read_bytes(), how))
    assert main(argv) == 3
    output = capsys.readouterr().err
    assert output.startswith("fastmoco: error: ") and str(path) in output and output.count("\n") == 1
    assert not (tmp_path / "b").exists() and not trace.exists()


STRANGE = [None, 7, "text", [1, {}], {0: 1}, torch.zeros(2)]


@pytest.mark.parametrize("own", [False, True])
def test_strange_things_under_right_names_are_refused_or_made_up_for(make_run, make_recipe, tmp_path, own):
    """Every entry of a checkpoint replaced by everything it should not be: no traceback, ever."""
    make_run(tmp_path / "a", make_recipe())
    path = export(tmp_path / "a", "moco", tmp_path / "x.pth.tar")
    places = [
        ("epoch",),
        ("optimizer",),
        ("optimizer", "state"),
        ("optimizer", "param_groups"),
        ("state_dict",),
        ("optimizer", "state", 0),
        ("optimizer", "state", 0, "momentum_buffer"),
        ("state_dict", "module.queue"),
        ("state_dict", "module.queue_ptr"),
        ("state_dict", "module.encoder_q.bn1.num_batches_tracked"),
        ("state_dict", "module.encoder_q.fc.2.weight"),
        ("state_dict", "module.encoder_k.conv1.weight"),
    ]
    if own:
        places = [("fastmoco", name) for name in ("recipe", "step", "precision", "queue_dtype", "rest")]
    whole, outcomes = torch.load(path, weights_only=True), set()
    for place in places:
        for strange in STRANGE:
            content = copy.deepcopy(whole)
            if not own:
                del content["fastmoco"]
            inner = content
            for name in place[:-1]:
                inner = inner[name]
            inner[place[-1]] = strange
            try:
                load.convert(content, Import(path, tmp_path / "b", batch_size=None if own else 32))
                outcomes.add("taken")
            except ForeignFileError:
                outcomes.add("refused")
    assert "refused" in outcomes


def test_our_own_files_are_checked_too(make_run, make_recipe, tmp_path):
    make_run(tmp_path / "a", make_recipe())
    content = torch.load(export(tmp_path / "a", "moco", tmp_path / "x.pth.tar"), weights_only=True)
    del content["fastmoco"]["queue_dtype"]
    with pytest.raises(ForeignFileError, match="export it again"):
        bring_in(content, tmp_path)


def test_our_own_files_bring_their_recipe(make_run, make_recipe, tmp_path, capsys):
    make_run(tmp_path / "a", make_recipe())
    argv = ["import", str(export(tmp_path / "a", "moco", tmp_path / "x.pth.tar")), "--out", str(tmp_path / "b")]
    for more in (["--epochs", "9"], ["--batch-size", "32"], ["--preset", "v1"]):
        assert main([*argv, *more]) == 2 and not (tmp_path / "b").exists()
        assert f"brings its recipe: leave {more[0]} out" in capsys.readouterr().err
    assert main(argv) == 0  # the control


def test_nothing_is_overwritten(make_run, make_recipe, tmp_path, capsys):
    make_run(tmp_path / "a", make_recipe())
    export(tmp_path / "a", "moco", tmp_path / "x.pth.tar")
    assert main(["import", str(tmp_path / "x.pth.tar"), "--out", str(tmp_path / "a")]) == 2
    assert "exists" in capsys.readouterr().err
