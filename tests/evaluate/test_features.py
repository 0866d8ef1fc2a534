"""Features: unit length, in the manifest's order, the frozen encoder untouched, the pixels those of Pillow."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastmoco.data import loader, manifest
from fastmoco.data.decoded import PixelCache
from fastmoco.data.loader import Loading
from fastmoco.data.pipeline import Decoding
from fastmoco.encoder import build_encoder
from fastmoco.evaluate import features, knn
from fastmoco.evaluate.features import encode, extract
from fastmoco.parallel import Parallel
from fastmoco.presets import PRESETS

SIZE = 24
RECIPE = replace(PRESETS["demo"][1], width=0.125, crop_size=SIZE)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> manifest.Manifest:
    """23 lossless images, already of the size of a crop, so that the centre box is the whole image."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.RandomState(0)
    for number in range(23):
        folder = root / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        pixels = random.randint(0, 256, (6, 6, 3)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return manifest.scan(root, cache=False)


@pytest.fixture(scope="module")
def encoder():
    encoder = build_encoder(RECIPE)
    for buffer_name, buffer in encoder.named_buffers():
        if buffer_name.endswith("running_mean"):
            buffer.copy_(torch.linspace(-0.2, 0.2, len(buffer)))
    return encoder.train()


@pytest.mark.parametrize("which", ["backbone", "projection"])
def test_features_are_those_of_the_eval_mode_encoder_on_the_pixels(images, encoder, which):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    actual, labels = extract(
        encoder, images, RECIPE, Parallel(), features=which, loading=Loading(threads=1), batch_size=8
    )
    assert encoder.training and all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert labels.tolist() == images.labels.tolist()
    pixels = np.stack([np.asarray(Image.open(images.path(index))) for index in range(len(images))])
    colours = RECIPE.augmentation
    scaled = (pixels / 255.0 - np.array(colours.mean)) / np.array(colours.std)
    with torch.no_grad():
        forward = encoder.eval().features if which == "backbone" else encoder.eval()
        expected = F.normalize(forward(torch.from_numpy(scaled).float().permute(0, 3, 1, 2)), dim=1)
    encoder.train()
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(actual.norm(dim=1), torch.ones(len(images)))


def test_the_batch_size_changes_nothing(images, encoder):
    """Batch statistics would: in training mode a sample's features depend on its neighbours."""
    one = extract(encoder, images, RECIPE, Parallel(), loading=Loading(threads=1), batch_size=23)[0]
    other = extract(encoder, images, RECIPE, Parallel(), loading=Loading(threads=2), batch_size=5)[0]
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert (one[0] - one[1]).abs().max() > 1e-3, "all features alike would pass everything"


class OneOf(Parallel):
    """A rank that notes its share instead of gathering."""

    def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        SHARES[self.rank, rows.dtype] = rows
        return torch.cat([SHARES.get((rank, rows.dtype), rows) for rank in range(self.world)])

    def any(self, flag: bool) -> bool:
        return flag


SHARES: dict[tuple[int, torch.dtype], torch.Tensor] = {}


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_images(images, encoder, world):
    whole = extract(encoder, images, RECIPE, Parallel(), loading=Loading(threads=1))[0]
    SHARES.clear()
    for rank in range(world):
        gathered, labels = extract(encoder, images, RECIPE, OneOf(rank=rank, world=world), loading=Loading(threads=1))
    assert labels.tolist() == images.labels.tolist()
    assert len(gathered) == len(images) and {len(share) for share in SHARES.values()} == {-(-23 // world)}
    torch.testing.assert_close(gathered, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [7, 64])
def test_a_bad_image_has_features_and_label_of_the_next_good_one(images, encoder, tmp_path, batch_size):
    root = shutil.copytree(images.root, tmp_path / "images")
    copy = manifest.scan(root, cache=False)
    whole, origins = encode(encoder, copy, RECIPE, Parallel(), loading=Loading(threads=1))
    assert origins.tolist() == list(range(23))  # the control
    bad = len([path for path in copy.paths if path.startswith("class0")]) - 1  # the last of its class
    data = bytearray((root / copy.paths[bad]).read_bytes())
    data[50:90] = bytes(40)
    (root / copy.paths[bad]).write_bytes(data)
    with pytest.warns(UserWarning, match=copy.paths[bad]):
        actual, origins = encode(encoder, copy, RECIPE, Parallel(), loading=Loading(threads=1), batch_size=batch_size)
    assert origins.tolist() == [index if index != bad else bad + 1 for index in range(23)]
    torch.testing.assert_close(actual, whole[origins], rtol=0, atol=1e-5)
    with pytest.warns(UserWarning):
        labels = extract(encoder, copy, RECIPE, Parallel(), loading=Loading(threads=1), batch_size=batch_size)[1]
    assert labels[bad] == labels[bad + 1] != copy.labels[bad]


def test_images_are_decoded_as_the_recipe_and_the_run_say(images, encoder, monkeypatch):
    used, original = [], loader.Pipeline
    monkeypatch.setattr(loader, "Pipeline", lambda *args, **options: used.append(options) or original(*args, **options))
    fancy = replace(RECIPE, fancy_upsampling=True, knn_k=3)
    knn.evaluate(encoder, images, images, fancy, Parallel(), loading=Loading(1, hw_decoder_load=0.25))
    encode(encoder, images, RECIPE, Parallel(), loading=Loading(threads=1))  # the control
    assert [options["decoding"] for options in used] == [Decoding(0.25, True)] * 2 + [Decoding(None, False)]


def test_pixels_kept_of_the_images_that_vote_are_not_taken_for_those_to_classify(images, encoder):
    """The same images the other way round: the nearest one is the image itself, unless places are taken for images."""
    kept = PixelCache(3 * int(images.sizes.prod(1).sum()))
    loading, one = Loading(threads=1, kept=kept), replace(RECIPE, knn_k=1)
    turned = images.take(reversed(range(len(images))))
    assert knn.evaluate(encoder, images, turned, one, Parallel(), loading=loading)["top1"] == 100
    wrong = knn.evaluate(encoder, images, turned, one, Parallel(), loading=loading, val_loading=loading)
    assert wrong["top1"] < 50 and len(kept) == len(images)  # the control


def test_images_without_labels(images, encoder):
    unlabelled = replace(images, labels=None, classes=[])
    assert extract(encoder, unlabelled, RECIPE, Parallel(), loading=Loading(threads=1))[1].eq(-1).all()


def test_on_a_gpu_the_last_batch_is_as_large_as_the_others(images, encoder, monkeypatch):
    """And its features are those of its own images; there are 23 of them, in batches of 8."""
    sizes, plain = [], features._plain

    def counted(crops, *rest):
        sizes.append(len(crops))
        return plain(crops, *rest)

    monkeypatch.setattr(features, "_plain", counted)
    actual = []
    for searching in ((), ("cpu",)):
        monkeypatch.setattr(features, "SEARCHING", searching)
        actual.append(extract(encoder, images, RECIPE, Parallel(), loading=Loading(threads=1), batch_size=8)[0])
    assert sizes == [8, 8, 7, 8, 8, 8]
    torch.testing.assert_close(*actual)


def test_a_rank_without_room_for_all_features_says_so_before_others_wait_for_it(images, encoder, monkeypatch):
    class OneOfTwo(Parallel):
        def any(self, flag: bool) -> bool:
            return flag

        def all_gather(self, rows: torch.Tensor) -> torch.Tensor:
            return torch.cat([rows, rows])

    parallel, new_empty = OneOfTwo(0, 0, 2), torch.Tensor.new_empty
    given = {"parallel": parallel, "loading": Loading(threads=1), "batch_size": 12}
    assert len(encode(encoder, images, RECIPE, **given)[0]) == len(images)

    def short(rows: torch.Tensor, *shape: int, **options: object) -> torch.Tensor:
        if shape[0] == 24:
            raise torch.OutOfMemoryError("no room for 24 rows")
        return new_empty(rows, *shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", short)
    monkeypatch.setattr(OneOfTwo, "all_gather", lambda *_: pytest.fail("the others would wait here"))
    with pytest.raises(torch.OutOfMemoryError, match="24 rows"):
        encode(encoder, images, RECIPE, **given)
