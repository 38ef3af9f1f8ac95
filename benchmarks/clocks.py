"""What the GPU did while something ran on it: SM clock, temperature, slowdown reasons."""

import importlib
import os
import statistics
import threading
from dataclasses import dataclass
from typing import Any, Protocol

# Bits of NVML's clocks event reasons.
IDLE = 0x1
THERMAL_SLOWDOWN = 0x20 | 0x40  # software's and hardware's


@dataclass(frozen=True)
class ClockState:
    """The state of a GPU over one burst.

    Attributes:
        sm_clock_mhz: median SM clock; None where nothing was read.
        temperature_c: highest temperature; None where nothing was read.
        reasons: all clocks event reasons seen, or-ed, without "idle", which a
            sample at either end of a burst can catch.
    """

    sm_clock_mhz: int | None = None
    temperature_c: int | None = None
    reasons: int = 0

    @property
    def throttled(self) -> bool:
        """Whether heat slowed the GPU down."""
        return bool(self.reasons & THERMAL_SLOWDOWN)


class Probe(Protocol):
    """Watches one device between start and stop."""

    @property
    def card(self) -> str:
        """Name of the device."""
        ...

    @property
    def driver(self) -> str:
        """Version of its driver, "" where it has none."""
        ...

    def start(self) -> None:
        """Begins to watch."""
        ...

    def stop(self) -> ClockState:
        """Ends watching and tells what was seen."""
        ...


@dataclass(frozen=True)
class NoProbe:
    """For a device without NVML: sees nothing."""

    card: str = "cpu"
    driver: str = ""

    def start(self) -> None:
        """Does nothing."""

    def stop(self) -> ClockState:
        """A state without readings."""
        return ClockState()


class NvmlProbe:
    """Samples an NVIDIA GPU through NVML from a thread, every few milliseconds.

    Args:
        nvml: the module pynvml (package nvidia-ml-py); None imports it.
        device: index or UUID as in CUDA_VISIBLE_DEVICES.
        interval_s: seconds between two samples.

    Raises:
        ModuleNotFoundError: nvidia-ml-py is not installed.
    """

    def __init__(
        self, nvml: Any = None, *, device: str | None = None, interval_s: float = 0.005
    ) -> None:
        self._nvml = importlib.import_module("pynvml") if nvml is None else nvml
        self._nvml.nvmlInit()
        self._handle = _handle(self._nvml, visible_device() if device is None else device)
        self._interval_s = interval_s
        self._samples: list[ClockState] = []
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self.card = str(self._nvml.nvmlDeviceGetName(self._handle))
        self.driver = str(self._nvml.nvmlSystemGetDriverVersion())

    def start(self) -> None:
        """Begins to sample."""
        self._samples = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_done, daemon=True)
        self._thread.start()

    def stop(self) -> ClockState:
        """Ends sampling; reads once more where the burst was shorter than the interval."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return merge(self._samples or [self._sample()])

    def _sample_until_done(self) -> None:
        while not self._done.wait(self._interval_s):
            self._samples.append(self._sample())

    def _sample(self) -> ClockState:
        nvml, handle = self._nvml, self._handle
        return ClockState(
            nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        )


def merge(samples: list[ClockState]) -> ClockState:
    """One state of several: median clock, highest temperature, all reasons but idle."""
    clocks = [s.sm_clock_mhz for s in samples if s.sm_clock_mhz is not None]
    temperatures = [s.temperature_c for s in samples if s.temperature_c is not None]
    reasons = 0
    for sample in samples:
        reasons |= sample.reasons & ~IDLE
    return ClockState(
        statistics.median_low(clocks) if clocks else None,
        max(temperatures, default=None),
        reasons,
    )


def visible_device() -> str:
    """The first device CUDA sees, as an index or UUID; NVML itself numbers all of them."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"


def _handle(nvml: Any, device: str) -> Any:
    if device.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(device))
    return nvml.nvmlDeviceGetHandleByUUID(device)
