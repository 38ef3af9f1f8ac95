"""Bursts: order, rests, retries on a hot card."""

import threading
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.clocks import ClockState
from benchmarks.measure import (
    LOCK_VARIABLE,
    Measurement,
    Plan,
    alone,
    calls_per_burst,
    interleave,
)
from tests.benchmark_parts import COOL


class FakeContender:
    """Costs ms per call; its log is shared with the others'."""

    def __init__(self, name: str, ms: float, log: list) -> None:
        self.name, self.ms, self.log = name, ms, log

    def burst(self, calls: int) -> float:
        """Logs and answers."""
        self.log.append((self.name, calls))
        return self.ms


class ScriptedProbe:
    """Answers one state after the other, cool when the script is over."""

    card, driver = "a card", "1"

    def __init__(self, states: Sequence[ClockState] = ()) -> None:
        self.states, self.running = list(states), False

    def start(self) -> None:
        """Begins."""
        self.running = True

    def stop(self) -> ClockState:
        """Ends with the next state of the script."""
        self.running = False
        return self.states.pop(0) if self.states else COOL


def run_fakes(
    plan: Plan, probe: ScriptedProbe | None = None, names: str = "abc"
) -> tuple[Measurement, list]:
    log: list = []
    contenders = [FakeContender(name, 1.0 + i, log) for i, name in enumerate(names)]
    measurement = interleave(
        contenders, plan, probe or ScriptedProbe(), sleep=lambda s: log.append(("rest", s))
    )
    return measurement, log


def test_contenders_take_turns_in_rotating_order_with_a_rest_before_each_burst():
    measurement, log = run_fakes(Plan(rounds=3, burst_ms=30, rest_s=0.5))
    measured = log[log.index(("rest", 0.5)) :]
    assert measured[::2] == [("rest", 0.5)] * 9
    assert [name for name, _ in measured[1::2]] == list("abcbcacab")
    assert len(measurement.rounds) == 3
    assert all(set(round_) == set("abc") for round_ in measurement.rounds)


@settings(deadline=None, max_examples=50)
@given(ms=st.floats(0.02, 500), burst_ms=st.floats(1, 100))
def test_a_burst_is_as_many_calls_as_fill_its_time(ms, burst_ms):
    calls = calls_per_burst(FakeContender("a", ms, []), burst_ms)
    assert calls == 1 or abs(calls * ms - burst_ms) <= ms / 2 + 1e-9 or calls == 2000


def test_every_contender_has_a_number_of_calls_of_its_own():
    measurement, _ = run_fakes(Plan(rounds=1, burst_ms=30))
    assert measurement.calls == {"a": 30, "b": 15, "c": 10}


@pytest.mark.parametrize("reason", [0x20, 0x40], ids=["software", "hardware"])
def test_a_round_under_thermal_slowdown_is_thrown_away_and_repeated(reason):
    hot = ClockState(675, 93, reason)
    probe = ScriptedProbe([COOL, hot, COOL])
    measurement, log = run_fakes(Plan(rounds=2, cool_s=9.0), probe)
    assert measurement.thrown_away == 1
    assert len(measurement.rounds) == 2
    assert all(b.state.sm_clock_mhz == 1980 for r in measurement.rounds for b in r.values())
    assert log.count(("rest", 9.0)) == 1


def test_a_power_cap_is_recorded_and_kept():
    capped = ClockState(1700, 60, 0x4)
    measurement, _ = run_fakes(Plan(rounds=1), ScriptedProbe([capped] * 3))
    assert measurement.thrown_away == 0
    assert measurement.rounds[0]["a"].state == capped


def test_retries_end_on_a_card_that_stays_hot():
    measurement, _ = run_fakes(
        Plan(rounds=2, retries=3), ScriptedProbe([ClockState(9, 9, 32)] * 99)
    )
    assert measurement.rounds == ()
    assert measurement.thrown_away == 4


def test_the_probe_is_stopped_where_a_burst_fails(monkeypatch):
    probe = ScriptedProbe()
    contender = FakeContender("a", 1.0, [])

    def fail_once_calibrated(calls: int) -> float:
        if probe.running:
            msg = "out of memory"
            raise RuntimeError(msg)
        return 1.0

    monkeypatch.setattr(contender, "burst", fail_once_calibrated)
    with pytest.raises(RuntimeError, match="out of memory"):
        interleave([contender], Plan(rest_s=0), probe)
    assert not probe.running


@pytest.mark.parametrize("names", ["", "aa"], ids=["none", "twice"])
def test_contenders_without_names_of_their_own_are_refused(names):
    with pytest.raises(ValueError, match="contenders must be one or more"):
        run_fakes(Plan(), names=names)


@pytest.mark.parametrize(
    "change", [{"rounds": 0}, {"burst_ms": 0.0}, {"rest_s": -1.0}, {"retries": -1}], ids=str
)
def test_an_impossible_plan_is_refused(change):
    with pytest.raises(ValueError, match="must"):
        Plan(**change)


def test_one_of_two_benchmarks_measures_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setenv(LOCK_VARIABLE, str(tmp_path / "lock"))
    began, ended = threading.Event(), []

    def other() -> None:
        began.set()
        with alone():
            ended.append("other")

    with alone():
        thread = threading.Thread(target=other)
        thread.start()
        assert began.wait(10)
        time.sleep(0.05)
        ended.append("first")
    thread.join(10)
    assert ended == ["first", "other"]


def test_without_a_lock_nobody_waits(monkeypatch):
    monkeypatch.delenv(LOCK_VARIABLE, raising=False)
    with alone(), alone():
        measurement, _ = run_fakes(Plan(rounds=1, rest_s=0))
    assert len(measurement.rounds) == 1
