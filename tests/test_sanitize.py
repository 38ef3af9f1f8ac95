"""compute-sanitizer: what is made of its reports, and when the command fails."""

from pathlib import Path

import pytest

from benchmarks import sanitize
from sigjax.kernels.hopper_forward import hopper_forward_kernel

OWN = frozenset({("hopper_forward.py", "30")})
DISPATCH = """\
========= Error: Race reported between Read access at hopper_kernel+0x1e60 in hopper_forward.py:30
=========     and Write access at hopper_forward_kernel+0x1dd0 in hopper_forward.py:30 [6 hazards]
=========
"""
OURS = """\
========= Error: Race reported between Read access at hopper_kernel+0x90 in hopper_math.py:12
=========     and Write access at hopper_forward_kernel+0x80 in hopper_forward.py:30 [1 hazards]
=========
"""
ONE, TWO = (f"========= RACECHECK SUMMARY: {n} hazards displayed (0 errors)\n" for n in (1, 2))


def test_reports_at_a_kernels_own_line_are_tritons():
    report = sanitize.parse(DISPATCH + ONE, OWN)
    assert report == sanitize.Report(found=1, dispatch=1, places=())
    assert sanitize.describe(report) == "clean, 1 of Triton's dispatch"


def test_a_race_that_touches_another_line_is_not():
    report = sanitize.parse(DISPATCH + OURS + TWO, OWN)
    assert not report.is_clean
    assert sanitize.describe(report) == (
        "2 found, 1 of Triton's dispatch: hopper_math.py:12, hopper_forward.py:30"
    )


def test_an_output_without_a_summary_is_not_clean():
    report = sanitize.parse("========= COMPUTE-SANITIZER\nran\n", OWN)
    assert not report.is_clean
    assert sanitize.describe(report) == "no summary"


def test_memory_errors_are_counted():
    text = """\
========= Invalid __global__ write of size 4 bytes
=========     at hopper_forward_kernel+0x10 in hopper_math.py:7
========= ERROR SUMMARY: 1 error
"""
    assert sanitize.parse(text, OWN).places == ("hopper_math.py:7",)
    assert sanitize.parse("========= ERROR SUMMARY: 0 errors\n", OWN).is_clean


def test_the_kernels_own_lines_are_those_of_their_definitions():
    file = Path(hopper_forward_kernel.fn.__code__.co_filename)
    lines = file.read_text().splitlines()
    (own,) = (int(line) for name, line in sanitize.own_lines() if name == file.name)
    assert lines[own - 1].startswith("def hopper_forward_kernel(")


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


def test_what_the_control_does_not_show_is_not_tritons(tmp_path, monkeypatch, capsys):
    outputs = iter(["", "", "", DISPATCH, "", ""])

    def check(_sanitizer, _tool, _case, _seconds, own):
        said = next(outputs)
        return sanitize.parse(said + (ONE if said else ONE.replace("1", "0")), own), said

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
    report, _ = sanitize.check(program, "memcheck", "H64", 60, OWN)
    assert sanitize.describe(report) == verdict


def test_a_case_that_does_not_end_has_hung(tmp_path):
    program = tmp_path / "tool"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    report, _ = sanitize.check(str(program), "memcheck", "H64", 0.2, OWN)
    assert sanitize.describe(report) == "hung for 0.2 s"


def test_a_program_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        sanitize.main(["--sanitizer", "no-such-program"])
    assert "--sanitizer must be a program, got 'no-such-program'" in capsys.readouterr().err
