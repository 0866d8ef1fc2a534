"""What a pipeline is asked for: batches of encoded images with the boxes to cut, and what is wrong with an image.

A `Part` is what DALI gets in one call: a piece of one batch on a CPU, one or several batches on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np

from fastmoco.data.decoded import PIXEL
from fastmoco.data.errors import DataError
from fastmoco.data.manifest import Manifest
from fastmoco.data.probe import Bytes, examine
from fastmoco.data.rewrite import DamagedImage, Reading, rewritten
from fastmoco.recipe import MOST_PIXELS

CPU_BATCH = 32  # images decoded at once on a CPU; bounds the memory that decoded images take
FILES_PER_SECOND = 8000  # that readers for a GPU should be able to fetch: more than it decodes
UNREADABLE = "cannot be read"
NO_SAMPLES, NO_BOXES = np.empty(0, np.int64), np.empty((0, 0, 4), np.int32)


class DecodeError(DataError):
    """Images that cannot be decoded: `positions` in the batch, `names` and `reasons` of each."""

    def __init__(self, positions: list[int], names: list[str], reasons: list[str]) -> None:
        more = f" (and {len(names) - 1} more in this batch)" if len(names) > 1 else ""
        super().__init__(f"{names[0]}: {reasons[0]}{more}")
        self.positions, self.names, self.reasons = positions, names, reasons

    @classmethod
    def of(cls, names: Sequence[str], faults: dict[int, str], first: int = 0) -> DecodeError:
        """The error for `faults`, reasons by position in `names`; these begin at position `first` of the batch."""
        positions = list(faults)
        return cls([first + i for i in positions], [names[i] for i in positions], list(faults.values()))


class Names(Sequence[str]):
    """What images are called in errors, each made where it is asked for: of most batches nobody asks."""

    def __init__(self, name: Callable[[int], str], numbers: np.ndarray) -> None:
        self._name, self._numbers = name, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, key: int) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> Names: ...
    def __getitem__(self, key: int | slice) -> str | Names:
        if isinstance(key, slice):
            return Names(self._name, self._numbers[key])
        return self._name(int(self._numbers[key]))


class Request(NamedTuple):
    """One batch of n images to be decoded and cut into V crops each."""

    names: Sequence[str]
    """What to call each image in an error."""
    encoded: list[np.ndarray | OSError | DamagedImage]
    """Bytes of each image file, uint8, or why they cannot be used; or PIXEL for one that `PixelCache` keeps."""
    sizes: np.ndarray
    """int32 [n, 2]: height and width that the boxes were made for."""
    boxes: np.ndarray
    """int32 [V, n, 4]: top, left, height and width of each box."""
    step: int = 0
    """Which batch this is, and `samples` int64 [n] which images they are: for the repair."""
    samples: np.ndarray = NO_SAMPLES

    @property
    def is_kept(self) -> bool:
        """Whether `PixelCache` keeps all of its images."""
        return all(data is PIXEL for data in self.encoded)

    def rows(self, rows: slice) -> Request:
        """The same request for some of its images."""
        names, encoded, sizes, boxes, step, samples = self
        return Request(names[rows], encoded[rows], sizes[rows], boxes[:, rows], step, samples[rows])


Repair = Callable[[Request, dict[int, str]], Request]
"""Given a request and the reason why each position at fault cannot be decoded: the request with others in their place,
whose headers `fault` finds nothing wrong with."""


class Part(NamedTuple):
    """What DALI gets at once: consecutive images of one request, or several requests."""

    request: Request
    first: int
    total: int
    several: tuple[Request, ...] = ()
    """What `request` was made of, where DALI gets several at once."""

    @property
    def requests(self) -> tuple[Request, ...]:
        return self.several or (self.request,)


def small_parts(requests: Iterable[Request]) -> Iterator[Part]:
    """Each request in parts of at most CPU_BATCH images."""
    for request in requests:
        total = len(request.encoded)
        for at in range(0, total, CPU_BATCH):
            yield Part(request.rows(slice(at, at + CPU_BATCH)), at, total)


def joined_parts(requests: Iterator[Request], count: int) -> Iterator[Part]:
    """Parts of `count` whole requests; an error of `requests` comes after those before it."""
    waiting: list[Request] = []
    try:
        for request in requests:
            waiting.append(request)
            if len(waiting) == count:
                yield together(waiting)
                waiting = []
    except Exception:
        if waiting:  # what comes before the error is handed out before it
            yield together(waiting)
        raise
    if waiting:
        yield together(waiting)


def together(requests: Sequence[Request]) -> Part:
    """The part that holds all of `requests`, in their order."""
    first, total = requests[0], sum(len(request.encoded) for request in requests)
    if len(requests) == 1:
        return Part(first, 0, total)
    encoded = [data for request in requests for data in request.encoded]
    sizes = np.concatenate([request.sizes for request in requests])
    samples = np.concatenate([request.samples for request in requests])
    boxes = np.concatenate([request.boxes for request in requests], 1)
    whole = Part(Request((), encoded, sizes, boxes, first.step, samples), 0, total, tuple(requests))

    def name(position: int) -> str:
        number, place = _place(whole, position)
        return requests[number].names[place]

    return whole._replace(request=whole.request._replace(names=Names(name, np.arange(total))))


def by_request(part: Part, faults: dict[int, str]) -> dict[int, dict[int, str]]:
    """`faults`, whose positions are those in `part`, by request and by position in that request."""
    reasons: dict[int, dict[int, str]] = {}
    for position, reason in faults.items():
        number, place = _place(part, position)
        reasons.setdefault(number, {})[place] = reason
    return reasons


def _place(part: Part, position: int) -> tuple[int, int]:
    """Which request of the part an image is of, and its position there."""
    begins = np.cumsum([0, *(len(request.encoded) for request in part.requests)])
    number = int(np.searchsorted(begins, position, side="right")) - 1
    return number, position - int(begins[number])


def some_of(part: Part, positions: list[int]) -> Part:
    """The images of `part` at `positions` alone."""
    request = part.request
    selection = request._replace(
        names=[request.names[i] for i in positions] if request.names else [],
        encoded=[request.encoded[i] for i in positions],
        sizes=request.sizes[positions],
        boxes=request.boxes[:, positions] if request.boxes.size else request.boxes,
        samples=request.samples[positions] if len(request.samples) else request.samples,
    )
    return Part(selection, 0, len(positions))


def checked_requests(requests: Iterable[Request], repair: Repair | None) -> Iterator[Request]:
    """`requests` with nothing in them that `fault` complains of: repaired, or raises DecodeError without a `repair`."""
    # DALI 2.4 may crash the process on what its operator gives up on while the rest of the batch is decoding. So the
    # header's parser is asked first, 9 us an image.
    for request in requests:
        reasons = (fault(data, size) for data, size in zip(request.encoded, request.sizes.tolist(), strict=True))
        faults = {i: reason for i, reason in enumerate(reasons) if reason}
        if faults:
            if repair is None:
                raise DecodeError.of(request.names, faults)
            request = repair(request, faults)
        yield request


def fault(data: np.ndarray | OSError | DamagedImage, size: Sequence[int]) -> str:
    """Why an image of height and width `size` cannot be decoded from `data`, as far as its header tells; or ""."""
    if data is PIXEL:
        return ""
    if isinstance(data, OSError):
        return f"{UNREADABLE}: {data.strerror}"
    if isinstance(data, DamagedImage):
        return str(data)
    height, width, reason = examine(Bytes.of(data), MOST_PIXELS)[:3]
    if not reason and (height, width) != tuple(size):
        return f"is {width} x {height} pixels, but was {size[1]} x {size[0]} when it was scanned"
    return reason


def read(
    manifest: Manifest, index: int, reading: Reading = Reading(), place: Sequence[int] | None = None
) -> np.ndarray | OSError | DamagedImage:
    """The encoded bytes of an image as DALI shall get them, or why there are none."""
    try:
        return rewritten(manifest.read(index, place), reading)
    except OSError as error:
        return error


class Readers:
    """How many threads read files: enough for FILES_PER_SECOND at the time that a file takes to come, within bounds.

    The time is a running mean over the last reads of all threads.
    """

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most
        self._seconds = 0.0  # that a file takes

    @property
    def count(self) -> int:
        """Threads that the next batch is dealt out to."""
        return min(self.most, max(self.least, math.ceil(FILES_PER_SECOND * self._seconds)))

    def took(self, seconds: float, files: int) -> None:
        """A thread has read so many files in so much time."""
        if files:
            self._seconds += (seconds / files - self._seconds) / 8
