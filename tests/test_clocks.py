"""The card's clocks and which card is watched."""

import time
from types import SimpleNamespace

import pytest

from benchmarks.clocks import ClockState, NvmlProbe, merge, visible_device


def watch(probe: NvmlProbe, seconds: float) -> ClockState:
    probe.start()
    time.sleep(seconds)
    return probe.stop()


# The part of pynvml that the probe uses.
FAKE_NVML = SimpleNamespace(
    NVML_CLOCK_SM="sm",
    NVML_TEMPERATURE_GPU="gpu",
    nvmlInit=lambda: None,
    nvmlDeviceGetHandleByIndex=lambda index: ("index", index),
    nvmlDeviceGetHandleByUUID=lambda uuid: ("uuid", uuid),
    nvmlDeviceGetName=lambda handle: f"card {handle}",
    nvmlSystemGetDriverVersion=lambda: "580.1",
    nvmlDeviceGetClockInfo=lambda handle, kind: {"sm": 1980}[kind],
    nvmlDeviceGetTemperature=lambda handle, sensor: {"gpu": 61}[sensor],
    nvmlDeviceGetCurrentClocksEventReasons=lambda handle: 0x1 | 0x4,
)


@pytest.mark.parametrize(
    ("device", "handle"), [("3", ("index", 3)), ("GPU-ab", ("uuid", "GPU-ab"))], ids=str
)
def test_the_probe_reads_the_card_that_cuda_sees(device, handle):
    probe = NvmlProbe(FAKE_NVML, device=device)
    assert (probe.card, probe.driver) == (f"card {handle}", "580.1")
    assert watch(probe, 0.0) == watch(probe, 0.03) == ClockState(1980, 61, 0x4)


@pytest.mark.parametrize(
    ("variable", "device"), [(None, "0"), ("", "0"), ("2,0", "2"), ("GPU-ab", "GPU-ab")], ids=str
)
def test_the_card_is_the_first_of_cuda_visible_devices(monkeypatch, variable, device):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_device() == device


def test_samples_become_median_clock_highest_temperature_and_all_reasons_but_idle():
    samples = [ClockState(345, 50, 0x1), ClockState(1980, 60, 0x4), ClockState(1980, 55, 0x20)]
    assert merge(samples) == ClockState(1980, 60, 0x24)
    assert merge([ClockState()]) == ClockState()
