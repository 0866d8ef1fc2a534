"""Options: checked where they are made, with the flag and the remedy in the message."""

import subprocess
import sys

import pytest

from fastmoco.options import EvaluateKnn, Options, UsageError, check_places


@pytest.mark.parametrize(
    "wrong",
    [
        {"log_every": 0},
        {"prefetch": 0},
        {"keep": 1},
        {"knn_every": -1},
        {"threads": -1},
        {"save_every": -1},
        {"save_minutes": -0.5},
        {"stop_after": 0},
        {"keep_every": -1},
        {"watchdog_seconds": -1},
    ],
)
def test_a_wrong_value_names_its_flag_and_the_remedy(wrong):
    flag = "--" + next(iter(wrong)).replace("_", "-")
    with pytest.raises(UsageError, match=rf"{flag} is {next(iter(wrong.values()))}: use"):
        Options(**wrong)


def test_a_deterministic_run_asks_all_or_nothing_of_the_decoding_engine():
    """Which images it gets depends on the batch otherwise, and its pixels are not those of the multiprocessors."""
    with pytest.raises(UsageError, match="--hw-decoder-load is 0.65, which is not deterministic: use 0 or 1"):
        Options(deterministic="on", hw_decoder_load=0.65)
    pairs = [Options(deterministic=d, hw_decoder_load=load) for d in ("on", "off") for load in (None, 0.0, 1.0)]
    assert [each.decoder_load for each in pairs] == [1.0, 0.0, 1.0, None, 0.0, 1.0]
    assert Options(hw_decoder_load=0.65).decoder_load == 0.65


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(UsageError, match="--out RUN"):
        Options(resume=True)
    with pytest.raises(UsageError, match="does not exist"):
        check_places("v2", Options(data=tmp_path, out=tmp_path / "none", resume=True))


def test_places(tmp_path):
    for name, pairs in (("data", {"out": tmp_path / "x"}), ("out", {"data": tmp_path})):
        with pytest.raises(UsageError, match=f"needs --{name}"):
            check_places("v2", Options(**pairs))
    check_places("demo", Options())
    with pytest.raises(UsageError, match="exists: continue it with --resume"):
        check_places("v2", Options(data=tmp_path, out=tmp_path))
    check_places("v2", Options(data=tmp_path, out=tmp_path), is_main=False)
    check_places("v2", Options(data=tmp_path, out=tmp_path, resume=True))


def test_knn_settings_are_checked(tmp_path):
    for wrong in ({"k": 0}, {"temperature": 0.0}):
        with pytest.raises(UsageError, match="use"):
            EvaluateKnn(tmp_path, **wrong)


def test_the_module_needs_only_the_standard_library():
    code = "import fastmoco.options, sys; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "numpy", "tyro", "PIL", "nvidia"}.isdisjoint(loaded)
