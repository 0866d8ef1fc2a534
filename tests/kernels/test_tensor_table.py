"""Records of a table in device memory, with stand-ins for what only a GPU has."""

import pytest
import torch
from torch import Tensor

from fastmoco.kernels.tensor_table import TensorTable


class Pinned:
    """Stands for pinned memory, which cannot be had while a stream captures; `capturing` says whether one does."""

    capturing = False

    def __init__(self) -> None:
        assert not self.capturing, "pinned while capturing"

    def copy_(self, rows: Tensor) -> None:
        self.rows = rows

    def to(self, device: torch.device, non_blocking: bool) -> Tensor:
        return self.rows.clone()


@pytest.mark.parametrize("eager_call_between", [True, False])
def test_a_second_capture_pins_no_memory(eager_call_between: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eager call between two captures restores what the first one took, though no gradient has moved since."""
    tensors = [[torch.zeros(5)] for _ in range(5)]
    table, grads = TensorTable(*tensors), [torch.zeros(5)]
    entries = table.on_device()
    entries.device = torch.device("cuda")
    monkeypatch.setattr(entries, "_pin", Pinned)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Pinned.capturing)

    def capture() -> None:
        moved = [torch.zeros(5)]
        with monkeypatch.context() as now:
            now.setattr(Pinned, "capturing", True)
            assert entries.records(table.tensors, moved)[0, 5] == moved[0].data_ptr()

    entries.records(table.tensors, grads)
    capture()
    if eager_call_between:
        entries.records(table.tensors, grads)
        capture()
    else:
        with pytest.raises(AssertionError, match="while capturing"):
            capture()
