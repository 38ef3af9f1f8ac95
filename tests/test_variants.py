"""The benchmark of variants: what it counts, judges, writes and refuses."""

import csv
import math
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import variants, variants_memory
from benchmarks.measure import Burst, Measurement
from benchmarks.rows import Provenance
from benchmarks.variants_cases import (
    FULL,
    PLAIN,
    SMALL,
    Claim,
    Variant,
    arguments,
    extras,
    function,
    hopper_variants,
    operands,
    segment_ids,
    shape_of,
    sparsity,
    variants_of,
)
from benchmarks.variants_rows import XLA_BYTES, MemoryRow, VariantRow, launches, ratios
from benchmarks.variants_tiles import (
    HopperKernel,
    Sparsity,
    helpers,
    hopper_visits,
    visited_tiles,
    visits,
)
from sigjax import reference
from sigjax.choice import compile_for
from sigjax.kernels import hopper_choice
from sigjax.kernels.tiles import Kernel, Tile, choose_tile
from sigjax.operands import Operands, Settings
from sigjax.testing import DIRECTIONS, Direction, Workload
from tests.benchmark_parts import COOL

KERNELS: tuple[Kernel | HopperKernel, ...] = (
    "forward",
    "query_gradient",
    "key_value_gradient",
    "bias_gradient",
    "hopper_forward",
    "hopper_backward",
)
MANY = settings(deadline=None, max_examples=25)
SIDES = st.sampled_from([16, 32, 64])
WINDOWS = st.tuples(st.integers(0, 300), st.integers(0, 300))


def brute_force(tile: Tile, allowed: np.ndarray) -> int:
    """Tiles with a pair that takes part, counted pair by pair; allowed is [queries, keys]."""
    queries, keys = np.nonzero(allowed)
    return len(set(zip(queries // tile.block_q, keys // tile.block_k, strict=True)))


def band(queries: int, keys: int, window: tuple[int, int]) -> np.ndarray:
    offsets = np.arange(keys)[None, :] - np.arange(queries)[:, None]
    return (-window[0] <= offsets) & (offsets <= window[1])


@MANY
@given(st.sampled_from(KERNELS), SIDES, SIDES, st.integers(1, 300), WINDOWS)
def test_a_window_visits_the_tiles_that_hold_a_pair_of_it(kernel, block_q, block_k, length, window):
    tile = Tile(block_q, block_k, 4, 1)
    # A tile at the end takes part as a whole; the side that its loop runs over ends at length.
    own = math.ceil(length / block_k) * block_k, math.ceil(length / block_q) * block_q
    of_keys = kernel in ("key_value_gradient", "hopper_backward")
    size = (length, own[0]) if of_keys else (own[1], length)
    found = visited_tiles(kernel, tile, length, Sparsity(window=window))
    assert found == brute_force(tile, band(*size, window))


@MANY
@given(st.sampled_from(KERNELS), SIDES, SIDES, st.integers(1, 300))
def test_without_a_window_every_tile_is_visited(kernel, block_q, block_k, length):
    found = visited_tiles(kernel, Tile(block_q, block_k, 4, 1), length, Sparsity())
    assert found == math.ceil(length / block_q) * math.ceil(length / block_k)


@MANY
@given(
    st.sampled_from(KERNELS),
    SIDES,
    SIDES,
    st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=6), min_size=1, max_size=2),
)
def test_segments_visit_the_tiles_that_hold_a_pair_of_one(kernel, block_q, block_k, rows):
    tile = Tile(block_q, block_k, 4, 1)
    packed = [np.repeat(np.arange(1, len(row) + 1), row)[:128] for row in rows]
    ids = np.stack([np.pad(row, (0, 128 - len(row))) for row in packed]).astype(np.int32)
    allowed = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] > 0)
    found = visited_tiles(kernel, tile, 128, Sparsity(segments=ids))
    assert found == sum(brute_force(tile, row) for row in allowed)


@MANY
@given(st.sampled_from(KERNELS), SIDES, SIDES, WINDOWS, st.sampled_from([1, 2, 4, 8]))
def test_segments_and_a_window_together_visit_no_tile_that_one_of_them_skips(
    kernel, block_q, block_k, window, count
):
    tile, shape = Tile(block_q, block_k, 4, 1), Workload("a", 1, 256, 1, 64)
    ids = segment_ids(shape, count)
    both = visited_tiles(kernel, tile, 256, Sparsity(window, ids))
    assert both <= visited_tiles(kernel, tile, 256, Sparsity(window))
    assert both <= visited_tiles(kernel, tile, 256, Sparsity(segments=ids))
    allowed = band(256, 256, window) & (ids[0][:, None] == ids[0][None, :])
    assert both >= brute_force(tile, allowed)


@pytest.mark.parametrize("head_size", [64, 128])
def test_a_plain_pass_visits_every_tile_of_the_tile_table(head_size):
    shape = Workload("dense", 4, 4096, 2048 // head_size, head_size)
    for direction in DIRECTIONS:
        for part in visits(shape, direction, Sparsity(), 90):
            assert part.kernel in KERNELS[:3]
            tile = choose_tile(cast("Kernel", part.kernel), head_size, 2, 90)
            assert part.tile == tile
            of_head = (4096 // tile.block_q) * (4096 // tile.block_k)
            assert part.tiles == 4 * shape.heads * of_head


def test_matrix_products_over_all_tiles_are_the_workloads_own_and_the_recomputed_ones():
    shape = Workload("dense", 4, 4096, 32, 64)
    (forward,) = visits(shape, "forward", Sparsity(), 90)
    assert forward.flops(64) == shape.flops("forward")
    backward = sum(part.flops(64) for part in visits(shape, "backward", Sparsity(), 90))
    # Both kernels compute logits and weight gradients: seven products where five would do.
    assert backward == shape.flops("backward") * 7 / 5


@pytest.mark.parametrize(("bias_shape", "programs"), [((1, 2, 256, 256), 32), ((1, 2, 256, 1), 8)])
def test_a_bias_gradient_visits_each_pair_of_every_row_whatever_it_broadcasts_over(
    bias_shape, programs
):
    shape = Workload("dense", 3, 256, 2, 64)
    parts = visits(shape, "backward", Sparsity(bias_shape=bias_shape), 90)
    assert [part.kernel for part in parts] == list(KERNELS[1:4])
    assert parts[2].tiles == parts[0].tiles == 3 * 2 * 4 * 4
    assert parts[2].programs == programs


def test_the_gradient_of_a_bias_without_queries_takes_no_kernel_of_its_own():
    shape = Workload("dense", 3, 256, 2, 64)
    parts = visits(shape, "backward", Sparsity(bias_shape=(1, 2, 1, 256)), 90)
    assert [part.kernel for part in parts] == list(KERNELS[1:3])


@pytest.mark.parametrize("cell", FULL.cells, ids=lambda cell: cell.label)
def test_every_cell_fills_the_card(cell):
    for variant in cell.variants:
        for part in visits(cell.workload, cell.direction, sparsity(variant, cell.workload), 90):
            assert part.programs >= 7 * 132, variant.name
            assert part.tiles >= part.programs or part.kernel == "bias_gradient"


def test_the_paper_shapes_are_those_of_the_claims():
    for cell in FULL.cells:
        shape = cell.workload
        assert shape.batch * shape.length == 16384
        assert shape.heads * shape.head_size == 2048
        assert cell.variants[0] == Variant(PLAIN)
    assert {(c.workload.length, c.workload.head_size, c.direction) for c in FULL.cells} == {
        (length, head_size, direction)
        for length in (4096, 16384)
        for head_size in (64, 128)
        for direction in DIRECTIONS
    }


SHAPE = SMALL.shapes[0]
ALL_VARIANTS = {
    f"{direction} {variant.name}": (direction, variant)
    for direction in DIRECTIONS
    for variant in variants_of(direction, SMALL.window)
}


@pytest.mark.parametrize(("direction", "variant"), ALL_VARIANTS.values(), ids=list(ALL_VARIANTS))
def test_a_variant_computes_what_its_name_says(direction: Direction, variant: Variant):
    """In float32, against the definition with the same argument."""
    shape = replace(SHAPE, dtype="float32", length=32)
    inputs, made = operands(shape), extras([variant], shape)
    got = function(variant, direction, "xla")(*arguments(variant, inputs, made))
    own = {name.split()[0]: x for name, x in made.items()}
    ids = own.get("segments")

    def definition(query, key, value, bias):
        given = Operands(query, key, value, bias, own.get("mask"))
        given = given._replace(query_segments=ids, key_segments=ids)
        window = sparsity(variant, shape).window
        return reference.attention(given, Settings(shape.head_size**-0.5, window=window))

    output, pullback = jax.vjp(definition, *inputs[:3], own.get("bias"))
    if direction == "forward":
        wanted = [output]
    else:
        gradients = pullback(inputs[3])
        wanted = [x for x in gradients[: 4 if variant.bias_gradient else 3] if x is not None]
    leaves = jax.tree.leaves(got)
    assert len(leaves) == len(wanted)
    for found, right in zip(leaves, wanted, strict=True):
        np.testing.assert_allclose(found.reshape(right.shape), right, rtol=2e-4, atol=2e-5)


@pytest.mark.usefixtures("kernels_without_code")
@pytest.mark.parametrize(
    ("direction", "name"),
    [
        ("forward", PLAIN),
        ("backward", PLAIN),
        ("backward", "bias"),
        ("backward", "bias per key"),
        ("forward", "segments"),
        ("backward", "segments"),
        ("backward", "vmap"),
    ],
)
def test_a_call_lowers_to_the_kernels_whose_tiles_are_counted(direction: Direction, name: str):
    """For a GPU this host does not have; the backward pass computes no output."""
    shape = Workload("variants", 4, 128, 2, 16)
    (variant,) = (v for v in variants_of(direction, 16) if v.name == name)
    given = arguments(variant, operands(shape), extras([variant], shape))
    with compile_for(90):
        traced = jax.jit(function(variant, direction, "triton")).trace(*given)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    skipped = sparsity(variant, shape)
    counted = len(visits(shape, direction, skipped, 90)) + helpers(direction, skipped)
    assert text.count("triton_kernel_call") == counted


@pytest.mark.usefixtures("kernels_without_code")
@pytest.mark.parametrize(
    ("direction", "variant"),
    [(direction, one) for direction in DIRECTIONS for one in hopper_variants(direction, 32, 256)],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_a_call_lowers_to_the_hopper_kernels_that_are_counted(
    direction: Direction, variant: Variant, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(hopper_choice.VARIABLE, "forward,backward,narrow")
    shape = Workload("hopper", 2, 256, 2, 64)
    given = arguments(variant, operands(shape), extras([variant], shape))
    with compile_for(90):
        traced = jax.jit(function(variant, direction, "triton")).trace(*given)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    skipped = sparsity(variant, shape)
    visited = hopper_visits(shape_of(variant, shape), direction, skipped)
    called = text.count("triton_kernel_call")
    if direction == "backward" and variant.name == "bias, no gradient":
        called -= 1  # XLA drops the kernel of a gradient that nobody asks for
    assert called == launches(variant, direction, visited, skipped)


@pytest.mark.parametrize("head_size", [64, 128])
def test_a_plain_hopper_pass_visits_all_pairs(head_size: int):
    shape = Workload("hopper", 4, 4096, 2048 // head_size, head_size)
    for direction in DIRECTIONS:
        (part,) = hopper_visits(shape, direction, Sparsity())
        assert part.flops(head_size) == shape.flops(direction)
        assert part.programs >= 132


def test_equal_segments_that_do_not_divide_a_row_are_refused():
    with pytest.raises(ValueError, match="segments must divide the length 64, got 7"):
        segment_ids(SHAPE, 7)


def measured(**ms: list[float]) -> Measurement:
    rounds = [
        {name: Burst(value, COOL) for name, value in zip(ms, values, strict=True)}
        for values in zip(*ms.values(), strict=True)
    ]
    return Measurement(tuple(rounds), 0, dict.fromkeys(ms, 1))


def test_a_ratio_is_taken_within_each_round_and_per_visited_work():
    measurement = measured(plain=[1.0, 2.0, 4.0], window=[0.5, 1.0, 1.0])
    work = {"plain": 8.0, "window": 2.0}
    assert ratios(measurement, work, "window", "time") == pytest.approx((2.0, 2.0, 3.2))
    assert ratios(measurement, work, "window", "tile") == pytest.approx((0.5, 0.5, 0.8))


def test_a_peer_takes_the_plain_call_s_place():
    measurement = measured(plain=[1.0, 2.0, 4.0], rows=[0.4, 1.0, 1.0], window=[0.5, 1.0, 1.0])
    work = {"plain": 8.0, "rows": 1.0, "window": 2.0}
    assert ratios(measurement, work, "window", "tile", "rows") == pytest.approx((2.0, 1.76, 2.0))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_peers_meet_as_many_pairs_or_logits_as_spread(direction: Direction):
    shape = Workload("hopper", 2, 4096, 2, 64)
    variants = {one.name: one for one in hopper_variants(direction, 512, shape.length)}
    peers = {name: variants[one.peer] for name, one in variants.items() if one.peer is not None}
    wanted = {"segments", "window"} | ({"bias"} if direction == "forward" else set())
    assert set(peers) == wanted
    # Keys that a query sees: those of its segment, or about those of its window.
    assert variants["segments"].segments == peers["segments"].rows
    assert shape_of(peers["window"], shape).length == 2 * 512
    for peer in peers.values():
        own = shape_of(peer, shape)
        assert own.batch * own.length == shape.batch * shape.length
        assert arguments(peer, operands(shape), {})[0].shape == (own.batch, own.length, 2, 64)
    if direction == "forward":
        query, key, _, _, own = arguments(peers["bias"], operands(shape), {})
        plain = operands(shape)
        assert own == {}
        assert jnp.array_equal(key, plain[1])
        spread, usual = (float(jnp.std(x.astype(jnp.float32))) for x in (query, plain[0]))
        assert spread == pytest.approx(math.sqrt(2) * usual, rel=1e-2)


PROVENANCE = Provenance("now", "a card", *[""] * (len(fields(Provenance)) - 2))


def made_row(claim: Claim | None, **changes: float) -> VariantRow:
    values: dict[str, Any] = dict.fromkeys((f.name for f in fields(VariantRow)), 1)
    values |= vars(PROVENANCE) | changes
    values["claim_basis"] = "" if claim is None else claim.basis
    values["claim_least"] = None if claim is None else claim.least
    return VariantRow(**values)


def test_a_claim_is_met_at_its_least_ratio_of_its_own_basis():
    claim = Claim("tile", 0.8)
    assert made_row(claim, ratio_tile_median=0.8, ratio_time_median=0.1).met
    assert made_row(claim, ratio_tile_median=0.79, ratio_time_median=9.0).met is False
    assert (
        made_row(Claim("time", 12.0), ratio_tile_median=99.0, ratio_time_median=11.9).met is False
    )
    assert made_row(None).met is None


def test_memory_is_within_the_bound_only_where_plan_and_peak_are():
    def row(planned: int, peak: int | None) -> MemoryRow:
        values: dict[str, Any] = dict.fromkeys((f.name for f in fields(MemoryRow)), 1)
        values |= vars(PROVENANCE)
        values |= {"allowed_bytes": 9, "planned_bytes": planned, "peak_bytes": peak}
        return MemoryRow(**values)

    bound = 9 + XLA_BYTES
    assert row(bound, bound).met
    assert row(bound, None).met
    assert not row(bound + 1, bound).met
    assert not row(bound, bound + 1).met


def test_the_memory_allowed_is_eight_arrays_and_a_float32_query_gradient():
    megabytes = 65536 * 16 * 64 / 2**20
    assert variants_memory.allowed_bytes(FULL.memory) / 2**20 == megabytes * (8 * 2 + 4)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The command as a user runs it, tiny and on this CPU."""
    folder = tmp_path_factory.mktemp("variants")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(variants.Progress, "say", lambda _, text: lines.append(text))
        argv = ["--small", "--out", str(folder / "out"), "--commit", "abc"]
        status = variants.main(argv)
    return SimpleNamespace(status=status, folder=folder / "out", lines=lines)


def read(path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_writes_a_row_for_every_variant_and_a_picture(small_run):
    assert small_run.status == 0
    rows = read(small_run.folder / "variants.csv")
    assert [(row["workload"], row["direction"], row["contender"]) for row in rows] == [
        (cell.workload.name, cell.direction, variant.name)
        for cell in SMALL.cells
        for variant in cell.variants
    ]
    names = sorted(path.name for path in small_run.folder.iterdir())
    assert names == ["variants.csv", "variants.png", "variants_memory.csv"]


def test_a_run_records_where_its_numbers_come_from(small_run):
    for name in ("variants.csv", "variants_memory.csv"):
        row = read(small_run.folder / name)[0]
        assert row["jax"] == jax.__version__
        assert (row["card"], row["commit"]) == ("cpu", "abc")
        assert row["command"] == "python -m benchmarks.variants --small --commit abc"


def test_a_run_compares_with_the_plain_call_of_the_same_round(small_run):
    for row in read(small_run.folder / "variants.csv"):
        assert int(row["rounds"]) == SMALL.plan.rounds
        assert int(row["tiles"]) > 0
        assert float(row["ratio_time_median"]) > 0
        if row["contender"] == PLAIN:
            assert float(row["ratio_tile_median"]) == float(row["ratio_time_median"]) == 1


def test_a_run_without_a_gpu_judges_no_speed(small_run):
    rows = read(small_run.folder / "variants.csv")
    assert {(row["claim_basis"], row["claim_least"], row["met"]) for row in rows} == {("", "", "")}


def test_a_run_says_a_line_for_every_cell(small_run):
    said = "\n".join(small_run.lines)
    for cell in SMALL.cells:
        assert f"{cell.label}: {len(cell.variants)} contenders in " in said
    assert "memory T=256 N=2 H=16: allowed 163,840 bytes, found " in said


def test_the_memory_row_holds_what_the_program_plans(small_run):
    (row,) = read(small_run.folder / "variants_memory.csv")
    argument, output = int(row["argument_bytes"]), int(row["output_bytes"])
    elements = 256 * 2 * 16
    assert argument == 4 * 2 * elements
    assert 4 * 2 * elements <= output < 4 * 2 * elements + 1024  # and a table of them
    assert int(row["planned_bytes"]) == argument + output + int(row["temp_bytes"])
    assert row["peak_bytes"] == ""


def test_a_spent_budget_measures_nothing_and_lists_what_is_left(tmp_path, capsys):
    argv = ["--small", "--out", str(tmp_path), "--time-budget-s", "0"]
    assert variants.main(argv) == 1
    text = capsys.readouterr().out
    assert "not measured: memory: the time budget is spent" in text
    for cell in SMALL.cells:
        assert f"not measured: {cell.label}: the time budget is spent" in text
    assert list(tmp_path.iterdir()) == []


def shortened(monkeypatch, **changes) -> None:
    """One cell without memory: a plain call and a window."""
    small = replace(SMALL, shapes=(), **changes)
    monkeypatch.setattr(variants, "SMALL", small)
    monkeypatch.setattr(variants.Run, "measure_memory", lambda _: None)


def test_a_claim_that_does_not_hold_is_listed_and_the_status_says_so(monkeypatch, tmp_path, capsys):
    shortened(monkeypatch, claims=True)
    assert variants.main(["--small", "--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "NOT met: T=128 B=1 H=16 forward window" in text
    assert "claimed time >= 12: NOT met" in text
    # "xla" runs none of the kernels whose tiles are counted.
    assert "counted 1 kernels, 0 ran: T=128 B=1 H=16 forward plain" in text
    assert [row["met"] for row in read(tmp_path / "variants.csv")][:2] == ["", "False"]


def test_a_variant_that_does_not_compile_leaves_the_others_measured(monkeypatch, tmp_path, capsys):
    class NoWindow(variants.Program):
        def __init__(self, variant, *rest) -> None:
            if variant.window is not None:
                msg = "RESOURCE_EXHAUSTED: too wide\nmore"
                raise RuntimeError(msg)
            super().__init__(variant, *rest)

    shortened(monkeypatch)
    monkeypatch.setattr(variants, "Program", NoWindow)
    assert variants.main(["--small", "--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "not measured: long T=128 H=16 forward window: RESOURCE_EXHAUSTED: too wide\n" in text
    assert {row["contender"] for row in read(tmp_path / "variants.csv")} == {PLAIN}


def test_a_memory_process_that_fails_says_its_last_line():
    with pytest.raises(variants_memory.MemoryProcessError, match="status 1: ValueError: impl"):
        variants_memory.measure(SMALL.memory, "none", 120, "cpu")


def test_a_memory_process_that_hangs_is_ended():
    with pytest.raises(variants_memory.MemoryProcessError, match=r"not done after 0\.05 s"):
        variants_memory.measure(SMALL.memory, "xla", 0.05, "cpu")


def test_memory_that_could_not_be_measured_is_a_problem_not_a_crash(monkeypatch, tmp_path, capsys):
    def failing(*_: object) -> None:
        msg = "ended with status 9: no message"
        raise variants_memory.MemoryProcessError(msg)

    monkeypatch.setattr(variants_memory, "measure", failing)
    monkeypatch.setattr(variants, "SMALL", replace(SMALL, shapes=(SHAPE,)))
    monkeypatch.setattr(variants.Run, "measure_cell", lambda *_: None)
    assert variants.main(["--small", "--out", str(tmp_path)]) == 1
    assert "not measured: memory: ended with status 9" in capsys.readouterr().out


def test_only_cells_with_a_text_in_their_label_are_measured(monkeypatch, tmp_path):
    measured: list[str] = []
    monkeypatch.setattr(variants.Run, "measure_memory", lambda _: measured.append("memory"))
    monkeypatch.setattr(variants.Run, "measure_cell", lambda _, cell: measured.append(cell.label))
    run = ["--small", "--out", str(tmp_path), "--only"]
    for text, share in (("backward", slice(1, None, 2)), ("long", slice(-2, None))):
        measured.clear()
        assert variants.main([*run, text]) == 0
        assert measured == [cell.label for cell in SMALL.cells[share]]
    measured.clear()
    assert variants.main([*run, "memory"]) == 0
    assert measured == ["memory"]


def test_a_label_that_no_cell_has_ends_with_status_2_and_those_there_are(tmp_path, capsys):
    assert variants.main(["--small", "--out", str(tmp_path), "--only", "sideways"]) == 2
    text = capsys.readouterr().err
    assert "--only must be part of one of" in text
    assert "got 'sideways'" in text
    assert SMALL.cells[0].label in text


def test_a_run_on_a_host_without_a_gpu_is_refused_with_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with pytest.raises(SystemExit, match="jax must see an NVIDIA GPU, got cpu; or use --small"):
        variants.main(["--out", str(tmp_path)])


def test_a_plain_call_that_another_kernel_would_serve_is_refused(monkeypatch):
    portable, hopper = FULL.cells[0], FULL.cells[-1]
    with compile_for(90):
        monkeypatch.setenv(hopper_choice.VARIABLE, "")
        variants.check_kernels(portable)
        with pytest.raises(SystemExit, match="on the hopper kernels, got a portable kernel"):
            variants.check_kernels(hopper)
        monkeypatch.setenv(hopper_choice.VARIABLE, "forward,backward")
        variants.check_kernels(hopper)
        with pytest.raises(SystemExit, match="on the portable kernels, got a Hopper kernel"):
            variants.check_kernels(portable)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "x", "--time-budget-s", "-1"], "--time-budget-s must not be negative, got -1"),
        (["--out", "x", "--time-budget-s", "nan"], "--time-budget-s must not be negative, got nan"),
        (["--out", "x", "--time-budget-s", "soon"], "invalid float value: 'soon'"),
        (["--out", "x", "--tiny"], "unrecognized arguments: --tiny"),
        (["--out", __file__], "--out must be a folder, got the file test_variants.py"),
    ],
    ids=["no-out", "negative", "nan", "no-number", "unknown", "out-is-a-file"],
)
def test_a_wrong_option_ends_with_status_2_and_its_reason(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        variants.parse(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_bias_and_a_mask_are_as_large_as_the_claims_say():
    shape = FULL.shapes[0]
    tiny = replace(shape, length=64)
    by_name = {v.name: v for v in variants_of("backward", 512)}
    made = jax.eval_shape(lambda: extras(list(by_name.values()), tiny))
    assert made["bias NTS"].shape == (1, 32, 64, 64)
    assert made["bias NS"].shape == (1, 32, 1, 64)
    assert made["mask BTS"].shape == (4, 1, 64, 64)
    assert made["bias NTS"].dtype == jnp.bfloat16
    assert made["mask BTS"].dtype == jnp.bool_
