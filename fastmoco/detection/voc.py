"""Images with boxes in the folders of PASCAL VOC: VOCdevkit/VOC2007/{Annotations, ImageSets/Main, JPEGImages}.

An own set takes the same folders, with a list of names in `ImageSets/Main/trainval.txt` and one in `test.txt`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from fastmoco.data.errors import DataError
from fastmoco.detection.average_precision import Objects

ENDINGS = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
CLASSES_OF_VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()


class Picture(NamedTuple):
    """One image and what it shows."""

    path: Path
    objects: Objects


class Set(NamedTuple):
    """Pictures of one part of a set."""

    pictures: list[Picture]
    classes: list[str]
    year: int
    """Of its newest folder: 2007 is judged by eleven points."""


class Annotation(NamedTuple):
    """What one XML file tells."""

    boxes: list[list[float]]
    names: list[str]
    difficult: list[bool]


def read_set(root: Path, parts: Sequence[tuple[int, str]], classes: Sequence[str] = ()) -> Set:
    """The pictures of `parts`, as (2007, "trainval"), of those there are; classes are named by `classes`, or found.

    Where all classes found are VOC's, they are VOC's twenty, in their order. Raises DataError if a file is missing
    or damaged, no part is there, or a class is unknown.
    """
    present = [(year, part) for year, part in parts if list_of(root, year, part).is_file()]
    if not present:
        raise DataError(f"{list_of(root, *parts[0])}: no such list: --data names a folder in the layout of VOCdevkit")
    entries = [(name, year) for year, part in present for name in _names(list_of(root, year, part))]
    if not entries:
        raise DataError(f"{list_of(root, *present[0])}: names no images")
    annotations = [_annotation(root / f"VOC{year}/Annotations/{name}.xml") for name, year in entries]
    in_files = sorted({name for each in annotations for name in each.names})
    names = list(classes) or (CLASSES_OF_VOC if set(in_files) <= set(CLASSES_OF_VOC) else in_files)
    unknown = sorted(set(in_files) - set(names))
    if unknown:
        raise DataError(f"{root}: class {unknown[0]!r} is not among the {len(names)} classes of the training part")
    pictures = [
        Picture(_image(root / f"VOC{year}/JPEGImages", name), _objects(each, names))
        for (name, year), each in zip(entries, annotations, strict=True)
    ]
    return Set(pictures, names, max(year for year, _ in present))


def training_set(root: Path) -> Set:
    """trainval of 2007 and, where it is there, of 2012, as in the papers."""
    return read_set(root, [(2007, "trainval"), (2012, "trainval")])


def test_set(root: Path, classes: Sequence[str]) -> Set:
    """test of 2007; without one, val of 2012."""
    year, part = (2007, "test") if list_of(root, 2007, "test").is_file() else (2012, "val")
    return read_set(root, [(year, part)], classes)


test_set.__test__ = False  # type: ignore[attr-defined]  # pytest would take it for a test


def list_of(root: Path, year: int, part: str) -> Path:
    """The file with the names of a part."""
    return root / f"VOC{year}/ImageSets/Main/{part}.txt"


def _names(path: Path) -> list[str]:
    return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _image(folder: Path, name: str) -> Path:
    path = next((folder / f"{name}{ending}" for ending in ENDINGS if (folder / f"{name}{ending}").is_file()), None)
    if path is None:
        raise DataError(f"{folder / name}: no such image (.jpg or .png)")
    return path


def _annotation(path: Path) -> Annotation:
    try:
        root = ElementTree.parse(path).getroot()
        annotation = Annotation([], [], [])
        for item in root.iter("object"):
            corners = item.find("bndbox")
            if corners is None:
                raise ValueError("an object without a box")
            box = [float(corners.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax")]
            if not (box[0] <= box[2] and box[1] <= box[3]):
                raise ValueError(f"a box of no extent, {box}")
            annotation.boxes.append(box)
            annotation.names.append((item.findtext("name") or "").strip())
            annotation.difficult.append(item.findtext("difficult", "0").strip() == "1")
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return annotation


def _objects(annotation: Annotation, classes: Sequence[str]) -> Objects:
    boxes = np.array(annotation.boxes, np.float32).reshape(-1, 4)
    labels = np.array([classes.index(name) for name in annotation.names], np.int64)
    return Objects(boxes, labels, np.array(annotation.difficult, bool))
