"""Names against lists written down from the other projects, and networks told apart by their shapes."""

import pytest

from fastmoco.encoder.resnet import ARCHITECTURES, Encoder
from fastmoco.interop.names import is_parameter, recognise, to_detectron2

# Left: torchvision. Right: what detectron2's resnet of depth 50 asks for.
PAIRS = {
    "conv1.weight": "stem.conv1.weight",
    "bn1.weight": "stem.conv1.norm.weight",
    "bn1.running_var": "stem.conv1.norm.running_var",
    "layer1.0.conv1.weight": "res2.0.conv1.weight",
    "layer1.0.bn1.bias": "res2.0.conv1.norm.bias",
    "layer1.0.downsample.0.weight": "res2.0.shortcut.weight",
    "layer1.0.downsample.1.weight": "res2.0.shortcut.norm.weight",
    "layer2.3.bn2.running_mean": "res3.3.conv2.norm.running_mean",
    "layer3.5.conv3.weight": "res4.5.conv3.weight",
    "layer4.2.bn3.weight": "res5.2.conv3.norm.weight",
}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS.items())
def test_detectron2_names(ours, theirs):
    assert to_detectron2(ours) == theirs


def published_resnet50() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of torchvision's resnet50 without fc, from its description: 3, 4, 6, 3 bottlenecks."""
    shapes = {"conv1.weight": (64, 3, 7, 7)}

    def norm(name: str, channels: int) -> None:
        for field in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{field}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("bn1", 64)
    entry = 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            for number, shape in enumerate(((width, entry, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)), 1):
                shapes[f"{at}.conv{number}.weight"] = shape
                norm(f"{at}.bn{number}", shape[0])
            if block == 0:
                shapes[f"{at}.downsample.0.weight"] = (4 * width, entry, 1, 1)
                norm(f"{at}.downsample.1", 4 * width)
            entry = 4 * width
    return shapes


def shapes_of(arch: str, width: float, stem: str) -> dict[str, tuple[int, ...]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    encoder = Encoder(arch, width=width, stem=stem, head="linear", dim=8, bn_group=0, generator=generator)
    return {name: tuple(value.shape) for name, value in encoder.state_dict().items()}


def test_resnet50_has_torchvisions_keys_and_shapes_in_its_order():
    ours = {name: shape for name, shape in shapes_of("resnet50", 1.0, "imagenet").items() if not name.startswith("fc.")}
    assert list(ours.items()) == list(published_resnet50().items())
    assert len([name for name in ours if is_parameter(name)]) == 159  # 161 with fc, as upstream counts them


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("width", "stem"), [(0.125, "cifar"), (0.25, "imagenet")])
def test_a_network_is_recognised_by_its_shapes(arch, width, stem):
    shapes = shapes_of(arch, width, stem)
    assert recognise(shapes) == (arch, width, stem)
    del shapes["conv1.weight"]
    assert recognise(shapes) is None


def test_other_networks_are_not_recognised():
    assert recognise({"conv1.weight": (64, 3, 7, 7)}) is None
    odd = {name: shape for name, shape in published_resnet50().items() if not name.startswith("layer3.5")}
    assert recognise(odd) is None
