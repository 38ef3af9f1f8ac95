"""The benchmark's command line, and a tiny real run."""

import csv
import json
from types import SimpleNamespace

import jax
import pytest

from benchmarks import attention, jax_contenders, options, rows, run
from benchmarks.plot import STYLES
from sigjax import choice
from tests.benchmark_parts import ROOT, fake_worker

SMALL = ["--device", "cpu", "--head-sizes", "16", "--lengths", "32", "--tokens", "64"]
SMALL += ["--width", "32", "--rounds", "2", "--burst-ms", "1", "--rest-s", "0"]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A real run on this CPU, with a worker that stands in for the GPU's."""
    folder = tmp_path_factory.mktemp("run")
    command = fake_worker(folder)
    argv = [*SMALL, "--workloads", "dense,padded25", "--out", str(folder / "out")]
    argv += ["--contenders", "sigjax_xla,jax_xla,triton_sigmoid", "--prewarm", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "worker_command", lambda python, path: command)
        status = attention.main(argv)
    return SimpleNamespace(status=status, folder=folder / "out")


def test_a_run_measures_every_cell_and_writes_table_and_pictures(tiny_run):
    measured = rows.read_csv(tiny_run.folder / "attention.csv")
    assert tiny_run.status == 0
    assert {(row.workload, row.direction) for row in measured} == {
        (name, direction) for name in ("dense", "padded25") for direction in ("forward", "backward")
    }
    assert len(measured) == 4 * 3
    names = sorted(path.name for path in tiny_run.folder.iterdir())
    assert names == ["attention.csv", "attention_dense.png", "attention_padded25.png"]


def test_a_run_records_where_its_numbers_come_from(tiny_run):
    row = rows.read_csv(tiny_run.folder / "attention.csv")[0]
    assert row.jax == jax.__version__
    assert (row.torch, row.worker_triton, row.triton_sigmoid) == ("2", "3.6", "0.1.2")
    assert row.sigjax
    assert row.commit
    assert row.command.startswith("python -m benchmarks.attention --device cpu")
    assert str(tiny_run.folder.parent) not in (tiny_run.folder / "attention.csv").read_text()


def test_a_run_compares_both_processes_within_each_round(tiny_run):
    for row in rows.read_csv(tiny_run.folder / "attention.csv"):
        assert row.rounds == 2
        assert row.ratio_vs_triton_sigmoid_q20 is not None
        fastest = (4 * row.ms_q20 - row.ms_q80) / 3  # of two rounds, one of which may be slow
        assert 0 < row.ratio_vs_triton_sigmoid_q20 <= 1.001 * 0.032 / fastest
        if row.contender == "triton_sigmoid":
            assert (row.ms_median, row.ratio_vs_triton_sigmoid_median) == (0.032, 1.0)


def test_wrong_numbers_are_not_timed_and_the_status_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(jax_contenders.ATTENTIONS, "sigjax_xla", lambda q, k, v, lengths: q + k + v)
    argv = [*SMALL, "--workloads", "dense", "--directions", "forward", "--out", str(tmp_path)]
    assert attention.main(argv) == 1
    assert {row.contender for row in rows.read_csv(tmp_path / "attention.csv")} == {"jax_xla"}
    assert "not measured: sigjax_xla, dense T=32 H=16: wrong output" in capsys.readouterr().out


def test_a_contender_that_cannot_run_here_leaves_the_others_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(choice, "gpu_capability", lambda: None)
    argv = [*SMALL, "--workloads", "dense", "--directions", "forward", "--out", str(tmp_path)]
    assert attention.main([*argv, "--contenders", "sigjax,jax_xla"]) == 1
    assert {row.contender for row in rows.read_csv(tmp_path / "attention.csv")} == {"jax_xla"}
    assert "not measured: sigjax, dense T=32 H=16: implementation 'triton'" in (
        capsys.readouterr().out
    )


def test_a_package_that_is_not_installed_is_said_and_skipped(monkeypatch, tmp_path, capsys):
    command = fake_worker(tmp_path, {"missing": "ImportError: no torch"})
    monkeypatch.setattr(attention, "worker_command", lambda python, path: command)
    argv = [*SMALL, "--workloads", "dense", "--directions", "forward", "--out", str(tmp_path / "o")]
    assert attention.main([*argv, "--contenders", "jax_xla,triton_sigmoid"]) == 0
    text = capsys.readouterr().out
    assert "not measured: triton_sigmoid: not installed (ImportError: no torch)" in text


def test_a_spent_budget_starts_no_cell_and_lists_what_is_left(tmp_path, capsys):
    argv = [*SMALL, "--workloads", "dense", "--out", str(tmp_path), "--contenders", "jax_xla"]
    assert attention.main([*argv, "--time-budget-s", "0"]) == 1
    text = capsys.readouterr().out
    assert "not measured: dense T=32 H=16 backward: the time budget is spent" in text
    assert not (tmp_path / "attention.csv").exists()


def test_a_gpu_run_on_a_host_without_one_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with pytest.raises(SystemExit, match="jax must see an NVIDIA GPU, got cpu"):
        attention.main(["--workloads", "dense"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workloads", "dance"], "expected some of dense,padded25,padded50,ragged, got dance"),
        (["--contenders", "flash"], "expected some of sigjax"),
        (["--lengths", "1k"], "expected whole numbers separated by commas, got '1k'"),
        (["--lengths", "1000"], "length must divide tokens = 16384, got 1000"),
        (["--rounds", "0"], "rounds and burst_ms must be above 0"),
        (["--worker-python", "no-such-python"], "--worker-python must be an interpreter"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_wrong_option_ends_with_status_2_and_its_reason(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        options.parse(argv, "")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_default_is_every_workload_of_the_paper_once():
    chosen = options.parse([], "")
    labels = [shape.label for shape in chosen.workloads]
    assert len(labels) == len(set(labels)) == 3 * 10 + 2
    assert chosen.contenders == ("sigjax", "jax_cudnn", "jax_xla", "triton_sigmoid")


def test_every_contender_can_be_named_and_has_its_colour():
    assert options.parse(["--contenders", "sigjax,sigjax_fast"], "").contenders == (
        "sigjax",
        "sigjax_fast",
    )
    assert set(STYLES) == set(options.CONTENDERS)
    assert len({colour for _, colour in STYLES.values()}) == len(STYLES)


def test_long_errors_are_told_in_a_line():
    assert run.brief(RuntimeError("RESOURCE_EXHAUSTED: " + "x" * 999 + "\nmore")).count("x") < 300
    assert run.brief(RuntimeError()) == "RuntimeError"


def test_a_cards_folder_is_plain():
    assert attention.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_committed_results_have_the_rows_columns():
    for path in (ROOT / "benchmarks" / "results").glob("*/attention.csv"):
        with path.open(newline="") as file:
            assert next(csv.reader(file)) == rows.columns(), path
        assert all(
            json.loads(row.throttle_reasons.replace("0x", "") and "1")
            for row in rows.read_csv(path)
        )
