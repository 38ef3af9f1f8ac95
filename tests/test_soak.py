"""Many launches of random lengths: what is drawn, and what is said of a process."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import soak, soak_process
from sigjax.attention import sigmoid_attention


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_random_batch_has_lengths_within_its_shape(seed: int):
    case = soak_process.random_case(np.random.default_rng(seed), "triton")
    assert case.lengths is not None
    assert 1 <= case.batch <= 6
    for length, keys in case.lengths:
        assert 0 <= length <= case.length <= soak_process.LONGEST["triton"]
        assert 0 <= keys <= case.key_length


def test_edges_of_tiles_are_drawn_more_often_than_others():
    generator = np.random.default_rng(0)
    drawn = [soak_process.random_length(generator, 1500) for _ in range(2000)]
    assert np.mean([(x + 1) % 64 <= 2 for x in drawn]) > 0.4
    assert {0, 1500} <= set(drawn)


def test_a_process_counts_its_launches_and_batches():
    outcome = soak.soak(["xla", "0", "3", "1"], seconds=120)
    assert outcome == soak.Outcome(launches=3, batches=1)


def test_a_process_that_says_nothing_has_hung():
    assert soak.soak(["xla", "0", "3", "0"], seconds=0.05).problems == ["hung for 0.05 s"]


def test_a_crash_is_said_with_its_last_line():
    (problem,) = soak.soak(["none", "0", "1", "0"], seconds=120).problems
    assert problem.startswith("crashed (1): ValueError: implementation must be triton or xla")


def test_a_wrong_batch_is_said(capsys):
    def twice(*arrays, **named):
        return 2 * sigmoid_attention(*arrays, **named, implementation="xla")

    case = soak_process.random_case(np.random.default_rng(2), "xla")
    soak_process.compare(case, twice)
    messages = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert messages[0] == {"at": soak.REFERENCE}
    assert messages[1]["batches"] == 1
    assert any(line.startswith(f"{case.label}: output") for line in messages[1]["wrong"])


def test_the_exit_status_and_the_last_line_tell_of_failures(monkeypatch, capsys):
    outcomes = iter([soak.Outcome(5, 1), soak.Outcome(3, 0, ["hung for 9 s"])])
    monkeypatch.setattr(soak, "soak", lambda *_: next(outcomes))
    assert soak.main(["--launches", "10", "--batches", "2", "--processes", "2"]) == 1
    assert "8 launches and 1 batches in 0 s; 1 of 2 processes failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--launches", "-1"], "--launches must be at least 0, got -1"),
    ],
    ids=["processes", "launches"],
)
def test_impossible_numbers_are_refused(arguments: list[str], message: str, capsys):
    with pytest.raises(SystemExit):
        soak.main(arguments)
    assert message in capsys.readouterr().err
