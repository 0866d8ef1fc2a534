"""Exports as the libraries they are for read them: names and shapes by each one's own rule, and the libraries
themselves where they are installed (timm, which brings torchvision)."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastmoco.encoder import Encoder, build_encoder
from fastmoco.interop.export import export
from fastmoco.runs import run_folder
from fastmoco.runs.run_folder import SavedRun

Shapes = dict[str, tuple[int, ...]]
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
NORM = ("weight", "bias", "running_mean", "running_var")


def conv_and_norm(conv: str, norm: str, shape: tuple[int, ...]) -> Shapes:
    named = {f"{norm}.{field}": shape[:1] for field in NORM}
    return {f"{conv}.weight": shape, **named, f"{norm}.num_batches_tracked": ()}


def convolutions(arch: str) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """(stage from 1, block from 0, convolution from 1, 0 for the shortcut, shape): He et al., 2016, table 1."""
    entry, deep = 64, arch == "resnet50"
    for stage, blocks in enumerate(BLOCKS[arch], start=1):
        width = 64 * 2 ** (stage - 1)
        out = 4 * width if deep else width
        for block in range(blocks):
            inner = ((width, entry, 1, 1), (width, width, 3, 3), (out, width, 1, 1))
            inner = inner if deep else ((width, entry, 3, 3), (out, width, 3, 3))
            yield from ((stage, block, number, shape) for number, shape in enumerate(inner, start=1))
            if entry != out:
                yield stage, block, 0, (out, entry, 1, 1)
            entry = out


def torchvision_shapes(arch: str) -> Shapes:
    shapes = conv_and_norm("conv1", "bn1", (64, 3, 7, 7))
    for stage, block, number, shape in convolutions(arch):
        at = f"layer{stage}.{block}"
        names = (f"{at}.conv{number}", f"{at}.bn{number}") if number else (f"{at}.downsample.0", f"{at}.downsample.1")
        shapes |= conv_and_norm(*names, shape)
    return shapes


def detectron2_shapes(arch: str) -> Shapes:
    """A convolution of detectron2 owns its norm; its stages are counted from 2."""
    shapes = conv_and_norm("stem.conv1", "stem.conv1.norm", (64, 3, 7, 7))
    for stage, block, number, shape in convolutions(arch):
        conv = f"res{stage + 1}.{block}." + (f"conv{number}" if number else "shortcut")
        shapes |= conv_and_norm(conv, f"{conv}.norm", shape)
    return shapes


@pytest.fixture(params=["resnet18", "resnet50"])
def encoder(request, make_recipe, monkeypatch) -> Encoder:
    """A network whose weights and statistics are unlike their start, as the run that `export` finds."""
    recipe = make_recipe("linear", arch=request.param, width=1.0, stem="imagenet", crop_size=64)
    encoder = build_encoder(recipe).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in encoder.state_dict().items():
            if "bn" in name or "downsample.1" in name:
                value.fill_(7) if name.endswith("tracked") else value.uniform_(0.5, 1.5, generator=generator)
    state = {
        f"{side}.{name}": value for side in ("encoder_q", "encoder_k") for name, value in encoder.state_dict().items()
    }
    state |= {f"velocity.{name}": value.detach() for name, value in encoder.named_parameters()}
    state |= {"queue": torch.zeros(20, 16), "queue_pointer": torch.zeros(1, dtype=torch.int64)}
    monkeypatch.setattr(run_folder, "load", lambda _: SavedRun(7, state, recipe, "fp32", {"steps": 20}))
    return encoder


def arch_of(encoder: Encoder) -> str:
    return "resnet50" if encoder.feature_dim == 2048 else "resnet18"


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def difference(encoder: Encoder, theirs: nn.Module) -> float:
    """Largest difference of their features in float64, as rounding differs in fp32; 0 up to float64's rounding."""
    ours, theirs = (
        copy.deepcopy(network).eval().to(dtype=torch.float64, memory_format=torch.channels_last)
        for network in (encoder, theirs)
    )
    x = images().to(dtype=torch.float64, memory_format=torch.channels_last)
    return round((ours.features(x) - theirs(x)).abs().max().item(), 12)


def test_torchvision_finds_every_name_with_its_shape(encoder, tmp_path):
    weights = torch.load(export(Path("run"), "torchvision", tmp_path / "a.pth"), weights_only=True)
    target = torchvision_shapes(arch_of(encoder))
    assert {name: tuple(value.shape) for name, value in weights.items()} == target
    assert len(target) == {"resnet18": 120, "resnet50": 318}[arch_of(encoder)]  # 122 and 320 with fc


def found_by_detectron2(model: Shapes, file: dict[str, np.ndarray]) -> dict[str, str]:
    """Its matching heuristics: a name of the model takes the longest name of the file that it is, or ends with after
    a dot; another shape is left out; one name of the file for two of the model is an error."""
    matches: dict[str, str] = {}
    for name, shape in model.items():
        near = [key for key in file if name == key or name.endswith(f".{key}")]
        best = max(near, key=len, default=None)
        if best is None or file[best].shape != shape:
            continue
        if best in matches.values():
            raise ValueError(f"{best} is ambiguous")
        matches[name] = best
    return matches


def detector(arch: str, kind: str) -> tuple[Shapes, set[str]]:
    """Weights of a whole detector (C4 of the MoCo paper, or FPN), and which of them are the backbone's."""
    own = detectron2_shapes(arch)
    last = own["res5.0.conv1.weight"][1] * 2
    place = {name: f"backbone.bottom_up.{name}" for name in own}
    rest = {
        f"backbone.fpn_{part}{level}.{field}": (256,)
        for part in ("lateral", "output")
        for level in range(2, 6)
        for field in ("weight", "bias", "norm.weight", "norm.bias")
    }
    if kind == "C4":
        place = {name: ("roi_heads." if name.startswith("res5") else "backbone.") + name for name in own}
        rest = {f"roi_heads.res5.norm.{field}": (last,) for field in (*NORM, "num_batches_tracked")}
    heads = ("rpn_head.conv", "rpn_head.objectness_logits", "rpn_head.anchor_deltas")
    rest |= {f"proposal_generator.{head}.{field}": (256,) for head in heads for field in ("weight", "bias")}
    heads = (
        "box_head.fc1",
        "box_predictor.cls_score",
        "box_predictor.bbox_pred",
        "mask_head.deconv",
        "box_head.conv1",
        "box_head.conv1.norm",
    )
    rest |= {f"roi_heads.{head}.{field}": (256,) for head in heads for field in ("weight", "bias")}
    return {place[name]: shape for name, shape in own.items()} | rest, set(place.values())


@pytest.mark.parametrize("kind", ["C4", "FPN"])
def test_detectron2_finds_the_whole_backbone_and_nothing_else(encoder, tmp_path, kind):
    content = pickle.loads(export(Path("run"), "detectron2", tmp_path / "a.pkl").read_bytes())
    file, (model, backbone) = content["model"], detector(arch_of(encoder), kind)
    # What its checkpointer takes without renaming: a "model" of arrays, an author other than Caffe2, heuristics on.
    assert content["matching_heuristics"] is True and content["__author__"] != "Caffe2"
    assert all(isinstance(value, np.ndarray) for value in file.values())
    actual = found_by_detectron2(model, file)
    assert set(actual) == backbone and set(actual.values()) == set(file)
    first = next(name for name in backbone if name.endswith("stem.conv1.weight"))
    assert (file[actual[first]] == encoder.conv1.weight.detach().numpy()).all()


class Normed(nn.Conv2d):
    """A convolution that owns its norm, as detectron2's do."""

    def __init__(self, shape: tuple[int, ...], stride: int = 1) -> None:
        super().__init__(shape[1], shape[0], shape[2], stride, padding=shape[2] // 2, bias=False)
        self.norm = nn.BatchNorm2d(shape[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x))


class NormedBlock(nn.Module):
    """Its residual block, with STRIDE_IN_1X1 False."""

    def __init__(self, shapes: dict[int, tuple[int, ...]], stride: int) -> None:
        super().__init__()
        self.order = sorted(number for number in shapes if number)
        for number in self.order:
            strided = shapes[number][2] == 3 and (number == 1 or len(self.order) == 3)
            self.add_module(f"conv{number}", Normed(shapes[number], stride if strided else 1))
        self.shortcut = Normed(shapes[0], stride) if 0 in shapes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for number in self.order[:-1]:
            y = torch.relu(getattr(self, f"conv{number}")(y))
        return torch.relu(getattr(self, f"conv{self.order[-1]}")(y) + self.shortcut(x))


class DetectronResnet(nn.Module):
    """Its backbone by its names, pooled as ours is."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = Normed((64, 3, 7, 7), stride=2)
        for stage, blocks in enumerate(BLOCKS[arch], start=1):
            shapes = [
                {n: shape for s, b, n, shape in convolutions(arch) if (s, b) == (stage, block)}
                for block in range(blocks)
            ]
            result = [NormedBlock(each, 2 if stage > 1 and at == 0 else 1) for at, each in enumerate(shapes)]
            self.add_module(f"res{stage + 1}", nn.Sequential(*result))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.stem.conv1(x)), 3, stride=2, padding=1)
        return self.res5(self.res4(self.res3(self.res2(x)))).mean((2, 3))


def test_a_network_of_detectron2s_names_computes_the_same(encoder, tmp_path):
    file = pickle.loads(export(Path("run"), "detectron2", tmp_path / "a.pkl").read_bytes())["model"]
    theirs = DetectronResnet(arch_of(encoder))
    shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert shapes == detectron2_shapes(arch_of(encoder))
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in file.items()}, strict=True)
    assert difference(encoder, theirs) == 0
    # The control: two norms of one shape exchanged, which neither names nor shapes would tell.
    one, other = theirs.res3[1].conv1.norm, theirs.res3[1].conv2.norm
    state = {name: value.clone() for name, value in one.state_dict().items()}
    one.load_state_dict(other.state_dict())
    other.load_state_dict(state)
    assert difference(encoder, theirs) > 0


def test_the_published_converter_makes_the_same_of_the_moco_export(encoder, tmp_path):
    """Its rule: of the query encoder's names, those outside the stages get `stem.` before them, the rest as ours."""
    content = torch.load(export(Path("run"), "moco", tmp_path / "a.pth.tar"), weights_only=True)["state_dict"]
    result = {}
    for name, value in content.items():
        if not name.startswith("module.encoder_q."):
            continue
        name = name.removeprefix("module.encoder_q.")
        name = name if "layer" in name else f"stem.{name}"
        pairs = [(f"layer{n}", f"res{n + 1}") for n in (1, 2, 3, 4)] + [(f"bn{n}", f"conv{n}.norm") for n in (1, 2, 3)]
        for old, new in [*pairs, ("downsample.0", "shortcut"), ("downsample.1", "shortcut.norm")]:
            name = name.replace(old, new)
        result[name] = value.numpy()
    ours = pickle.loads(export(Path("run"), "detectron2", tmp_path / "a.pkl").read_bytes())["model"]
    assert set(result) - set(ours) == {"stem.fc.weight", "stem.fc.bias"}, "which detectron2 leaves aside"
    assert all(np.array_equal(result[name], value) for name, value in ours.items())


def test_detectron2_is_lost_with_torchvisions_names(encoder):
    """The control: the heuristics alone do not do it, nor does another network's file."""
    arch = arch_of(encoder)
    model, backbone = detector(arch, "C4")
    weights = {name: value.numpy() for name, value in encoder.state_dict().items() if not name.startswith("fc.")}
    with pytest.raises(ValueError, match="conv1.weight is ambiguous"):
        found_by_detectron2({name: weights["conv1.weight"].shape for name in model}, weights)
    assert set(found_by_detectron2(model, weights)) < backbone
    other = detectron2_shapes("resnet18" if arch == "resnet50" else "resnet50")
    actual = found_by_detectron2(model, {name: np.empty(shape) for name, shape in other.items()})
    assert set(actual) < backbone


def test_timm_loads_strictly_and_computes_the_same(encoder, tmp_path):
    timm = pytest.importorskip("timm")
    out = export(Path("run"), "timm", tmp_path / "a")
    theirs = timm.create_model(arch_of(encoder), num_classes=0)
    theirs.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    assert difference(encoder, theirs) == 0
    assert difference(encoder, timm.create_model(f"local-dir:{out}", pretrained=True)) == 0
    assert difference(encoder, timm.create_model(f"local-dir:{out}", pretrained=False)) > 0  # the control
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{out}", pretrained=True))
    assert list(data["input_size"]) == [3, 64, 64] and list(data["mean"]) == [0.485, 0.456, 0.406]


def test_torchvision_loads_strictly_and_computes_the_same(encoder, tmp_path):
    models = pytest.importorskip("torchvision.models")
    weights = torch.load(export(Path("run"), "torchvision", tmp_path / "a.pth"), weights_only=True)
    theirs = getattr(models, arch_of(encoder))()
    # As the printed line says, the classifier alone is missing; without it the rest is taken strictly.
    assert theirs.load_state_dict(weights, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    theirs.fc = nn.Identity()
    theirs.load_state_dict(weights, strict=True)
    assert difference(encoder, theirs) == 0
    with torch.no_grad():
        theirs.layer4[1].bn2.bias += 1e-3  # the control
    assert difference(encoder, theirs) > 0
