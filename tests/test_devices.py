"""The benchmark of several devices: a whole small run, its arithmetic, and what it refuses."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from matplotlib.axes import Axes

import sigjax
from benchmarks import devices, devices_cells, devices_run
from benchmarks.clocks import ClockState
from benchmarks.devices_cells import Cell, Equality, Sends, Work
from benchmarks.devices_model import (
    COLLECTIVES,
    count_collectives,
    efficiencies,
    predict,
    predict_data_parallel,
    ring_bytes,
    scaled_step_ms,
)
from benchmarks.devices_options import Options, UsageError, parse, prepare_environment
from benchmarks.devices_plot import figure
from benchmarks.devices_probe import Cards, numbers, slowest
from benchmarks.devices_rows import (
    Row,
    contender_name,
    predictions,
    problems,
    sends_name,
    summarise,
)
from benchmarks.devices_sizes import SMALL
from benchmarks.devices_training import joined, make_batch
from benchmarks.measure import Burst, Measurement
from benchmarks.provenance import collect
from tests.benchmark_parts import COOL, ROOT
from tests.other_process import OtherProcess

ORIGIN = collect(card="a card", driver="1", worker_versions={}, argv=[], commit="abc")
EIGHT = [("op", "batch", "forward"), ("op", "heads", "forward"),
         ("op", "batch", "forward+backward"), ("op", "heads", "forward+backward"),
         ("train", "batch", "step"), ("context", "sequence", "forward+backward")]  # fmt: skip

COUNTS = ("all_gather", "all_reduce", "all_to_all", "collective_permute", "other_collectives")


class SmallRun:
    """What a small run on eight simulated devices printed and wrote."""

    def __init__(self, folder: Path) -> None:
        command = ["--small", "--devices", "1,8", "--commit", "abc", "--out", str(folder)]
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.devices", *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self.lines = done.stdout.splitlines()
        self.folder = folder
        with (folder / "devices.csv").open(newline="", encoding="utf-8") as file:
            self.rows = list(csv.DictReader(file))

    def row(self, part: str, case: str, direction: str) -> dict[str, str]:
        """The row of a cell on eight devices."""
        cell = (part, case, direction, "8")
        keys = ("part", "case", "direction", "devices")
        (row,) = [row for row in self.rows if tuple(row[key] for key in keys) == cell]
        return row


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun(tmp_path_factory.mktemp("devices"))


def test_every_cell_is_measured_on_one_device_and_on_eight(small):
    cells = [tuple(row[key] for key in ("part", "case", "direction")) for row in small.rows]
    assert cells == [cell for cell in EIGHT for _ in range(2)]
    assert [row["devices"] for row in small.rows] == ["1", "8"] * len(EIGHT)
    assert {row["kind"] for row in small.rows} == {"measured"}


@pytest.mark.parametrize("case", ["batch", "heads"])
def test_the_forward_pass_of_sharded_attention_sends_nothing(small, case):
    row = small.row("op", case, "forward")
    counts = {name: row[name] for name in COUNTS}
    assert set(counts.values()) == {"0"}, counts


def test_nothing_gathers_and_each_part_sends_in_its_own_way(small):
    assert {row["all_gather"] for row in small.rows} == {"0"}
    assert int(small.row("train", "batch", "step")["all_reduce"]) > 0
    context = small.row("context", "sequence", "forward+backward")
    assert int(context["collective_permute"]) > 0


@pytest.mark.parametrize("cell", EIGHT, ids=" ".join)
def test_eight_devices_compute_what_one_does(small, cell):
    row = small.row(*cell)
    assert float(row["output_error"]) < 2**-8
    if cell[2] == "forward":
        assert row["gradient_error"] == ""
    else:
        assert float(row["gradient_error"]) < 2**-8
    if cell[0] == "op":
        assert row["bitwise_equal"] == "True"


def test_every_row_has_an_efficiency_between_its_quantiles(small):
    for row in small.rows:
        low, middle, high = (float(row[f"efficiency_{x}"]) for x in ("q20", "median", "q80"))
        assert 0 < low <= middle <= high
        assert row["devices"] == "8" or middle == 1


def test_work_grows_with_the_devices_where_scaling_is_weak(small):
    batches = {(row["part"], row["case"], row["devices"]): int(row["B"]) for row in small.rows}
    assert batches["op", "batch", "8"] == 8 * batches["op", "batch", "1"]
    assert batches["train", "batch", "8"] == 8 * batches["train", "batch", "1"]
    assert batches["op", "heads", "8"] == batches["op", "heads", "1"]
    weak = {(row["part"], row["case"]) for row in small.rows if row["scaling"] == "weak"}
    assert weak == {("op", "batch"), ("train", "batch")}


def test_the_rings_sends_are_timed_alone(small):
    row = small.row("context", "sequence", "forward+backward")
    assert float(row["communication_ms_median"]) > 0
    assert float(row["communication_share_median"]) > 0
    block = int(row["T"]) // 8 * int(row["N"]) * int(row["H"])
    assert float(row["sent_mb_per_device"]) * 1e6 == pytest.approx(ring_bytes(block, 2, 4, 8))
    others = [row for row in small.rows if row["part"] != "context"]
    assert {row["communication_ms_median"] for row in others} == {""}


def test_a_run_tells_where_it_comes_from_and_how_far_it_is(small):
    assert {row["commit"] for row in small.rows} == {"abc"}
    command = "python -m benchmarks.devices --small --devices 1,8 --commit abc --out FOLDER"
    assert {row["command"] for row in small.rows} == {command}
    cells = [line for line in small.lines if "efficiency" in line]
    assert len(cells) == len(EIGHT)
    assert all(line.startswith("[") and " s] " in line for line in small.lines)
    assert sorted(path.name for path in small.folder.iterdir()) == ["devices.csv", "devices.png"]


def test_sends_alone_are_those_of_a_forward_and_a_backward_pass(eight_devices: OtherProcess):
    for count in (2, 8):
        error = eight_devices.check("tests.test_devices", "ring_sends_its_bytes", count)
        assert error is None, error


def ring_sends_its_bytes(count: int) -> None:
    """In a process with eight devices."""
    mesh = devices_cells.first_devices(count)
    arrays = devices_cells.normal(4, (1, 48 * count, 2, 16))
    attention = partial(
        sigjax.context_parallel_attention, mesh=mesh, axis_name="d", implementation="xla"
    )
    ring = jax.make_jaxpr(devices_cells.with_gradients(attention))(*arrays)
    sends = devices_cells.ring_sends(mesh, arrays[1], arrays[2])
    assert sum(sent(ring.jaxpr)) == sends.bytes == ring_bytes(48 * 2 * 16, 2, 4, count)


def sent(jaxpr: Any) -> Iterator[int]:
    """Bytes of each send of a device, those in a loop as often as it runs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ppermute":
            yield from (x.aval.size * x.aval.dtype.itemsize for x in equation.invars)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for body in jaxprs_in_params(equation.params):
            yield from (times * size for size in sent(body))


def test_collectives_are_counted_whether_they_wait_or_not():
    text = """
      %all-reduce.2 = f32[8]{0} all-reduce(f32[8]{0} %x), channel_id=1, to_apply=%add
      %start = (f32[8], f32[8]) all-reduce-start(%x), channel_id=2
      %done = f32[8] all-reduce-done(%start)
      %y = (bf16[2]{0}, bf16[2]{0}) all-gather(%a, %b), dimensions={0}
      %z = bf16[2]{0} ragged-all-to-all(%y)
      ROOT %w = f32[8] fusion(%all-to-all.3), kind=kLoop, calls=%all-gather
    """
    found = {name: count for name, count in count_collectives(text).items() if count}
    assert found == {"all-reduce": 2, "all-gather": 1, "ragged-all-to-all": 1}
    assert set(count_collectives("")) == set(COLLECTIVES)


def test_efficiency_is_one_where_no_time_is_lost():
    one = np.array([8.0, 10.0])
    np.testing.assert_allclose(efficiencies(one, one, 4, "weak"), 1)
    np.testing.assert_allclose(efficiencies(one, one / 4, 4, "strong"), 1)
    np.testing.assert_allclose(efficiencies(one, one, 4, "strong"), 0.25)


def test_one_device_sends_nothing():
    assert ring_bytes(100, 2, 4, 1) == 0


def test_a_ring_is_predicted_ideal_where_sending_takes_no_time():
    step = scaled_step_ms(80.0, measured=2, devices=8)
    assert predict(8, one_device_ms=160.0, step_ms=step, step_bytes=0.0, gb_s=1.0) == 1


def test_a_predicted_step_takes_the_longer_of_computing_and_sending():
    given = {"one_device_ms": 160.0, "step_ms": 10.0, "gb_s": 100.0}
    assert predict(4, **given, step_bytes=1e9) == pytest.approx(40 / 50)
    assert predict(4, **given, step_bytes=0.5e9) == pytest.approx(40 / 45)
    assert predict(4, **given, step_bytes=2e9) == pytest.approx(40 / 100)


def test_a_prediction_of_what_was_measured_keeps_its_loss():
    step = scaled_step_ms(100.0, measured=2, devices=2)
    assert predict(2, one_device_ms=160.0, step_ms=step, step_bytes=0, gb_s=1) == pytest.approx(0.8)
    given = {"one_device_ms": 12.0, "measured": 2, "measured_ms": 15.0}
    assert predict_data_parallel(2, **given) == pytest.approx(0.8)


def test_all_reduce_never_costs_more_than_twice_that_of_two_devices():
    given = {"one_device_ms": 10.0, "measured": 2, "measured_ms": 11.0}
    found = [predict_data_parallel(n, **given) for n in (2, 4, 8, 10**6)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(10 / 12, abs=1e-5)


def test_more_devices_are_not_predicted_to_be_faster_than_one():
    assert predict_data_parallel(8, one_device_ms=10.0, measured=2, measured_ms=9.9) == 1


def work(devices: int, part: str = "op", equality: Equality | None = None, **counts: int) -> Work:
    sends = Sends(lambda: None, 1_000_000) if part == "context" and devices > 1 else None
    collectives = {name.replace("_", "-"): count for name, count in counts.items()}
    return Work(devices, 1, lambda: None, collectives, equality, sends)


def cell(part: str = "op", *works: Work) -> Cell:
    direction = {"op": "forward", "train": "step", "context": "forward+backward"}[part]
    scaling = "strong" if part == "context" else "weak"
    works = works or (work(1, part), work(2, part))
    return Cell(part, "batch", direction, scaling, 1024, 2, 16, "bfloat16", works)


def measurement(times: Mapping[str, tuple[float, ...]]) -> Measurement:
    """Each contender's milliseconds by round."""
    rounds = [
        {name: Burst(ms, COOL) for name, ms in zip(times, round_, strict=True)}
        for round_ in zip(*times.values(), strict=True)
    ]
    return Measurement(tuple(rounds), 0, dict.fromkeys(times, 3))


def rows_of(part: str) -> list[Row]:
    times = {contender_name(1): (10.0, 20.0), contender_name(2): (12.0, 24.0)}
    if part == "context":
        times[sends_name(2)] = (1.2, 2.4)
    return summarise(cell(part), measurement(times), ORIGIN)


def test_ratios_are_taken_within_a_round():
    _, two = rows_of("op")
    assert (two.efficiency_q20, two.efficiency_q80) == pytest.approx((10 / 12, 10 / 12))
    assert two.ms_median == 18
    _, ring = rows_of("context")
    assert ring.efficiency_median == pytest.approx(10 / 24)
    assert ring.communication_share_q80 == pytest.approx(0.1)
    assert ring.bandwidth_gb_s == pytest.approx(1e6 / 1.8e-3 / 1e9)


def test_each_devices_share_of_useful_work_counts():
    _, two = rows_of("op")
    assert two.tflops_per_device_median == pytest.approx(4 * 2 * 16 * 1024**2 / 2 / 18e-3 / 1e12)
    assert rows_of("train")[1].tflops_per_device_median is None


def test_a_cell_without_a_round_has_no_rows():
    with pytest.raises(ValueError, match="must hold a round"):
        summarise(cell(), Measurement((), 4, {}), ORIGIN)


@pytest.mark.parametrize("part", ["train", "context"])
def test_four_and_eight_devices_are_predicted_and_called_so(part):
    found = predictions(rows_of(part))
    assert [(row.kind, row.devices) for row in found] == [("predicted", 4), ("predicted", 8)]
    assert all(0 < row.efficiency_median < 1 for row in found)
    assert all(row.rounds is None and row.efficiency_q20 is None for row in found)
    scale = 8 if part == "context" else 1
    one = rows_of(part)[0].ms_median
    assert found[1].ms_median * scale * found[1].efficiency_median == pytest.approx(one)
    assert "(predicted)" in devices_run.line([*rows_of(part), *found])


def test_what_was_measured_or_sends_nothing_is_not_predicted():
    one, two = rows_of("train")
    assert [row.devices for row in predictions([one, replace(two, devices=4)])] == [8]
    assert predictions([one, replace(two, devices=8)]) == []
    assert predictions([one]) == []
    assert predictions(rows_of("op")) == []


def test_a_ring_without_a_bandwidth_is_not_predicted():
    one, two = rows_of("context")
    with pytest.raises(ValueError, match="must have a bandwidth"):
        predictions([one, replace(two, bandwidth_gb_s=None)])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"all_reduce": 1}, "forward pass has collectives"),
        ({"part": "train", "direction": "step", "all_gather": 2}, "2 all-gathers"),
        ({"output_error": 0.5}, "output_error 0.5 is above"),
        ({"gradient_error": float("nan")}, "gradient_error nan is above"),
    ],
    ids=str,
)
def test_what_breaks_a_promise_is_named(change, text):
    two = rows_of("op")[1]
    assert problems(two) == []
    (found,) = problems(replace(two, **change))
    assert text in found


def test_training_may_reduce_but_attention_forward_may_not():
    assert problems(replace(rows_of("train")[1], all_reduce=3)) == []


def test_the_slowest_and_the_hottest_card_in_use_counts():
    states = [ClockState(1980, 50, 0x4), ClockState(1200, 70, 0x20), ClockState(300, 90, 0x40)]

    class Fixed:
        card, driver = "a card", "1"

        def __init__(self, state: ClockState) -> None:
            self.state = state

        def start(self) -> None:
            """Begins."""

        def stop(self) -> ClockState:
            """Ends."""
            return self.state

    cards = Cards([Fixed(state) for state in states])
    cards.start()
    assert cards.stop() == ClockState(300, 90, 0x64)
    cards.use(2)
    assert cards.stop() == ClockState(1200, 70, 0x24)
    assert slowest([ClockState()]) == ClockState()


def test_visible_devices_are_watched_in_their_order():
    assert numbers(2, "") == ["0", "1"]
    assert numbers(2, "GPU-b, 1,0") == ["GPU-b", "1"]


def test_losses_of_joined_batches_are_means_of_theirs():
    batches = [make_batch(SMALL, seed) for seed in range(3)]
    whole = joined(batches)
    assert whole.gene_ids.shape == (3 * SMALL.rows, SMALL.row_length)
    assert not np.array_equal(batches[0].gene_ids, batches[1].gene_ids)
    assert all(np.array_equal(whole.queries, batch.queries) for batch in batches)
    assert len({int(batch.masked.sum()) for batch in batches}) == 1
    assert all((batch.lengths == SMALL.row_length).all() for batch in batches)


def test_predictions_are_drawn_hollow_behind_what_was_measured():
    rows = [*rows_of("context"), *predictions(rows_of("context"))]
    (panel,) = figure(rows).axes
    assert isinstance(panel, Axes)
    predicted = panel.lines[-2]
    assert predicted.get_linestyle() == "--"
    assert list(np.asarray(predicted.get_xdata())) == [2, 4, 8]
    assert predicted.get_markerfacecolor() == "none"
    assert predicted.get_markevery() == [1, 2]


class Part:
    """A part whose one cell costs nothing."""

    def __init__(self, made: Cell) -> None:
        self.made = made

    def __call__(self, *_: Any) -> "Part":
        """As if it were a part's class."""
        return self

    def cells(self) -> Iterator[tuple[str, Callable[[], Cell]]]:
        """One cell."""
        yield "a cell", lambda: self.made


def run_parts(monkeypatch, folder: Path, *cells: Cell, budget: float | None = None) -> int:
    parts = {str(i): Part(made) for i, made in enumerate(cells)}
    monkeypatch.setattr(devices_run, "PARTS", parts)
    options = Options(folder, (1,), tuple(parts), budget, "abc", small=True)
    return devices_run.run(options, ["--small"])


def test_a_run_fails_where_a_promise_is_broken_and_still_writes(monkeypatch, tmp_path, capsys):
    broken = cell("op", work(1), work(2, equality=Equality(bitwise=False, output=0.5)))
    assert run_parts(monkeypatch, tmp_path, cell(), broken) == 1
    assert "BROKEN: op, batch, forward, T=1,024, 2 devices: output_error 0.5" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "devices.csv").read_text().count("measured") == 4


def test_no_cell_starts_past_the_time_budget(monkeypatch, tmp_path, capsys):
    assert run_parts(monkeypatch, tmp_path, cell(), budget=1e-9) == 1
    assert "not measured: a cell: no time left" in capsys.readouterr().out
    assert not (tmp_path / "devices.csv").exists()


def test_a_cell_on_hot_cards_is_named_and_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(devices_run, "interleave", lambda *_: Measurement((), 4, {}))
    assert run_parts(monkeypatch, tmp_path, cell()) == 1
    assert "not measured: a cell: the cards stayed too hot" in capsys.readouterr().out


def test_the_environment_is_ready_before_jax_and_keeps_what_the_user_set():
    environment: dict[str, str] = {}
    prepare_environment(environment, small=False)
    assert environment == {"NCCL_NVLS_ENABLE": "0"}
    environment = {"NCCL_NVLS_ENABLE": "1", "XLA_FLAGS": "--xla_dump_to=x"}
    prepare_environment(environment, small=True)
    assert environment["NCCL_NVLS_ENABLE"] == "1"
    assert environment["JAX_PLATFORMS"] == "cpu"
    flags = "--xla_dump_to=x --xla_force_host_platform_device_count=8"
    assert environment["XLA_FLAGS"] == flags
    prepare_environment(environment, small=True)
    assert environment["XLA_FLAGS"] == flags


def test_partitioning_rules_are_there_before_a_backend_starts():
    # A GPU's backend takes them when it starts, and no later.
    code = (
        "import sys, benchmarks.devices_run; from jax._src import xla_bridge;"
        "assert 'jax.experimental.custom_partitioning' in sys.modules;"
        "assert not xla_bridge.backends_are_initialized()"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_command_does_not_import_jax_before_it_set_the_environment():
    code = "import sys, benchmarks.devices; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_devices_are_sorted_and_every_part_is_measured_by_default():
    options = parse(["--out", "x", "--devices", "4,1,2,2"], "")
    assert options.devices == (1, 2, 4)
    assert options.parts == ("op", "train", "context")
    assert options.time_budget_s is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--devices", "2,4"], "1 among them, got '2,4'"),
        (["--devices", "0,1"], "1 among them, got '0,1'"),
        (["--devices", "1,two"], "1 among them, got '1,two'"),
        (["--devices", ""], "1 among them, got ''"),
        (["--parts", "op,all"], "expected some of op,train,context, got all"),
        (["--time-budget-s", "0"], "expected seconds above 0, got '0'"),
        (["--time-budget-s", "nan"], "expected seconds above 0, got 'nan'"),
        (["--time-budget-s", "soon"], "expected a number of seconds, got 'soon'"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_refused(arguments, text, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["--out", "x", *arguments], "")
    assert text in capsys.readouterr().err


def test_a_command_without_a_folder_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse([], "")
    assert "--out" in capsys.readouterr().err


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(UsageError, match="at most the 2 that jax sees, got 4"):
        devices_run.choose_counts((1, 4), 2, SMALL)


def test_devices_that_do_not_divide_the_work_are_refused():
    with pytest.raises(UsageError, match=r"must divide heads and lengths, .*, got 3"):
        devices_run.choose_counts((1, 3), 8, SMALL)


@pytest.mark.parametrize(("there", "counts"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4))])
def test_powers_of_two_are_measured_by_default(there, counts):
    assert devices_run.choose_counts(None, there, SMALL) == counts


def test_a_host_without_gpus_is_refused_with_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    with pytest.raises(SystemExit, match=r"jax must see NVIDIA GPUs, got cpu; or use --small"):
        devices.main(["--out", str(tmp_path)])
