"""The benchmark: workloads, bursts, rows, the worker's protocol, the gate and a tiny real run."""

import csv
import dataclasses
import json
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import attention, gate, jax_contenders, options, provenance, report, rows, run
from benchmarks.clocks import ClockState, NvmlProbe, merge, visible_device
from benchmarks.jax_contenders import JaxContender, make_inputs
from benchmarks.measure import Burst, Measurement, Plan, calls_per_burst, interleave
from benchmarks.plot import main as plot_main
from benchmarks.plot import plot
from benchmarks.torch_contender import (
    SCRIPT,
    Prewarming,
    TorchContender,
    WorkerError,
    prewarm_jobs,
    worker_command,
    worker_environment,
)
from sigjax import choice
from sigjax.testing import (
    DIRECTIONS,
    PAPER_HEAD_SIZES,
    PAPER_LENGTHS,
    WORKLOAD_NAMES,
    Direction,
    Workload,
    workload,
)

ROOT = Path(__file__).resolve().parent.parent
PADDED25_4K = (3787, 3575, 3983, 3563)
RAGGED = (
    1451,
    1188,
    263,
    786,
    14599,
    2769,
    1809,
    6653,
    16378,
    880,
    878,
    1045,
    3958,
    8105,
    810,
    803,
)
COOL = ClockState(1980, 50, 0)
TINY = Workload("padded25", 2, 32, 2, 16, (32, 24))


# Workloads


@pytest.mark.parametrize("head_size", PAPER_HEAD_SIZES)
@pytest.mark.parametrize("length", PAPER_LENGTHS)
@pytest.mark.parametrize("name", ["dense", "padded25", "padded50"])
def test_the_papers_workloads_keep_tokens_and_width(name, length, head_size):
    shape = workload(name, length, head_size)
    assert shape.batch * shape.length == 16384
    assert shape.heads * shape.head_size == 2048
    assert shape.dtype == "bfloat16"


@pytest.mark.parametrize(("name", "share"), [("padded25", 0.75), ("padded50", 0.5)])
def test_padded_lengths_fill_their_range(name, share):
    lengths = workload(name, 64, 128, tokens=64 * 2000).lengths
    assert lengths is not None
    assert (min(lengths), max(lengths)) == (share * 64, 64)


def test_ragged_is_sixteen_rows_spread_log_uniformly_from_200_to_t():
    shape = workload("ragged", 16384, 128)
    assert shape.lengths is not None
    assert shape.batch == len(shape.lengths) == 16
    assert all(200 <= length <= 16384 for length in shape.lengths)
    middle = (200 * 16384) ** 0.5
    assert 4 <= sum(length < middle for length in shape.lengths) <= 12


@pytest.mark.parametrize("name", WORKLOAD_NAMES)
def test_lengths_do_not_depend_on_the_head_size_or_the_moment(name):
    assert workload(name, 4096, 64).lengths == workload(name, 4096, 128).lengths


def test_lengths_stay_what_committed_results_were_measured_with():
    assert workload("padded25", 4096, 64).lengths == PADDED25_4K
    assert workload("ragged", 16384, 64).lengths == RAGGED


def test_flops_count_useful_pairs_and_two_and_a_half_times_as_many_backward():
    dense = workload("dense", 16384, 128)
    assert dense.flops("forward") == 4 * 2048 * 16384**2
    assert dense.flops("backward") == 2.5 * dense.flops("forward")
    assert TINY.flops("forward") == 4 * 2 * 16 * (32**2 + 24**2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dance", 1024, 64), "name must be one of dense, padded25, padded50, ragged, got 'dance'"),
        (("dense", 1000, 64), "length must divide tokens = 16384, got 1000"),
        (("dense", 1024, 96), "head_size must divide width = 2048, got 96"),
        (("ragged", 0, 64), "length must divide"),
    ],
    ids=["name", "length", "head-size", "zero"],
)
def test_a_workload_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        workload(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"lengths": (1,)}, "lengths must hold batch = 2 numbers, got 1"),
        ({"lengths": (1, 33)}, "lengths must lie between 0 and length = 32"),
    ],
    ids=["size", "count", "range"],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(TINY, **change)


# Bursts


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


# Clocks


def watch(probe: NvmlProbe, seconds: float) -> ClockState:
    probe.start()
    time.sleep(seconds)
    return probe.stop()


# The part of pynvml that the probe uses.
FAKE_NVML = SimpleNamespace(
    NVML_CLOCK_SM="sm",
    NVML_TEMPERATURE_GPU="gpu",
    nvmlInit=lambda: None,
    nvmlDeviceGetHandleByIndex=lambda index: ("index", index),
    nvmlDeviceGetHandleByUUID=lambda uuid: ("uuid", uuid),
    nvmlDeviceGetName=lambda handle: f"card {handle}",
    nvmlSystemGetDriverVersion=lambda: "580.1",
    nvmlDeviceGetClockInfo=lambda handle, kind: {"sm": 1980}[kind],
    nvmlDeviceGetTemperature=lambda handle, sensor: {"gpu": 61}[sensor],
    nvmlDeviceGetCurrentClocksEventReasons=lambda handle: 0x1 | 0x4,
)


@pytest.mark.parametrize(
    ("device", "handle"), [("3", ("index", 3)), ("GPU-ab", ("uuid", "GPU-ab"))], ids=str
)
def test_the_probe_reads_the_card_that_cuda_sees(device, handle):
    probe = NvmlProbe(FAKE_NVML, device=device)
    assert (probe.card, probe.driver) == (f"card {handle}", "580.1")
    assert watch(probe, 0.0) == watch(probe, 0.03) == ClockState(1980, 61, 0x4)


@pytest.mark.parametrize(
    ("variable", "device"), [(None, "0"), ("", "0"), ("2,0", "2"), ("GPU-ab", "GPU-ab")], ids=str
)
def test_the_card_is_the_first_of_cuda_visible_devices(monkeypatch, variable, device):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_device() == device


def test_samples_become_median_clock_highest_temperature_and_all_reasons_but_idle():
    samples = [ClockState(345, 50, 0x1), ClockState(1980, 60, 0x4), ClockState(1980, 55, 0x20)]
    assert merge(samples) == ClockState(1980, 60, 0x24)
    assert merge([ClockState()]) == ClockState()


# Rows


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


# The worker


FAKE_WORKER = """
    import os, sys, time
    sys.path.insert(0, {root!r})
    from benchmarks.torch_worker import serve

    class Fake:
        prepared = None
        def hello(self):
            return {hello!r}
        def prepare(self, workload, direction):
            if workload["length"] == 13:
                raise RuntimeError("out of memory")
            self.prepared = workload, direction
        def burst(self, calls):
            if calls == 99:
                print("a last word", file=sys.stderr, flush=True)
                os._exit(3)
            if calls == 98:
                time.sleep(60)
            return self.prepared[0]["length"] / 1000
        def release(self):
            self.prepared = None

    serve(Fake(), sys.stdin, sys.stdout)
"""
VERSIONS = {"torch": "2", "worker_triton": "3.6", "triton_sigmoid": "0.1.2"}


def fake_worker(folder: Path, hello: dict | None = None) -> list[str]:
    script = folder / "fake_worker.py"
    reply = {"versions": VERSIONS} if hello is None else hello
    script.write_text(textwrap.dedent(FAKE_WORKER).format(root=str(ROOT), hello=reply))
    return [sys.executable, str(script)]


def test_a_worker_answers_in_lock_step(tmp_path):
    with TorchContender(fake_worker(tmp_path)) as worker:
        assert worker.hello() is None
        assert worker.versions == VERSIONS
        worker.prepare(TINY, None, "backward")
        assert [worker.burst(calls) for calls in (1, 5)] == [0.032, 0.032]
        worker.release()


def test_an_error_of_the_worker_reaches_the_parent_and_the_worker_goes_on(tmp_path):
    with TorchContender(fake_worker(tmp_path)) as worker:
        with pytest.raises(WorkerError, match="triton_sigmoid: RuntimeError: out of memory"):
            worker.prepare(Workload("dense", 1, 13, 1, 16), None, "forward")
        worker.prepare(TINY, None, "forward")
        assert worker.burst(1) == 0.032


def test_an_unknown_request_is_an_error(tmp_path):
    with TorchContender(fake_worker(tmp_path)) as worker:
        worker.send(op="dance")
        with pytest.raises(WorkerError, match="op must be hello, prepare, burst or release"):
            worker.receive(20)


def test_a_worker_that_ends_is_an_error_with_its_last_words(tmp_path):
    with TorchContender(fake_worker(tmp_path)) as worker:
        with pytest.raises(WorkerError, match="the worker has ended: a last word"):
            worker.burst(99)
        with pytest.raises(WorkerError, match="the worker has ended"):
            worker.release()


def test_a_worker_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.torch_contender.BURST_TIMEOUT_S", 1.0)
    with TorchContender(fake_worker(tmp_path)) as worker:
        worker.hello()
        with pytest.raises(WorkerError, match="did not answer within 1 s"):
            worker.burst(98)


def test_the_real_worker_says_what_it_cannot_import():
    # -I -S: no site-packages, so no torch, whatever this machine has.
    with TorchContender([sys.executable, "-I", "-S", str(SCRIPT)]) as worker:
        reason = worker.hello()
    assert reason == "ModuleNotFoundError: No module named 'torch'"


def test_prewarming_serves_every_shape_and_reports_what_failed(tmp_path):
    jobs = [Workload("dense", 1, length, 1, 16) for length in (64, 32, 13)]
    prewarming = Prewarming(fake_worker(tmp_path), {}, jobs, workers=2)
    assert prewarming.finish() == ["triton_sigmoid: RuntimeError: out of memory"]
    prewarming.close()


def test_prewarming_takes_one_sequence_of_each_shape_with_kernels_of_its_own():
    shapes = [
        workload(n, t, h) for n in WORKLOAD_NAMES[:3] for t in (1024, 2048) for h in (64, 128)
    ]
    jobs = prewarm_jobs(shapes)
    assert len(jobs) == 8  # two lengths, two head sizes, padded or not
    assert all(job.batch == 1 for job in jobs)
    assert sum(job.lengths is None for job in jobs) == 4


def test_the_worker_sees_neither_our_triton_nor_our_settings():
    ours = {"PYTHONPATH": "x", "TRITON_PTXAS_PATH": "y", "TRITON_CACHE_DIR": "z", "HOME": "h"}
    assert worker_environment(ours) == {"TRITON_CACHE_DIR": "z", "HOME": "h"}
    assert worker_command("python3", "folder") == [
        "python3",
        "-P",
        str(SCRIPT),
        "--path",
        "folder",
    ]


# Contenders and the gate


def test_the_backward_pass_alone_gives_the_gradients():
    inputs = make_inputs(TINY)
    got = JaxContender("sigjax_xla").gradients(inputs)

    def loss(query, key, value):
        output = jax_contenders.ATTENTIONS["sigjax_xla"](query, key, value, inputs.lengths)
        return jnp.vdot(output, inputs.cotangent, preferred_element_type=jnp.float32)

    wanted = jax.grad(loss, argnums=(0, 1, 2))(*inputs[:3])
    for name, x, y in zip(gate.TENSORS[1:], got, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


def test_a_burst_needs_prepare():
    contender = JaxContender("jax_xla")
    with pytest.raises(RuntimeError, match="jax_xla must be prepared before a burst"):
        contender.burst(1)
    contender.prepare(TINY, make_inputs(TINY), "forward")
    assert contender.burst(2) > 0
    contender.release()
    with pytest.raises(RuntimeError, match="must be prepared"):
        contender.burst(1)


def test_quadratic_memory_is_kept_to_short_sequences():
    longest = workload("dense", 16384, 64)
    assert JaxContender("jax_xla").refusal(longest) is not None
    assert JaxContender("sigjax_xla").refusal(longest) is None
    assert JaxContender("jax_xla").refusal(TINY) is None


def test_the_gate_judges_output_and_gradients_of_the_longest_and_the_shortest_row():
    inputs = make_inputs(Workload("padded25", 3, 32, 3, 16, (30, 24, 32)))
    verdicts = gate.judge(JaxContender("sigjax_xla"), inputs)
    assert [(v.row, v.tensor) for v in verdicts] == [
        (row, tensor) for row in (1, 2) for tensor in gate.TENSORS
    ]
    assert all(verdict.passed for verdict in verdicts), verdicts


@pytest.mark.parametrize("factor", [1.02, float("nan")], ids=str)
def test_the_gate_refuses_numbers_that_are_two_percent_off_or_nan(monkeypatch, factor):
    right = jax_contenders.ATTENTIONS["sigjax_xla"]
    wrong = lambda *x: right(*x) * jnp.bfloat16(factor)  # noqa: E731
    monkeypatch.setitem(jax_contenders.ATTENTIONS, "sigjax_xla", wrong)
    verdicts = gate.judge(JaxContender("sigjax_xla"), make_inputs(TINY))
    assert not any(verdict.passed for verdict in verdicts)
    assert "output of row 0: error" in str(verdicts[0])


def test_rows_of_equal_length_are_judged_first_and_last():
    assert gate.rows_to_judge(make_inputs(Workload("dense", 3, 8, 1, 16))) == [0, 2]
    assert gate.rows_to_judge(make_inputs(Workload("dense", 1, 8, 1, 16))) == [0]


# The command line


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
        assert 0 < row.ratio_vs_triton_sigmoid_q20 <= 0.032 / row.ms_q20
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
