"""Files that are damaged, unsafe or of another kind: one clear line, and nothing of theirs is run."""

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastmoco.interop import foreign, upstream
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


@pytest.mark.parametrize("legacy", [False, True])
def test_numbers_and_settings_of_training_scripts_are_data(tmp_path, legacy):
    path, settings = tmp_path / "a.pth", argparse.Namespace(lr=0.03, out=Path("runs"), steps=[1, 2])
    more = {"best_acc1": np.float64(61.2), "epoch": np.int64(3), "history": np.arange(3.0), "args": settings}
    torch.save({"state_dict": WEIGHTS, **more}, path, _use_new_zipfile_serialization=not legacy)
    content = foreign.read(path)
    assert content["best_acc1"] == 61.2 and content["epoch"] == 3 and content["history"].tolist() == [0, 1, 2]
    assert content["args"] == settings


@pytest.mark.parametrize(
    "form",
    [
        "_orig_mod.{}",
        "module.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
    ],
)
@pytest.mark.parametrize("inner", ["{}", "_orig_mod.{}", "module.{}"])
def test_wrappers_are_taken_off_names_wherever_they_stand(form, inner):
    names = ["encoder_q.conv1.weight", "encoder_k.layer1.0.bn1.running_mean", "queue"]
    wrapped = {}
    for name in names:
        side, dot, rest = name.partition(".")
        wrapped[form.format(f"{side}.{inner.format(rest)}" if dot else name)] = torch.zeros(1)
    assert list(upstream.weights_of({"state_dict": wrapped})) == names


@pytest.mark.parametrize("key", ["model", "state_dict", "model_ema", "net", "weights"])
def test_weights_are_found_under_any_usual_name(key):
    weights = {"conv1.weight": torch.zeros(1)}
    assert upstream.weights_of({"epoch": 1, key: weights}).keys() == weights.keys()
    assert upstream.weights_of({key: {"state_dict": weights}, "optimizer": {}}).keys() == weights.keys()
    both = {"state_dict": weights, "state_dict_ema": {"other": torch.zeros(1)}}
    assert upstream.weights_of(both).keys() == weights.keys()
