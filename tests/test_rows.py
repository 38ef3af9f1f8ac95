"""Rows, their CSV, tables and pictures."""

import dataclasses
from typing import Any

import pytest

from benchmarks import provenance, report, rows
from benchmarks.clocks import ClockState
from benchmarks.measure import Burst, Measurement
from benchmarks.plot import main as plot_main
from benchmarks.plot import plot
from sigjax.testing import (
    DIRECTIONS,
    Direction,
    Workload,
    workload,
)
from tests.benchmark_parts import COOL, TINY

ORIGIN = rows.Provenance(
    date="2026-01-01T00:00:00+00:00",
    card="a card",
    driver="1",
    jax="0",
    jaxlib="0",
    triton="",
    jax_triton="",
    cudnn="",
    torch="",
    worker_triton="",
    triton_sigmoid="",
    sigjax="0",
    commit="abc",
    command="python -m benchmarks.attention",
)


def measurement_of(ms: dict[str, list[float]], state: ClockState = COOL) -> Measurement:
    rounds = [
        {name: Burst(times[i], state) for name, times in ms.items()}
        for i in range(len(next(iter(ms.values()))))
    ]
    return Measurement(tuple(rounds), 1, dict.fromkeys(ms, 7))


def rows_of(
    shape: Workload = TINY, direction: Direction = "forward", **ms: list[float]
) -> list[rows.Row]:
    return rows.summarise(shape, direction, measurement_of(ms), ORIGIN)


def test_ratios_are_taken_round_by_round():
    # The card slows down by half: within each round the contender is twice as fast.
    own, cudnn = rows_of(sigjax=[1.0, 2.0, 4.0], jax_cudnn=[2.0, 4.0, 8.0])
    assert own.ratio_vs_cudnn_median == own.ratio_vs_cudnn_q20 == own.ratio_vs_cudnn_q80 == 2.0
    assert cudnn.ratio_vs_cudnn_median == 1.0
    assert own.ratio_vs_triton_sigmoid_median is None


def test_a_row_holds_medians_quantiles_and_useful_tflops():
    (row,) = rows_of(sigjax=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (row.ms_q20, row.ms_median, row.ms_q80) == (2.0, 3.5, 5.0)
    assert row.tflops_q80 == pytest.approx(TINY.flops("forward") / 2e-3 / 1e12)
    assert row.tflops_q20 < row.tflops_median < row.tflops_q80
    assert (row.rounds, row.rounds_thrown_away, row.calls_per_burst) == (6, 1, 7)


def test_a_row_holds_the_clocks_of_its_bursts():
    states = [ClockState(1980, 50, 0x4), ClockState(1700, 70, 0x8), ClockState(1900, 60, 0)]
    rounds = tuple({"sigjax": Burst(1.0, state)} for state in states)
    (row,) = rows.summarise(TINY, "backward", Measurement(rounds, 0, {"sigjax": 1}), ORIGIN)
    assert (row.sm_clock_mhz_median, row.sm_clock_mhz_min) == (1900, 1700)
    assert (row.temperature_c_max, row.throttle_reasons) == (70, "0xc")


def test_a_card_without_nvml_leaves_the_clock_fields_empty():
    measured = measurement_of({"sigjax_xla": [1.0]}, ClockState())
    (row,) = rows.summarise(TINY, "forward", measured, ORIGIN)
    assert row.sm_clock_mhz_median is row.sm_clock_mhz_min is row.temperature_c_max is None


def test_no_round_makes_no_row():
    with pytest.raises(ValueError, match="measurement must hold a round, got none: 4 thrown away"):
        rows.summarise(TINY, "forward", Measurement((), 4, {"a": 1}), ORIGIN)


def test_rows_come_back_from_the_csv_as_they_were(tmp_path):
    written = rows_of(sigjax=[1.0, 2.0], triton_sigmoid=[1.5, 2.5])
    path = tmp_path / "new" / "attention.csv"
    rows.write_csv(path, written)
    read = rows.read_csv(path)
    assert [row.contender for row in read] == ["sigjax", "triton_sigmoid"]
    for got, wanted in zip(read, written, strict=True):
        for field in dataclasses.fields(rows.Row):
            value = getattr(wanted, field.name)
            approximate = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert getattr(got, field.name) == approximate, field.name


def test_the_csv_has_the_columns_of_a_row():
    assert sorted(rows.columns()) == sorted(field.name for field in dataclasses.fields(rows.Row))
    assert rows.columns()[:4] == ["date", "workload", "T", "B"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "attention.csv"
    rows.write_csv(path, rows_of(sigjax=[1.0]))
    before = path.read_bytes()
    not_a_row: Any = "not a row"
    with pytest.raises(AttributeError):
        rows.write_csv(path, [*rows_of(sigjax=[2.0]), not_a_row])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "attention.csv"
    path.write_text("date,speed\n2020,9\n")
    with pytest.raises(ValueError, match=r"attention\.csv must have the columns"):
        rows.read_csv(path)


def test_a_measured_cell_replaces_the_old_one_as_a_whole():
    old = rows_of(sigjax=[1.0], jax_cudnn=[1.0]) + rows_of(direction="backward", sigjax=[1.0])
    new = rows_of(sigjax=[2.0])
    merged = rows.merge(old, new)
    assert [(row.direction, row.contender, row.ms_median) for row in merged] == [
        ("backward", "sigjax", 1.0),
        ("forward", "sigjax", 2.0),
    ]


def test_the_recorded_command_has_no_path_of_this_machine():
    argv = ["--out", "/x/y", "--triton-sigmoid-path=/x/z", "--rounds", "3", "--worker-python", "/p"]
    assert provenance.command(argv) == (
        "python -m benchmarks.attention --triton-sigmoid-path PATH --rounds 3 --worker-python PATH"
    )


def test_a_checkout_without_git_says_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.git_commit() == "unknown"


def test_the_table_shows_every_row_and_a_dash_for_what_was_not_measured():
    lines = report.table(rows_of(sigjax=[1.0], jax_cudnn=[2.0])).splitlines()
    assert len(lines) == 3
    assert "2.000" in lines[1]
    assert " - " in lines[1]


def test_pictures_are_drawn_one_per_workload(tmp_path):
    measured = [
        row
        for name in ("dense", "padded25")
        for length in (64, 128)
        for head_size in (16, 32)
        for direction in DIRECTIONS
        for row in rows_of(
            workload(name, length, head_size, tokens=256, width=64),
            direction,
            sigjax=[1.0, 1.1],
            triton_sigmoid=[1.2, 1.3],
            jax_cudnn=[0.9, 1.0],
        )
    ]
    paths = plot(measured, tmp_path / "pictures")
    assert [path.name for path in paths] == ["attention_dense.png", "attention_padded25.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert len(list((tmp_path / "pictures").iterdir())) == 2


@pytest.mark.parametrize("names", [["a"], ["a", "b"]], ids=["drawn", "merged"])
def test_a_folder_without_results_is_refused(tmp_path, capsys, names):
    with pytest.raises(SystemExit):
        plot_main([str(tmp_path / name) for name in names])
    assert f"{names[-1]} must hold attention.csv with rows" in capsys.readouterr().err


def test_results_of_several_runs_are_merged_and_drawn(tmp_path):
    rows.write_csv(tmp_path / "a" / "attention.csv", rows_of(sigjax=[1.0]))
    rows.write_csv(tmp_path / "b" / "attention.csv", rows_of(direction="backward", sigjax=[2.0]))
    assert plot_main([str(tmp_path / name) for name in ("all", "a", "b")]) == 0
    merged = rows.read_csv(tmp_path / "all" / "attention.csv")
    assert [(row.direction, row.ms_median) for row in merged] == [("backward", 2), ("forward", 1)]
    assert (tmp_path / "all" / "attention_padded25.png").exists()
