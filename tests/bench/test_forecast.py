"""What is expected of four GPUs: beside the published rates that it rests on, and below its bounds."""

import pytest

from fastmoco.bench import forecast, roofline
from fastmoco.encoder import build_encoder
from fastmoco.presets import PRESETS

V2 = PRESETS["v2"][1]


@pytest.fixture(scope="module")
def convs() -> list[roofline.Conv]:
    return roofline.convolutions(build_encoder(V2), 224)


# Images a second of a published training run, its batch, its level of fusion, its GPU's rated bandwidth, and which of
# the rates explains it. Those of an H100 and an H200 are one rate, with 97 to 105 % of what was published.
PUBLISHED = [
    (3399, 408, "main", 2.04e12, roofline.CONVOLUTION_RATES["A100"][0], 0.01),
    (3410, 512, "bnrelu", 2.04e12, roofline.CONVOLUTION_RATES["A100"][1], 0.01),
    (7159, 400, "main", 3.35e12, roofline.CONVOLUTION_RATES["H100"][0], 0.05),
    (7945, 400, "main", 4.8e12, roofline.CONVOLUTION_RATES["H200"][0], 0.10),
]


@pytest.mark.parametrize("images, batch, level, rated, rate, within", PUBLISHED)
def test_the_rates_of_convolutions_explain_what_was_published(convs, images, batch, level, rated, rate, within):
    """At 90 % of the rated bandwidth; a physical peak in place of the rate would not."""

    def rates(flops: float) -> float:
        works = roofline.forward_work(convs, level, batch) + roofline.backward_work(convs, level, batch)
        return 1 / sum(max(work.flops / flops, work.nbytes / (0.9 * rated)) for work in works)

    assert rates(rate) == pytest.approx(images, rel=within)
    assert rates(5 * rate) > 1.2 * images


def test_expected_is_less_than_the_practical_bound_and_least_for_few_pairs():
    rows = [line.split("|")[1:-1] for line in forecast.table(V2).splitlines()[2:]]
    assert [row[0].split()[0] for row in rows] == [name for name in forecast.GPUS for _ in forecast.BATCHES]
    pairs = [[[float(n.replace(",", "")) for n in cell.split(" to ")] for cell in row[2:]] for row in rows]
    for (physical,), practical, expected in pairs:
        assert physical > practical[1] > practical[0] > expected[0] and practical[1] > expected[1]
    for few, many in zip(pairs[::2], pairs[1::2]):
        assert few[2][1] < 0.95 * many[2][1]
    assert pairs[3][0][0] == pytest.approx(6296, rel=1e-3) and "assumed" in rows[-1][0] and "assumed" not in rows[0][0]
