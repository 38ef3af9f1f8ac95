"""First launches: what is said of a case that is right, wrong, crashes or hangs."""

import pytest

from benchmarks import first_launch
from sigjax.numerics import Case

SMALL = Case("float32", 16, 5, 7, biases=True, lengths=((5, 7), (2, 0)))


def test_a_right_case_is_ok_in_a_process_of_its_own():
    assert first_launch.launch(SMALL, "xla", seconds=120) == "ok"


def test_a_crash_is_said_with_its_last_line():
    verdict = first_launch.launch(SMALL, "none", seconds=120)
    assert verdict.startswith("crashed (1): ValueError: implementation must be")


def test_a_hang_ends_with_the_watchdog():
    assert first_launch.launch(SMALL, "xla", seconds=0.05) == "hung for 0.05 s"


def test_a_wrong_case_says_what_broke_the_rule(monkeypatch: pytest.MonkeyPatch):
    op = first_launch.sigmoid_attention

    def doubled(**arguments):
        return 2 * op(**arguments)

    monkeypatch.setattr(first_launch, "sigmoid_attention", doubled)
    lines = first_launch.violations(SMALL, "xla")
    assert [line.split(":")[0] for line in lines][:1] == ["query"]
    assert any(line.startswith("output: error") for line in lines)


def test_the_exit_status_counts_failures(monkeypatch, capsys):
    monkeypatch.setattr(
        first_launch, "launch", lambda case, *_: "ok" if "H64" in case.label else "no"
    )
    assert first_launch.main([]) == 1
    assert "16 of 32 are right" in capsys.readouterr().out
    assert first_launch.main(["--only", "H64"]) == 0


def test_a_label_that_no_case_has_is_refused(capsys):
    with pytest.raises(SystemExit):
        first_launch.main(["--only", "H7"])
    assert "part of a case's label, got 'H7'" in capsys.readouterr().err
