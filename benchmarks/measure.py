"""Interleaved bursts: how two pieces of GPU code are compared on a card that heats up.

A card under continuous load can lose half of its clock within a minute. So each
contender runs for about 30 ms, the card rests for half a second, the next one
runs; a round is one burst of each, in rotating order, and whatever is compared
is compared within a round. A round in which heat slowed the card is thrown away
and repeated.

Most of a benchmark's time goes by while kernels are compiled, on the host. So
several benchmarks may run side by side, each over its part of the cells: where
SIGJAX_TIMING_LOCK names a file, one of them measures at a time.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.clocks import ClockState, Probe

MAX_CALLS = 2000
LOCK_VARIABLE = "SIGJAX_TIMING_LOCK"


class Contender(Protocol):
    """Something that can be timed."""

    @property
    def name(self) -> str:
        """What it is called in the results."""
        ...

    def burst(self, calls: int) -> float:
        """Runs back to back and waits; milliseconds per call."""
        ...


@dataclass(frozen=True)
class Plan:
    """How long and how often to measure.

    Attributes:
        rounds: bursts of each contender that count.
        burst_ms: device time of one burst, milliseconds.
        rest_s: rest before each burst, seconds.
        retries: rounds under thermal slowdown to repeat before giving up.
        cool_s: rest after such a round, seconds.

    Raises:
        ValueError: fewer than one round, or a negative time or count.
    """

    rounds: int = 7
    burst_ms: float = 30.0
    rest_s: float = 0.5
    retries: int = 7
    cool_s: float = 5.0

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.burst_ms <= 0:
            msg = f"rounds and burst_ms must be above 0, got {self.rounds} and {self.burst_ms}"
            raise ValueError(msg)
        for field in ("rest_s", "retries", "cool_s"):
            if getattr(self, field) < 0:
                msg = f"{field} must not be negative, got {getattr(self, field)}"
                raise ValueError(msg)

    def seconds(self, contenders: int) -> float:
        """About how long a measurement takes: calibration and rounds, without retries."""
        burst = self.rest_s + 1.3 * self.burst_ms / 1e3
        return contenders * (self.rounds * burst + 3 * self.burst_ms / 1e3)


@dataclass(frozen=True)
class Burst:
    """Milliseconds per call of one burst, and what the card did meanwhile."""

    ms: float
    state: ClockState


type Round = dict[str, Burst]


@dataclass(frozen=True)
class Measurement:
    """The rounds that count.

    Attributes:
        rounds: one burst of every contender each; fewer than planned where
            retries ran out.
        thrown_away: rounds under thermal slowdown.
        calls: calls in a burst, by contender.
    """

    rounds: tuple[Round, ...]
    thrown_away: int
    calls: dict[str, int]


def calls_per_burst(contender: Contender, burst_ms: float) -> int:
    """How many calls fill burst_ms, from a single call and then from a short burst."""
    calls = 1
    for share in (0.3, 1.0):
        ms = max(contender.burst(calls), 1e-6)
        calls = min(max(round(share * burst_ms / ms), 1), MAX_CALLS)
    return calls


def interleave(
    contenders: Sequence[Contender],
    plan: Plan,
    probe: Probe,
    *,
    sleep: Callable[[float], None] = time.sleep,
    on_round: Callable[[int], None] = lambda done: None,
) -> Measurement:
    """Measures contenders against one another, all of them ready to run.

    Args:
        contenders: with names of their own; while one runs, the others must leave the card idle.
        plan: how long and how often.
        probe: watches the card during each burst.
        sleep: rests that many seconds.
        on_round: called with the number of rounds that count so far.

    Raises:
        ValueError: no contender, or two of one name.
    """
    names = [contender.name for contender in contenders]
    if not names or len(set(names)) != len(names):
        msg = f"contenders must be one or more with names of their own, got {names}"
        raise ValueError(msg)
    with alone():
        return _measure(contenders, plan, probe, sleep, on_round)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Waits until no other process is inside, where SIGJAX_TIMING_LOCK names a file."""
    path = os.environ.get(LOCK_VARIABLE)
    if not path:
        yield
        return
    with Path(path).open("a") as file:  # closing it lets the next one in
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _measure(
    contenders: Sequence[Contender],
    plan: Plan,
    probe: Probe,
    sleep: Callable[[float], None],
    on_round: Callable[[int], None],
) -> Measurement:
    calls = {c.name: calls_per_burst(c, plan.burst_ms) for c in contenders}
    kept: list[Round] = []
    thrown_away = turn = 0
    while len(kept) < plan.rounds and thrown_away <= plan.retries:
        first = turn % len(contenders)
        order = [*contenders[first:], *contenders[:first]]
        turn += 1
        round_ = _round(order, calls, plan, probe, sleep)
        if any(burst.state.throttled for burst in round_.values()):
            thrown_away += 1
            sleep(plan.cool_s)
        else:
            kept.append(round_)
            on_round(len(kept))
    return Measurement(tuple(kept), thrown_away, calls)


def _round(
    order: Sequence[Contender],
    calls: dict[str, int],
    plan: Plan,
    probe: Probe,
    sleep: Callable[[float], None],
) -> Round:
    round_: Round = {}
    for contender in order:
        sleep(plan.rest_s)
        probe.start()
        try:
            ms = contender.burst(calls[contender.name])
        finally:
            state = probe.stop()
        round_[contender.name] = Burst(ms, state)
    return round_
