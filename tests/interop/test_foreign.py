"""Files that are damaged, unsafe or of another kind: one clear line, and nothing of theirs is run."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from fastmoco.interop import foreign
from fastmoco.interop.foreign import ForeignFileError
from fastmoco.options import UsageError

WEIGHTS = {"conv1.weight": torch.arange(4096.0).reshape(64, 64)}


class Malicious:
    """Creates a file when it is unpickled carelessly."""

    def __init__(self, trace) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("legacy", [False, True])
def test_reads_both_of_torchs_formats(tmp_path, legacy):
    path = tmp_path / "a.pth.tar"
    torch.save({"state_dict": WEIGHTS, "epoch": 3}, path, _use_new_zipfile_serialization=not legacy)
    content = foreign.read(path)
    assert content["epoch"] == 3 and torch.equal(content["state_dict"]["conv1.weight"], WEIGHTS["conv1.weight"])


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, legacy):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({"state_dict": WEIGHTS, "x": Malicious(trace)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ForeignFileError, match="asks to run .*mkdir.*refused"):
        foreign.read(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the control: it would have
    assert trace.exists()


def test_a_plain_pickle_is_refused(tmp_path):
    path, trace = tmp_path / "evil.pkl", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Malicious(trace)))
    with pytest.raises(ForeignFileError):
        foreign.read(path)
    assert not trace.exists()


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_cut_file_is_refused(tmp_path, share, legacy):
    path = tmp_path / "a.pth"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ForeignFileError, match="damaged|no PyTorch"):
        foreign.read(path)


def test_a_flipped_byte_is_noticed(tmp_path):
    """torch itself reads such a file and says nothing: the control."""
    path = tmp_path / "a.pth"
    torch.save(WEIGHTS, path)
    data = bytearray(path.read_bytes())
    at = data.find(WEIGHTS["conv1.weight"].numpy().tobytes()[400:420])
    data[at + 3] ^= 1
    path.write_bytes(bytes(data))
    assert not torch.equal(torch.load(path, weights_only=True)["conv1.weight"], WEIGHTS["conv1.weight"])
    with pytest.raises(ForeignFileError, match="checksum"):
        foreign.read(path)


@pytest.mark.parametrize("content", [b"", b"GIF89a....", b"\x80\x02garbage", b"PK\x03\x04garbage", b"{}"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ForeignFileError):
        foreign.read(path)
    safetensors = tmp_path / "a.safetensors"
    safetensors.write_bytes(content)
    with pytest.raises(ForeignFileError):
        foreign.read(safetensors)


def test_safetensors_and_other_contents(tmp_path):
    save_file(WEIGHTS, tmp_path / "a.safetensors")
    assert torch.equal(foreign.read(tmp_path / "a.safetensors")["conv1.weight"], WEIGHTS["conv1.weight"])
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ForeignFileError, match="a list, not a dictionary"):
        foreign.read(tmp_path / "list.pth")
    with pytest.raises(UsageError, match="no such file"):
        foreign.read(tmp_path / "none.pth")
