"""The traffic model by hand-made figures; tests/test_ranks.py holds it against bytes counted over four ranks."""

from dataclasses import replace

import pytest

from fastmoco.bench.traffic import GPUS, Flow, Sizes, sizes, table, traffic
from fastmoco.encoder import build_encoder
from fastmoco.presets import PRESETS

V2 = PRESETS["v2"][1]


def by_name(flows: list[Flow]) -> dict[str, Flow]:
    return {flow.name: flow for flow in flows}


def test_resnet50_at_the_published_size() -> None:
    """7 other GPUs with 32 float images of 224 px each; a queue of 65536 keys of 128 numbers."""
    published, ours = (by_name(traffic(V2, way, 8)) for way in ("published", "fastmoco"))
    images = published["all-gather of float images"]
    assert (images.total, images.network) == (7 * 32 * 3 * 224 * 224 * 4, 0)
    assert published["broadcast of buffers, queue among them"].total > 65536 * 128 * 4
    crops = ours["exchange of uint8 crops"]
    assert crops.total == pytest.approx(32 * 7 / 8 * 3 * 224 * 224)
    assert crops.total == pytest.approx(images.total / 4 / 8)
    assert ours["all-reduce of gradients"].total < published["all-reduce of gradients"].total * 0.51


def test_sizes_are_those_of_the_encoder() -> None:
    encoder, counts = build_encoder(V2), sizes(V2)
    assert counts.small + counts.large == sum(value.numel() for value in encoder.parameters())
    assert counts.small == sum(n for name, n in shapes(encoder) if "bn" in name or "downsample.1" in name)
    assert counts.buffers == sum(value.nbytes for value in encoder.buffers())


def shapes(encoder: object) -> list[tuple[str, int]]:
    return [(name, value.numel()) for name, value in encoder.named_parameters()]


@pytest.mark.parametrize("way", ["published", "fastmoco"])
def test_links_share_the_bytes_out(way: str) -> None:
    recipe, counts = replace(V2, batch_size=64 * 32), Sizes(1000, 10**6, 4000)
    whole, one_machine = (traffic(recipe, way, 64, per, counts=counts) for per in (8, 64))
    for flow, inside in zip(whole, one_machine, strict=True):
        assert flow.total == pytest.approx(inside.total) and inside.network == 0
        # Of 63 others, 7 are in the same machine; a ring leaves it by one of its eight cards.
        share = 56 / 63 if flow.name.startswith("exchange") else 1 / 8
        assert flow.network == pytest.approx(flow.total * share)


def test_only_the_published_images_grow_with_the_cluster() -> None:
    def of(way: str, gpus: int) -> float:
        return traffic(replace(V2, batch_size=32 * gpus), way, gpus)[0].total

    assert of("published", 512) / of("published", 8) == pytest.approx(511 / 7)
    assert 1 < of("fastmoco", 512) / of("fastmoco", 8) < 8 / 7


def test_the_table_has_every_collective_and_the_sum() -> None:
    text = table(V2)
    assert text.count("| all |") == 2 * len(GPUS)
    assert "| 8 | published | all-gather of float images | 135 | 0 | 135 |" in text


def test_the_three_dictionaries_at_8_and_64_gpus() -> None:
    """The figures of docs/dictionaries.md: what a rank receives besides gradients and crops."""
    presets = {"queue": V2, **{name: PRESETS[name][1] for name in ("simclr", "bank")}}
    for gpus, batch, kilobytes, statistics in ((8, 256, (115, 118, 116), 3.2e6), (64, 4096, (2064, 2129, 2097), 29e6)):
        found = {name: traffic(replace(each, batch_size=batch), "fastmoco", gpus) for name, each in presets.items()}
        gathered = [sum(f.total for f in flows if f.name.startswith("all-gather")) for flows in found.values()]
        assert [round(each / 1e3) for each in gathered] == list(kilobytes)
        assert by_name(found["simclr"])["statistics of batch norm"].total == pytest.approx(statistics, rel=0.01)


def test_a_bank_has_no_published_way() -> None:
    bank = PRESETS["bank"][1]
    assert "| published |" not in table(bank) and "bank 65536" in table(bank)
    with pytest.raises(ValueError, match="no published way of a bank"):
        traffic(bank, "published", 8)


def test_only_a_batch_without_groups_gathers_statistics_and_only_shuffled_keys_are_exchanged() -> None:
    names = {name: set(by_name(traffic(PRESETS[name][1], "published", 8))) for name in ("simclr", "end-to-end")}
    assert names["simclr"] ^ names["end-to-end"] == {"statistics of batch norm", "all-gather of float images"}
