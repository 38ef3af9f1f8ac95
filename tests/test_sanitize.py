"""compute-sanitizer: what is made of its reports, and when the command fails."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import sanitize, sanitize_case
from sigjax.kernels.hopper_forward import hopper_forward_kernel
from sigjax.kernels.hopper_queue import ask
from tests import ptxas

KNOWN = frozenset({("hopper_forward.py", "30"), ("hopper_queue.py", "35")})
DISPATCH = """\
========= Error: Race reported between Read access at hopper_kernel+0x1e60 in hopper_forward.py:30
=========     and Write access at hopper_forward_kernel+0x1dd0 in hopper_forward.py:30 [6 hazards]
=========
"""
NUMBER = """\
========= Error: Race reported between Read access at hear+0x90 in hopper_queue.py:46
=========     and Write access at ask+0x80 in hopper_queue.py:35 [1 hazards]
=========
"""
OURS = """\
========= Error: Race reported between Read access at hopper_kernel+0x90 in hopper_math.py:12
=========     and Write access at hopper_forward_kernel+0x80 in hopper_forward.py:30 [1 hazards]
=========
"""
ONE, TWO = (f"========= RACECHECK SUMMARY: {n} hazards displayed (0 errors)\n" for n in (1, 2))


def test_reports_of_which_the_control_has_each_place_are_known():
    report = sanitize.parse(DISPATCH + ONE, KNOWN)
    assert report == sanitize.Report(found=1, known=1, places=())
    assert sanitize.describe(report) == "clean, 1 where the control has them"


def test_a_race_that_touches_another_line_is_not():
    report = sanitize.parse(DISPATCH + OURS + TWO, KNOWN)
    assert not report.is_clean
    assert sanitize.describe(report) == (
        "2 found, 1 where the control has them: hopper_math.py:12, hopper_forward.py:30"
    )
    assert not sanitize.parse(NUMBER + ONE, KNOWN).is_clean


def test_an_output_without_a_summary_is_not_clean():
    report = sanitize.parse("========= COMPUTE-SANITIZER\nran\n", KNOWN)
    assert not report.is_clean
    assert sanitize.describe(report) == "no summary"


def test_memory_errors_are_counted():
    text = """\
========= Invalid __global__ write of size 4 bytes
=========     at hopper_forward_kernel+0x10 in hopper_math.py:7
========= ERROR SUMMARY: 1 error
"""
    assert sanitize.parse(text, KNOWN).places == ("hopper_math.py:7",)
    assert sanitize.parse("========= ERROR SUMMARY: 0 errors\n", KNOWN).is_clean


def line_of(function: Any, place: sanitize.Place) -> str:
    file = Path(function.fn.__code__.co_filename)
    assert file.name == place[0]
    return file.read_text().splitlines()[int(place[1]) - 1]


def test_a_kernels_own_line_is_that_of_its_definition():
    place = sanitize.own_line(hopper_forward_kernel)
    assert line_of(hopper_forward_kernel, place).startswith("def hopper_forward_kernel(")


def test_the_control_may_be_reported_at_its_own_line_and_where_numbers_are_handed_over():
    own = sanitize.own_line(sanitize_case.control_kernel)
    places = sanitize.control_places()
    assert own in places
    lines = [line_of(ask, place) for place in places - {own}]
    for text in (".store(", ".load(", "def ask(", "def hear("):
        assert any(text in line for line in lines)
    assert not any("def new_queue(" in line for line in lines)


def test_the_own_line_of_our_kernels_is_known_where_that_of_the_control_is():
    own = sanitize.own_line(sanitize_case.control_kernel)
    number = ("hopper_queue.py", "35")
    assert sanitize.as_known(frozenset({number})) == {number}
    assert sanitize.own_line(hopper_forward_kernel) in sanitize.as_known(frozenset({own}))


def test_the_control_compiles_for_the_hopper_gpus():
    ptx = ptxas.ptx_of(sanitize_case.control_kernel, sanitize_case.control)
    ptxas.assert_no_spill(ptx)
    assert "mbarrier.try_wait" in ptx


def test_numbers_that_are_not_handed_to_all_or_to_two_programs_are_an_error():
    numbers = np.arange(16).reshape(2, 1, 8).repeat(3, 1)
    sanitize_case.check(numbers)
    for place, number in (((1, 2, 7), 3), ((1, slice(None), 7), 3)):
        wrong = numbers.copy()
        wrong[place] = number
        with pytest.raises(RuntimeError, match="must be given the same numbers, each once"):
            sanitize_case.check(wrong)


@pytest.mark.gpu
def test_the_control_hands_its_numbers_over():
    numbers = np.asarray(jax.jit(sanitize_case.control)())
    sanitize_case.check(numbers)
    programs, handed = sanitize_case.PROGRAMS, sanitize_case.HANDED.value
    # Those behind each program's own first tile.
    assert sorted(numbers[:, 0].ravel()) == list(range(programs, programs * (handed + 1)))


def fake_sanitizer(path: Path, said: str) -> str:
    """A program that says this in place of compute-sanitizer."""
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{said}END\n")
    path.chmod(0o755)
    return str(path)


def test_a_clean_run_succeeds(tmp_path, capsys):
    program = fake_sanitizer(tmp_path / "tool", "ran\n========= ERROR SUMMARY: 0 errors\n")
    assert sanitize.main(["--sanitizer", program, "--out", str(tmp_path / "said")]) == 0
    assert "H128 memcheck: clean\n" in capsys.readouterr().out
    assert len(list((tmp_path / "said").iterdir())) == 6


def test_what_the_control_does_not_show_is_not_known(tmp_path, monkeypatch, capsys):
    outputs = iter(["", "", "", DISPATCH, "", ""])

    def check(_sanitizer, _tool, _case, _seconds, known):
        said = next(outputs)
        return sanitize.parse(said + (ONE if said else ONE.replace("1", "0")), known), said

    monkeypatch.setattr(sanitize, "check", check)
    program = fake_sanitizer(tmp_path / "tool", "")
    assert sanitize.main(["--sanitizer", program]) == 1
    assert "H64 racecheck: 1 found: hopper_forward.py:30" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "verdict"),
    [("", "crashed (0): no message"), ("boom\n", "crashed (0): boom")],
    ids=["silent", "said"],
)
def test_a_case_that_did_not_run_has_crashed(said: str, verdict: str, tmp_path):
    program = fake_sanitizer(tmp_path / "tool", said)
    report, _ = sanitize.check(program, "memcheck", "H64", 60, KNOWN)
    assert sanitize.describe(report) == verdict


def test_a_case_that_does_not_end_has_hung(tmp_path):
    program = tmp_path / "tool"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    report, _ = sanitize.check(str(program), "memcheck", "H64", 0.2, KNOWN)
    assert sanitize.describe(report) == "hung for 0.2 s"


def test_a_program_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        sanitize.main(["--sanitizer", "no-such-program"])
    assert "--sanitizer must be a program, got 'no-such-program'" in capsys.readouterr().err
