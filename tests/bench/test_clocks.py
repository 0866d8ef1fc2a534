"""Clocks are those of the samples, and a card that tells nothing costs nothing."""

from fastmoco.bench.clocks import Clocks


class Nvml:
    """Stands for pynvml: a card whose clock falls and whose power rises from sample to sample, at its power cap."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM = "sm", "memory"

    def __init__(self, silent: bool = False) -> None:
        self.taken, self.silent = 0, silent

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetClockInfo(self, gpu: int, which: str) -> int:
        self.taken += which == "sm"
        return {"sm": 2000 - 100 * self.taken, "memory": 2619}[which]

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:
        if self.silent:
            raise self.NVMLError("not supported")
        return 1000 * (600 + 10 * self.taken)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: int) -> int:
        return 0x04 if self.taken == 2 else 0x01  # idle, which is no throttling

    def nvmlDeviceGetPowerManagementLimit(self, gpu: int) -> int:
        return 700_000

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"


def test_the_summary_is_of_the_samples_and_of_every_reason_seen():
    clocks = Clocks(Nvml())
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
    clocks = Clocks(Nvml())
    clocks.sample()
    assert clocks.summary()["throttled"] == []


def test_what_cannot_be_asked_is_left_out():
    clocks = Clocks(Nvml(silent=True))
    clocks.sample()
    assert clocks.summary() == {}


def test_without_a_driver_there_are_no_clocks():
    class Driverless(Nvml):
        def nvmlInit(self) -> None:
            raise self.NVMLError("no driver")

    clocks = Clocks(Driverless())
    clocks.sample()
    assert clocks.summary() == {}
