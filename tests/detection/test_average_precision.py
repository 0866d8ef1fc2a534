"""Average precision against cases done by hand, a loop of its own, and properties."""

from importlib.util import find_spec

import numpy as np
import pytest

from fastmoco.detection.average_precision import (
    THRESHOLDS,
    Detections,
    Objects,
    average_precision,
    evaluate,
    overlaps,
)


def shown(*boxes, labels=None, difficult=None) -> Objects:
    count = len(boxes)
    return Objects(
        np.array(boxes, float).reshape(-1, 4),
        np.array(labels or [0] * count, np.int64),
        np.array(difficult or [False] * count, bool),
    )


def found(*rows, labels=None) -> Detections:
    boxes = np.array([box for box, _ in rows], float).reshape(-1, 4)
    return Detections(boxes, np.array(labels or [0] * len(rows), np.int64), np.array([score for _, score in rows]))


def test_a_pixel_has_two_ends():
    """10 to 19 is ten pixels: a box shifted by five shares 50 of 150, one of its left half 50 of 100."""
    box = np.array([10.0, 10, 19, 19])
    others = np.array([[15.0, 10, 24, 19], [10, 10, 14, 19], [10, 10, 19, 19], [20, 10, 29, 19]])
    np.testing.assert_allclose(overlaps(box, others), [50 / 150, 50 / 100, 1, 0])


def test_a_case_by_hand():
    """Two images, three objects. Right, wrong, right, twice found: precision 1, 1/2, 2/3, 1/2 at recall 1/3 .. 2/3.

    Eleven points: recalls 0 to 0.3 see 1, those to 0.6 see 2/3, the rest nothing: (4 + 3 x 2/3) / 11 = 6/11.
    The area: 1/3 x 1 + 1/3 x 2/3 = 5/9.
    """
    truth = [shown((10, 10, 49, 49), (60, 10, 99, 49)), shown((10, 10, 49, 49))]
    said = [
        found(((10, 10, 49, 49), 0.9), ((200, 200, 240, 240), 0.8), ((10, 10, 49, 49), 0.6)),
        found(((10, 10, 49, 49), 0.7)),
    ]
    assert evaluate(truth, said, 1)["AP50"] == pytest.approx(100 * 6 / 11)
    assert evaluate(truth, said, 1, eleven_points=False)["AP50"] == pytest.approx(100 * 5 / 9)


def test_the_overlap_must_exceed_the_threshold():
    """A box of 50 % is right at no threshold, one of 76 % at the first six of ten."""
    half = [found(((10, 10, 14, 19), 0.9))]
    assert evaluate([shown((10, 10, 19, 19))], half, 1)["AP50"] == 0
    most = evaluate([shown((1, 1, 100, 1))], [found(((1, 1, 76, 1), 0.9))], 1)
    assert (most["AP50"], most["AP75"], most["AP"]) == pytest.approx((100, 100, 60))


def test_a_difficult_object_counts_neither_way():
    truth = [shown((10, 10, 49, 49), (60, 60, 99, 99), difficult=[True, False])]
    both = [found(((10, 10, 49, 49), 0.9), ((60, 60, 99, 99), 0.8))]
    assert evaluate(truth, both, 1)["AP50"] == pytest.approx(100)
    assert evaluate(truth, [found(((10, 10, 49, 49), 0.9))], 1)["AP50"] == 0
    easy = [truth[0]._replace(difficult=np.zeros(2, bool))]
    assert evaluate(easy, [found(((60, 60, 99, 99), 0.8))], 1)["AP50"] == pytest.approx(100 * 6 / 11), "the control"


def test_the_best_object_counts_even_where_it_is_taken():
    """The second box overlaps the first object most and the free one enough; VOC calls it wrong, COCO would not."""
    truth = [shown((1, 1, 100, 100), (1, 31, 100, 130))]
    said = [found(((1, 1, 100, 100), 0.9), ((1, 11, 100, 110), 0.8))]
    assert overlaps(said[0].boxes[1], truth[0].boxes).min() > 0.5
    assert evaluate(truth, said, 1)["AP50"] == pytest.approx(100 * 6 / 11)


def test_scores_are_equal_from_the_fourth_decimal_on():
    """Equal scores keep their order, so a wrong detection that comes first by order stays first."""
    truth = [shown((10, 10, 49, 49))]
    rows = [((200, 200, 240, 240), 0.9001), ((10, 10, 49, 49), 0.9004)]
    assert evaluate(truth, [found(*rows)], 1)["AP50"] == pytest.approx(50)
    assert evaluate(truth, [found(*rows[::-1])], 1)["AP50"] == pytest.approx(100)


def test_classes_are_judged_apart_and_those_without_objects_left_out():
    truth = [shown((10, 10, 49, 49), (60, 60, 99, 99), labels=[0, 2])]
    said = [found(((10, 10, 49, 49), 0.9), ((60, 60, 99, 99), 0.8), labels=[0, 1])]
    scores = evaluate(truth, said, 3)
    first, none, last = scores["AP50_per_class"]
    assert none is None and (first, last, scores["AP50"]) == pytest.approx((100, 0, 50))
    assert evaluate([shown()], [found()], 3)["AP"] == 0


def test_the_order_of_images_and_boxes_does_not_matter():
    random = np.random.RandomState(0)
    truth, said = [], []
    for _ in range(12):
        corner = random.randint(0, 100, (4, 2))
        boxes = np.concatenate([corner, corner + random.randint(20, 60, (4, 2))], 1).astype(float)
        truth.append(shown(*boxes, labels=random.randint(0, 2, 4).tolist()))
        moved = boxes + random.randint(-12, 12, boxes.shape)
        scores = random.permutation(1000)[:4] / 1000
        said.append(found(*zip(moved, scores, strict=True), labels=truth[-1].labels.tolist()))
    scores = [row for each in said for row in each.scores]
    plain = evaluate(truth, said, 2)
    assert 5 < plain["AP"] < 95 and plain["AP50"] >= plain["AP75"]
    # Scores that differ over all images, so that no tie is broken by the order.
    ranks = np.argsort(np.argsort(scores, kind="stable"))
    said = [each._replace(scores=ranks[4 * i : 4 * i + 4] / 100) for i, each in enumerate(said)]
    expected = evaluate(truth, said, 2)
    order = random.permutation(12).tolist()
    assert evaluate([truth[i] for i in order], [said[i] for i in order], 2) == expected


@pytest.mark.parametrize("seed", range(4))
def test_both_kinds_equal_a_loop_over_the_definition(seed):
    random = np.random.RandomState(seed)
    right = random.rand(40) < 0.6
    recall, precision = right.cumsum() / 47, right.cumsum() / np.arange(1, 41)
    curve = list(zip(recall.tolist(), precision.tolist(), strict=True))
    points = [max([p for r, p in curve if r >= at / 10], default=0) for at in range(11)]
    assert average_precision(recall, precision) == pytest.approx(sum(points) / 11, abs=1e-9)
    area, last = 0.0, 0.0
    for r in sorted(set(recall.tolist())):
        area += (r - last) * max(p for q, p in curve if q >= r)
        last = r
    assert average_precision(recall, precision, False) == pytest.approx(area)


def test_there_are_ten_thresholds():
    assert THRESHOLDS == (50, 55, 60, 65, 70, 75, 80, 85, 90, 95)


def scene(seed: int) -> tuple[list[Objects], list[Detections]]:
    """Twelve images with objects that stand apart, found more or less well, some twice, and things that are not there.

    What is found twice overlaps one object only, which both rules count wrong the second time.
    """
    random = np.random.RandomState(seed)
    truth, said = [], []
    for _ in range(12):
        corners = np.stack(np.meshgrid([11, 211, 411], [11, 211, 411]), -1).reshape(-1, 2)[random.permutation(9)]
        boxes = np.concatenate([corners, corners + random.randint(60, 150, (9, 2))], 1).astype(float)
        labels = random.randint(0, 2, 9)
        truth.append(shown(*boxes[:6], labels=labels[:6].tolist()))
        moved = boxes + random.randint(-11, 12, boxes.shape)
        twice = np.concatenate([moved, moved[:2] + random.randint(-3, 4, (2, 4))])
        said.append(found(*zip(twice, random.rand(11), strict=True), labels=[*labels, *labels[:2]]))
    ranks = np.argsort(np.argsort([score for each in said for score in each.scores]))  # no two are equal
    return truth, [each._replace(scores=ranks[11 * i : 11 * i + 11] / 1000) for i, each in enumerate(said)]


def by_pycocotools(truth: list[Objects], said: list[Detections], points: int) -> tuple[float, float, float]:
    """AP, AP50 and AP75 in percent. A box from 10 to 19, ten pixels here, is there at 10 and 10 wide."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def rows(of: list) -> list[dict]:
        return [
            {"image_id": image, "category_id": int(label) + 1, "bbox": [*box[:2], *(box[2:] - box[:2] + 1)]}
            for image, each in enumerate(of, 1)
            for box, label in zip(each.boxes, each.labels, strict=True)
        ]

    objects, detections = rows(truth), rows(said)
    for number, row in enumerate(objects, 1):
        row |= {"id": number, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]}
    for row, score in zip(detections, np.concatenate([each.scores for each in said]), strict=True):
        row["score"] = float(score)
    coco = COCO()
    images = [{"id": image, "width": 640, "height": 640} for image in range(1, len(truth) + 1)]
    coco.dataset = {"info": {}, "images": images, "categories": [{"id": 1}, {"id": 2}], "annotations": objects}
    coco.createIndex()
    judge = COCOeval(coco, coco.loadRes(detections), "bbox")
    judge.params.recThrs = np.linspace(0, 1, points)
    judge.evaluate()
    judge.accumulate()
    table = 100 * judge.eval["precision"][:, :, :, 0, 2].mean((1, 2))  # [thresholds], all sizes, at most 100 an image
    return table.mean(), table[0], table[5]


# Of pycocotools 2.0.11 with eleven recalls, for scenes 0, 1 and 2: AP, AP50, AP75.
PYCOCOTOOLS = (
    (41.6060602467, 73.8266240376, 44.5322727258),
    (41.7119078830, 67.0667390657, 50.6380620385),
    (38.2710197259, 67.9560550945, 39.3642875111),
)


@pytest.mark.parametrize("seed", range(3))
def test_as_pycocotools_where_the_rules_agree(seed):
    """Asked for eleven recalls, and told the extra pixel, it must agree where no detection overlaps two objects."""
    truth, said = scene(seed)
    scores = evaluate(truth, said, 2)
    ours = (scores["AP"], scores["AP50"], scores["AP75"])
    assert ours == pytest.approx(PYCOCOTOOLS[seed], abs=1e-8)
    if find_spec("pycocotools"):
        assert by_pycocotools(truth, said, 11) == pytest.approx(ours, abs=1e-8)
        area = evaluate(truth, said, 2, eleven_points=False)["AP"]
        its_own = by_pycocotools(truth, said, 101)[0]
        assert abs(its_own - area) < 0.05 < abs(its_own - ours[0]), "101 recalls are nearly the area"
