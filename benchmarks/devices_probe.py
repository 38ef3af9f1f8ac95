"""Several GPUs watched at once: the state of those that a burst runs on."""

import os
from collections.abc import Sequence

import numpy as np

from benchmarks.clocks import ClockState, NvmlProbe, Probe

# Eight threads that sample as often as one does alone would take the host's time.
INTERVAL_S = 0.02


class Cards:
    """A probe of the first of several devices, as many as are in use.

    Args:
        probes: of each device, in jax's order.
    """

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._probes = tuple(probes)
        self._used = len(self._probes)
        self.card, self.driver = self._probes[0].card, self._probes[0].driver

    def use(self, devices: int) -> None:
        """Devices from here on are idle until the next call: they do not count."""
        self._used = devices

    def start(self) -> None:
        """Begins to watch all."""
        for probe in self._probes:
            probe.start()

    def stop(self) -> ClockState:
        """Ends watching all; the state of those in use."""
        states = [probe.stop() for probe in self._probes]
        return slowest(states[: self._used])


def slowest(states: Sequence[ClockState]) -> ClockState:
    """One state of several cards that wait for each other: lowest clock, highest temperature."""
    clocks = [s.sm_clock_mhz for s in states if s.sm_clock_mhz is not None]
    temperatures = [s.temperature_c for s in states if s.temperature_c is not None]
    reasons = int(np.bitwise_or.reduce([s.reasons for s in states]))
    return ClockState(min(clocks, default=None), max(temperatures, default=None), reasons)


def nvml_cards(count: int) -> Cards:
    """The first count GPUs that CUDA sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return Cards([NvmlProbe(device=x, interval_s=INTERVAL_S) for x in numbers(count, visible)])


def numbers(count: int, visible: str) -> list[str]:
    """NVML's index or UUID of each device that jax sees.

    Args:
        count: how many of them.
        visible: value of CUDA_VISIBLE_DEVICES.

    Example:
        >>> numbers(2, "3,1,0"), numbers(2, "")
        (['3', '1'], ['0', '1'])
    """
    if not visible:
        return [str(i) for i in range(count)]
    return [name.strip() for name in visible.split(",")][:count]
