"""Reading sets in VOC's folders, and what a picture becomes for the detector."""

import made_set
import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.data.errors import DataError
from fastmoco.detection import voc
from fastmoco.detection.training import Plan, Shown, mirrored


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return made_set.make(tmp_path_factory.mktemp("made"))


def test_a_set_is_what_its_files_say(kit):
    training = voc.training_set(kit)
    test = voc.test_set(kit, training.classes)
    assert (len(training.pictures), len(test.pictures), training.year) == (30, 15, 2007)
    assert training.classes == voc.CLASSES_OF_VOC and len(training.classes) == 20
    labels = np.concatenate([picture.objects.labels for picture in training.pictures])
    assert {training.classes[label] for label in labels} == {"car", "dog", "person"}
    for picture in training.pictures:
        width, height = Image.open(picture.path).size
        boxes = picture.objects.boxes
        assert (boxes[:, :2] >= 1).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    assert any(picture.objects.difficult.any() for picture in [*training.pictures, *test.pictures])


def test_own_classes_are_numbered_by_name_and_fixed_by_the_training_part(tmp_path):
    kit = made_set.make(tmp_path, 4, 2)
    for path in (kit / "VOC2007/Annotations").iterdir():
        path.write_text(path.read_text().replace(">car<", ">crane<"))
    training = voc.training_set(kit)
    assert "crane" in training.classes and training.classes == sorted(training.classes)
    with pytest.raises(DataError, match="is not among the 1 classes"):
        voc.test_set(kit, ["crane"])


@pytest.mark.parametrize(
    ("breakage", "said"),
    [
        (lambda kit: (kit / "VOC2007/ImageSets/Main/trainval.txt").unlink(), "no such list"),
        (lambda kit: (kit / "VOC2007/ImageSets/Main/trainval.txt").write_text("\n"), "names no images"),
        (lambda kit: (kit / "VOC2007/JPEGImages/trainval000.jpg").unlink(), "trainval000: no such image"),
        (lambda kit: (kit / "VOC2007/Annotations/trainval001.xml").write_text("<annotation><obj"), "trainval001.xml"),
        (
            lambda kit: (kit / "VOC2007/Annotations/trainval001.xml").write_text(
                "<a><object><name>x</name></object></a>"
            ),
            "an object without a box",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_named(tmp_path, breakage, said):
    kit = made_set.make(tmp_path, 4, 2)
    breakage(kit)
    with pytest.raises(DataError, match=said):
        voc.training_set(kit)


def test_a_flip_moves_the_boxes_with_the_pixels(tmp_path):
    """Objects are drawn in their colour: the mean colour inside a box is the same before and after."""
    shown = Shown(voc.training_set(made_set.make(tmp_path, 6, 1)).pictures)
    for index in range(6):
        (image, target), (flipped, mirror) = shown[index, False], shown[index, True]
        assert torch.equal(mirrored(mirror["boxes"], image.shape[2]), target["boxes"])
        for box, other in zip(target["boxes"].int().tolist(), mirror["boxes"].int().tolist(), strict=True):
            before = image[:, box[1] : box[3], box[0] : box[2]]
            after = flipped[:, other[1] : other[3], other[0] : other[2]]
            assert torch.equal(before.flip(2), after)
        assert (target["labels"] >= 1).all(), "0 is the background"


def test_each_image_comes_once_before_any_comes_again():
    plan = Plan(steps=30, batch_size=4, seed=3)
    drawn = [index for step in range(30) for index, _ in plan.draw(step, 10)]
    assert all(sorted(drawn[at : at + 10]) == list(range(10)) for at in range(0, 120, 10))
    assert plan.draw(7, 10) == plan.draw(7, 10) and plan.draw(7, 10) != plan._replace(seed=4).draw(7, 10)
    flips = [flip for step in range(30) for _, flip in plan.draw(step, 10)]
    assert 30 < sum(flips) < 90


def test_the_schedule_is_that_of_detectron2_for_any_number_of_steps():
    plan = Plan(steps=24000, batch_size=16)
    assert plan.rate(0) == pytest.approx(0.02 / 1000) and plan.rate(50) == pytest.approx(0.02 * (0.001 + 0.999 / 2))
    assert [plan.rate(at) for at in (100, 17999, 18000, 21999, 22000)] == pytest.approx([2e-2, 2e-2, 2e-3, 2e-3, 2e-4])
    assert plan._replace(batch_size=8).rate(5000) == pytest.approx(0.01)
    assert plan._replace(steps=240).rate(180) == pytest.approx(2e-3)
