"""Arithmetic of several devices: efficiency, what a ring sends, what to expect of more devices."""

import re
from collections import Counter
from typing import Literal

import numpy as np

type Scaling = Literal["weak", "strong"]

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
    "collective-broadcast",
    "ragged-all-to-all",
)
# The instruction, or the start of it where it is asynchronous; its name on the left has a "%".
_INSTRUCTION = re.compile(rf"\s({'|'.join(COLLECTIVES)})(?:-start)?\(")


def count_collectives(program: str) -> dict[str, int]:
    """How often each of COLLECTIVES occurs in a compiled program's text; a loop's body once.

    Example:
        >>> text = "%all-reduce.1 = f32[2] all-reduce(%x), channel_id=1"
        >>> count_collectives(text)["all-reduce"]
        1
    """
    found = Counter(_INSTRUCTION.findall(program))
    return {name: found[name] for name in COLLECTIVES}


def efficiencies(
    one_device_ms: np.ndarray, ms: np.ndarray, devices: int, scaling: Scaling
) -> np.ndarray:
    """Share of the ideal, round by round: 1 where no time is lost.

    Args:
        one_device_ms: [R], of one device: its share of the work where scaling is weak, all of
            it where scaling is strong.
        ms: [R], of that many devices.
        devices: how many.
        scaling: "weak" where work grows with the devices, "strong" where it stays.
    """
    return one_device_ms / (ms if scaling == "weak" else devices * ms)


def ring_bytes(block_elements: int, itemsize: int, sum_itemsize: int, devices: int) -> int:
    """Bytes that each device of a ring sends in a forward and a backward pass.

    A block of keys and values makes devices - 1 journeys in either pass; the sums of its
    gradients make devices journeys, the last of which brings them home.

    Args:
        block_elements: of the keys of one device, and as many of its values.
        itemsize: bytes of an element of these.
        sum_itemsize: bytes of an element of the gradients' sums.
        devices: of the ring.
    """
    if devices == 1:
        return 0
    journeys = 2 * (devices - 1) * itemsize + devices * sum_itemsize
    return 2 * block_elements * journeys


def predict(
    devices: int, *, one_device_ms: float, step_ms: float, step_bytes: float, gb_s: float
) -> float:
    """Efficiency to expect of a ring of so many devices, from times measured with fewer.

    Every device computes with one block of keys a step, devices steps in all, while the next
    block travels: a step takes the longer of both. The last journey of the gradients hides
    behind nothing. Neither contention of several senders nor the cost of launching smaller
    kernels is in it; the bandwidth is taken to be that of the smaller ring.

    Args:
        devices: to predict for.
        one_device_ms: the whole call on one device.
        step_ms: computing with one block, see scaled_step_ms.
        step_bytes: that each device sends a step.
        gb_s: measured bandwidth of one device's sends, 1e9 bytes a second.

    Example:
        >>> predict(4, one_device_ms=160.0, step_ms=10.0, step_bytes=1e9, gb_s=100.0)
        0.8
    """
    send_ms = step_bytes / (gb_s * 1e6)
    return one_device_ms / devices / (devices * max(step_ms, send_ms) + send_ms)


def scaled_step_ms(ms: float, measured: int, devices: int) -> float:
    """A ring's step on so many devices, from the call's ms on measured ones.

    It has a (measured / devices)² of the pairs of query and key.

    Example:
        >>> scaled_step_ms(80.0, measured=2, devices=4)
        10.0
    """
    return ms / measured * (measured / devices) ** 2


def predict_data_parallel(
    devices: int, *, one_device_ms: float, measured: int, measured_ms: float
) -> float:
    """Efficiency to expect of a data-parallel step, from one step measured on fewer devices.

    What measured devices lose to one is taken for their all-reduce, of which each sends
    2 (n - 1) / n of the gradients: at most twice of what two devices send.

    Example:
        >>> predict_data_parallel(8, one_device_ms=13.0, measured=2, measured_ms=15.0)
        0.7878787878787878
    """
    share = (1 - 1 / devices) / (1 - 1 / measured)
    return one_device_ms / (one_device_ms + max(measured_ms - one_device_ms, 0.0) * share)
