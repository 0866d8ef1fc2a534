"""Clocks are those of the samples and of the card that works, and one that tells nothing costs nothing."""

import types

import pytest
import torch

from fastmoco.bench.clocks import Clocks

GPU = torch.device("cuda", 1)
UUIDS = {0: "aaaa", 1: "bbbb"}


@pytest.fixture(autouse=True)
def two_cards(monkeypatch):
    properties = lambda device: types.SimpleNamespace(uuid=UUIDS[device.index])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)


class Nvml:
    """Stands for pynvml: a card whose clock falls and whose power rises from sample to sample, at its power cap."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM = "sm", "memory"

    def __init__(self, silent: tuple[str, ...] = ()) -> None:
        self.taken, self.silent, self.asked = 0, silent, []

    def ask(self, what: str, answer: object) -> object:
        if what in self.silent:
            raise self.NVMLError("not supported")
        return answer

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        self.asked.append(uuid)
        return 0

    def nvmlDeviceGetClockInfo(self, gpu: int, which: str) -> int:
        self.taken += which == "sm"
        return {"sm": 2000 - 100 * self.taken, "memory": 2619}[which]

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:
        return self.ask("power", 1000 * (600 + 10 * self.taken))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: int) -> int:
        return 0x04 if self.taken == 2 else 0x01  # idle, which is no throttling

    def nvmlDeviceGetPowerManagementLimit(self, gpu: int) -> int:
        return self.ask("limit", 700_000)

    def nvmlSystemGetDriverVersion(self) -> str:
        return self.ask("driver", "580.1")


def test_the_summary_is_of_the_samples_and_of_every_reason_seen():
    clocks = Clocks(GPU, Nvml())
    assert clocks.summary() == {}
    for _ in range(3):
        clocks.sample()
    assert clocks.summary() == {
        "samples": 3,
        "sm_mhz": {"median": 1800, "minimum": 1700},
        "memory_mhz": {"median": 2619, "minimum": 2619},
        "power_w": {"median": 620.0, "maximum": 630.0},
        "throttled": ["power cap"],
        "power_limit_w": 700.0,
        "driver": "580.1",
    }
    clocks = Clocks(GPU, Nvml())
    clocks.sample()
    assert clocks.summary()["throttled"] == []


@pytest.mark.parametrize("number", [0, 1])
def test_the_card_is_the_one_that_works(number):
    nvml = Nvml()
    Clocks(torch.device("cuda", number), nvml)
    assert nvml.asked == [f"GPU-{UUIDS[number]}"]


def test_a_limit_or_a_driver_that_is_not_told_is_left_out_alone():
    for silent, told in (("limit", {"driver"}), ("driver", {"power_limit_w"})):
        clocks = Clocks(GPU, Nvml((silent,)))
        clocks.sample()
        summary = clocks.summary()
        assert {"driver", "power_limit_w"} & summary.keys() == told and summary["samples"] == 1


def test_what_cannot_be_asked_is_left_out():
    clocks = Clocks(GPU, Nvml(("power",)))
    clocks.sample()
    assert clocks.summary() == {}


def test_without_a_driver_there_are_no_clocks():
    class Driverless(Nvml):
        def nvmlInit(self) -> None:
            raise self.NVMLError("no driver")

    clocks = Clocks(GPU, Driverless())
    clocks.sample()
    assert clocks.summary() == {}
