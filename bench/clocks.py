"""Clocks and power of a GPU while it works: an idle card tells nothing about the figures measured on a busy one."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from types import ModuleType

import torch

# NVML's reasons for a clock below the highest, as far as they speak of the machine and not of what was asked for.
THROTTLES = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class Clocks:
    """Samples of the clocks and the power of `device`, a GPU, by NVML, the module `nvml` or pynvml.

    Where there is none (pip install nvidia-ml-py), or where it may not be asked, there are no samples.
    """

    def __init__(self, device: torch.device, nvml: ModuleType | None = None) -> None:
        self._nvml = nvml = nvml or _nvml()
        self._samples: dict[str, list[float]] = {"sm_mhz": [], "memory_mhz": [], "power_w": []}
        self._facts: dict[str, object] = {}
        self._reasons = 0
        if nvml is None:
            return
        try:
            nvml.nvmlInit()
            # Not by number: NVML counts all cards of the machine, whichever of them CUDA_VISIBLE_DEVICES shows.
            self._gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        except nvml.NVMLError:
            self._nvml = None
            return
        self._note("power_limit_w", lambda: nvml.nvmlDeviceGetPowerManagementLimit(self._gpu) / 1e3)
        self._note("driver", nvml.nvmlSystemGetDriverVersion)

    def sample(self) -> None:
        """Read the clocks, the power and the reasons for low clocks, now."""
        nvml = self._nvml
        if nvml is None:
            return
        with contextlib.suppress(nvml.NVMLError):  # a card may keep one of them to itself; the benchmark goes on
            now = {
                "sm_mhz": nvml.nvmlDeviceGetClockInfo(self._gpu, nvml.NVML_CLOCK_SM),
                "memory_mhz": nvml.nvmlDeviceGetClockInfo(self._gpu, nvml.NVML_CLOCK_MEM),
                "power_w": nvml.nvmlDeviceGetPowerUsage(self._gpu) / 1e3,
            }
            self._reasons |= nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._gpu)
            for name, value in now.items():
                self._samples[name].append(value)

    def summary(self) -> dict[str, object]:
        """Median and minimum of each clock, median and maximum of the power, throttle reasons; limit, driver if known.

        Empty before the first sample.
        """
        count = len(self._samples["power_w"])
        if not count:
            return {}
        figures: dict[str, object] = {"samples": count}
        for name, values in self._samples.items():
            other = ("maximum", max) if name == "power_w" else ("minimum", min)
            figures[name] = {"median": statistics.median(values), other[0]: other[1](values)}
        figures["throttled"] = [reason for bit, reason in THROTTLES.items() if self._reasons & bit]
        return figures | self._facts

    def _note(self, name: str, ask: Callable[[], object]) -> None:
        assert self._nvml is not None
        with contextlib.suppress(self._nvml.NVMLError):
            self._facts[name] = ask()


def _nvml() -> ModuleType | None:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml
