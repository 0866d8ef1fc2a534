"""Files of unknown origin: nothing is unpickled but tensors and plain data, and every refusal is one line."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Callable
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from fastmoco.options import UsageError

ZIP, PICKLE = b"PK\x03\x04", b"\x80"


class ForeignFileError(ValueError):
    """A file cannot be used: damaged, unsafe, or of another kind; the message says which and what to do."""

    exit_code = 3


def read(path: Path) -> dict[str, Any]:
    """The dictionary in a .pth, .pth.tar, .pt or .safetensors file, tensors on the CPU.

    Raises UsageError if there is no file. Raises ForeignFileError if it is damaged (the checksums of torch's zip files
    are verified, which torch itself does not do), holds anything but tensors and plain data, or is no such file.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file: check the path")
    with path.open("rb") as file:
        head = file.read(4)
    if path.suffix == ".safetensors":
        content = _explain_failure(path, lambda: load_file(path))
    elif head == ZIP:
        _verify_zip(path)
        content = _explain_failure(path, lambda: _load(path))
    elif head[:1] == PICKLE:
        content = _explain_failure(path, lambda: _load(path))
    else:
        raise ForeignFileError(f"{path} is no PyTorch checkpoint (it starts with {head!r}): give a .pth or .pth.tar")
    if not isinstance(content, dict):
        raise ForeignFileError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def _load(path: Path) -> Any:
    # Beside what torch allows: numbers and settings that training scripts keep, all of them plain data.
    with torch.serialization.safe_globals(_plain_data()):
        return torch.load(path, map_location="cpu", weights_only=True)


def _plain_data() -> list:
    scalar, array = np._core.multiarray.scalar, np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    kinds = [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdFD"]
    # Files name these as the NumPy and the Python that wrote them did.
    old = [(scalar, "numpy.core.multiarray.scalar"), (array, "numpy.core.multiarray._reconstruct")]
    paths = [(PosixPath, "pathlib.PosixPath"), (PosixPath, "pathlib._local.PosixPath")]
    return [scalar, array, np.ndarray, np.dtype, *kinds, *old, *paths, argparse.Namespace, SimpleNamespace]


def _verify_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise ForeignFileError(f"{path} is damaged ({_brief(error)}): fetch it again") from error
    if bad is not None:
        raise ForeignFileError(f"{path} is damaged ({bad} does not have its checksum): fetch it again")


def _explain_failure(path: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        if unsafe:
            raise ForeignFileError(
                f"{path} asks to run {unsafe[1]} when it is loaded: refused. Only tensors and plain data are read; "
                f"ask its author for a file of weights alone"
            ) from error
        raise ForeignFileError(f"{path} is damaged or no checkpoint ({_brief(error)}): fetch it again") from error


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:120] or type(error).__name__
