"""The tile tables: every row is complete, and every device finds the row meant for it."""

import pytest

from fastmoco.kernels.compile_gate import kernel_modules
from fastmoco.kernels.tiles import ARCHITECTURES, TABLE, Tiles, tiles


def test_takes_the_nearest_row_not_newer(monkeypatch):
    old, new = Tiles((1,), 4, 1, "old"), Tiles((2,), 4, 1, "new")
    monkeypatch.setitem(TABLE, "probe", {80: old, 90: new})
    assert [tiles("probe", c) for c in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0))] == [old, old, old, new, new]
    assert tiles("probe") is tiles("probe", 90) is new
    # Consumer Blackwell has sm_80's tensor-core instructions and sm_86's shared memory.
    assert tiles("probe", (12, 0)) is old


def test_unknown_kernel_is_an_error():
    with pytest.raises(KeyError, match="no_such_kernel"):
        tiles("no_such_kernel")


@pytest.mark.parametrize("kernel", TABLE)
def test_every_row_is_complete(kernel):
    assert min(TABLE[kernel]) == 80
    assert set(TABLE[kernel]) <= set(ARCHITECTURES)
    for row in TABLE[kernel].values():
        assert all(size >= 1 for size in row.block)
        assert row.num_warps in (1, 2, 4, 8, 16)
        assert row.num_stages >= 1
        assert len(row.why) > 20


class Lookups(dict):
    """A table that knows which of its entries were asked for."""

    def __init__(self, entries: dict) -> None:
        super().__init__(entries)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> dict:
        self.names.add(name)
        return super().__getitem__(name)


def entries_without_a_kernel(monkeypatch, **more: dict) -> set[str]:
    table = Lookups(TABLE | more)
    monkeypatch.setattr("fastmoco.kernels.tiles.TABLE", table)
    for module in kernel_modules():
        for arch in ARCHITECTURES:
            module.variants(arch)
    return table.keys() - table.names


def test_each_entry_is_the_tiles_of_a_kernel(monkeypatch):
    """An entry whose name no kernel asks for is passed over without a word. The control has such a name."""
    assert entries_without_a_kernel(monkeypatch) == set()
    assert entries_without_a_kernel(monkeypatch, nobodys=TABLE["sgd_ema"]) == {"nobodys"}
