"""Runs the kernels and their host side in Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined: tests call this in the process of the
fixture interpreter. A small wrapper gives NumPy arrays the methods that Triton's interpreter asks
of torch tensors.
"""

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from sigjax import numerics, reference
from sigjax.checks import check
from sigjax.choice import compile_for
from sigjax.kernels import features, launch
from sigjax.kernels.hopper_pairs import keys_of_rows, keys_of_tile
from sigjax.kernels.segments import tile_ranges
from sigjax.kernels.tile_math import PLAIN, length_at
from sigjax.kernels.tiles import Kernel, Tile
from sigjax.numerics import Case
from sigjax.operands import Operands, Settings
from tests import definition

# Small tiles: every case has full tiles, an edge tile and, beyond the lengths, empty ones.
TILE = Tile(block_q=32, block_k=32, num_warps=1, num_stages=1)

# What the interpreter has no use for.
COMPILER_OPTIONS = ("num_warps", "num_stages", "compute_capability", "backend_options")

# How Triton names the dtypes of arrays.
DTYPES = {"float32": "fp32", "float16": "fp16", "int32": "i32"}


class Tensor:
    """A NumPy array, and its own storage, with the part of torch that the interpreter uses.

    The memory is on the host already: moving it there and back does nothing.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = DTYPES[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Tensor":
        return self

    def cpu(self) -> "Tensor":
        return self

    def new_empty(self, *_: object, **__: object) -> "Tensor":
        return Tensor(self.array)

    def set_(self, *_: object) -> None:
        """The storage is the array of new_empty already."""

    def copy_(self, _: "Tensor") -> None:
        """What the kernel wrote is in place."""

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)


def run(inputs: numerics.Named, **options: Any) -> numerics.Named:
    """Output and gradients by argument name: of query, key, value and every bias given.

    inputs has the op's arguments by name and the output's cotangent; options are the op's other
    arguments.
    """
    operands, settings = checked(inputs, **options)
    output = run_forward(operands, settings)
    with compile_for(90):
        gradients = launch.portable_backward(operands, settings, jnp.asarray(inputs["cotangent"]))
    results = {"output": output, **gradients._asdict()}
    named = {name: np.asarray(x) for name, x in results.items() if x is not None}
    if "sigmoid_bias" in named:  # given as [N]
        named["sigmoid_bias"] = named["sigmoid_bias"].sum(0)
    return named


def run_forward(operands: Operands, settings: Settings) -> jax.Array:
    """The output alone."""
    launch.call, launch.tile_of = interpreted_call, small_tile
    with compile_for(90):
        return launch.portable_forward(operands, settings)


def small_tile(kernel: Kernel, operands: Operands) -> Tile:
    """launch.tile_of: one tile for all."""
    del kernel, operands
    return TILE


@cache
def replace_language() -> None:
    """What a kernel asks of Triton's language is the interpreter's from here on.

    It is where kernels are launched; the interpreter would look through all of the language
    at every call of a device function, which took most of the time.
    """
    modules: Any = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(modules)
    kept: Any = interpreter._LangPatchScope()  # restores nothing
    interpreter._patch_lang = lambda fn: kept


def interpreted_call(
    kernel: Any,
    inputs: tuple[Any, ...],
    out_type: Any,
    grid: tuple[int],
    options: dict[str, Any],
    aliases: dict[int, int] | None = None,
) -> Any:
    """launch.call, with Triton's interpreter in the place of jax_triton."""
    assert aliases is None, "no portable kernel writes to its operands"
    replace_language()
    several = isinstance(out_type, list)
    # Unwritten elements must show.
    outputs = [
        np.full(out.shape, np.nan, out.dtype) for out in (out_type if several else [out_type])
    ]
    arrays = [np.ascontiguousarray(x) if isinstance(x, jax.Array) else x for x in inputs]
    arguments = [Tensor(x) if isinstance(x, np.ndarray) else x for x in (*arrays, *outputs)]
    constants = {name: x for name, x in options.items() if name not in COMPILER_OPTIONS}
    # PAIR is inline PTX.
    kernel[grid](*arguments, **(constants | {"ARITHMETIC": PLAIN.value}))
    return [jnp.asarray(x) for x in outputs] if several else jnp.asarray(outputs[0])


def checked(inputs: numerics.Named, **options: Any) -> tuple[Operands, Settings]:
    """The op's arguments as its checks hand them on."""
    given: dict[str, Any] = definition.ARGUMENTS | options
    given |= {name: x for name, x in inputs.items() if name != "cotangent"}
    return check(**given)


def check_case(fields: dict[str, Any]) -> None:
    """Raises AssertionError with what a Case of the numeric grid breaks of the tolerance rule."""
    lengths = fields["lengths"]
    case = Case(**fields | {"lengths": lengths and tuple(map(tuple, lengths))})
    inputs = numerics.make_inputs(case)
    got = run(inputs, is_causal=case.is_causal)
    assert_none(
        numerics.violations(got, numerics.exact(case, inputs), numerics.run_plain(case, inputs))
    )


def check_pairs(fields: dict[str, Any]) -> None:
    """Raises AssertionError with what a PairCase breaks; the oracle is the float64 reference."""
    given: Any = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    case = PairCase(**given)
    inputs = case.inputs()
    options = {"is_causal": case.is_causal, "local_window_size": case.window}
    got, plain = run(inputs, **options), reference_results(inputs, np.float32, **options)
    with jax.enable_x64(True):
        exact = reference_results(inputs, np.float64, **options)
    assert_none(numerics.violations(got, exact, plain))


def check_segments() -> None:
    """Raises AssertionError where the kernel of segments differs from what it should compute."""
    rng = np.random.default_rng(2)
    rows, columns = 70, 1300  # more than a chunk
    ordered = packed((500, 3, 700, 40), columns)
    cases = {
        "packed": (packed((30, 1, 34), rows), ordered),
        "falling": (packed((30, 40), rows)[::-1], ordered[::-1]),
        "any order": (rng.integers(-1, 5, rows), rng.integers(-1, 5, columns)),
        "no match": (np.full(rows, 7), ordered),
    }
    queries, keys = (
        jnp.asarray(np.stack(ids), jnp.int32) for ids in zip(*cases.values(), strict=True)
    )
    query, key = (jnp.zeros((len(cases), length, 1, 16)) for length in (rows, columns))
    launch.call = interpreted_call
    for lengths in (None, jnp.array([70, 33, 0, 5])):
        own = None if lengths is None else jnp.minimum(lengths, rows)
        other = None if lengths is None else lengths * 18
        operands = Operands(
            query, key, key, query_lengths=own, key_lengths=other, query_segments=queries,
            key_segments=keys,
        )  # fmt: skip
        with compile_for(90):
            packing = launch.packing_of(operands, TILE)
            of_keys = launch.query_ranges(operands, TILE)
        expected = tile_ranges(queries, keys, TILE.block_q, own, other)
        np.testing.assert_array_equal(packing.ranges, expected)
        expected = tile_ranges(keys, queries, TILE.block_k, other, own)
        np.testing.assert_array_equal(of_keys, expected)
        counts = np.maximum(reference.key_counts(operands), 1)
        # Rows that take no part may have any bias.
        inside = np.asarray(reference.valid_queries(operands))
        np.testing.assert_allclose(
            np.asarray(packing.row_bias)[inside], -np.log(counts)[inside], rtol=1e-6
        )


# Of check_spans: three consumers, as at head size 64, of small tiles.
SPAN_BLOCK, SPAN_CONSUMERS = 16, 3


@triton.jit
def spans_kernel(
    ranges_ptr,
    query_lengths_ptr,
    key_lengths_ptr,
    T,
    S,
    own_ptr,  # [B, tiles, CONSUMERS, 4]: keys_of_rows
    tile_ptr,  # [B, tiles, 2]: keys_of_tile
    BLOCK: tl.constexpr,
    CONSUMERS: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
):
    """One program: what a tile of the Hopper forward kernel and its consumers visit."""
    tiles = tl.cdiv(T, CONSUMERS * BLOCK)
    batch = tl.program_id(0) // tiles
    start = tl.program_id(0) % tiles * (CONSUMERS * BLOCK)
    query_length = length_at(query_lengths_ptr, batch, T)
    key_length = length_at(key_lengths_ptr, batch, S)
    begin, end = keys_of_tile(
        start, query_length, key_length, ranges_ptr, batch, T, BLOCK, BLOCK, CONSUMERS, LEFT, RIGHT
    )
    tl.store(tile_ptr + tl.program_id(0) * 2, begin)
    tl.store(tile_ptr + tl.program_id(0) * 2 + 1, end)
    for i in tl.static_range(CONSUMERS):
        begin, inner, inner_end, end = keys_of_rows(
            start + i * BLOCK, query_length, key_length, ranges_ptr, batch, T, BLOCK, BLOCK, LEFT,
            RIGHT,
        )  # fmt: skip
        ptr = own_ptr + (tl.program_id(0) * CONSUMERS + i) * 4
        tl.store(ptr, begin)
        tl.store(ptr + 1, inner)
        tl.store(ptr + 2, inner_end)
        tl.store(ptr + 3, end)


def check_spans(fields: dict[str, Any]) -> None:
    """Raises AssertionError where a tile of the Hopper forward kernel visits what it should not.

    fields: query_segments and key_segments, lists of ids, or lengths of both sides alone;
    query_length and key_length, or None; window, or None; is_causal.
    """
    segments = [fields["query_segments"], fields["key_segments"]]
    sizes = [x if isinstance(x, int) else len(x) for x in segments]
    lengths = [fields["query_length"], fields["key_length"]]
    packed_rows = not isinstance(segments[0], int)
    query, key = (jnp.zeros((1, size, 1, 16)) for size in sizes)
    operands = Operands(query, key, key)
    if packed_rows:
        ids = [jnp.array([x], jnp.int32) for x in segments]
        operands = operands._replace(query_segments=ids[0], key_segments=ids[1])
    if lengths[0] is not None:
        own = [jnp.array([x], jnp.int32) for x in lengths]
        operands = operands._replace(query_lengths=own[0], key_lengths=own[1])
    window = fields["window"] and tuple(fields["window"])
    settings = Settings(scale=1.0, is_causal=fields["is_causal"], window=window)
    launch.call = interpreted_call
    tile = Tile(SPAN_BLOCK, SPAN_BLOCK, num_warps=1, num_stages=1)
    with compile_for(90):
        ranges = launch.packing_of(operands, tile).ranges
    left, right = features.window_of(settings)
    tiles = -(-sizes[0] // (SPAN_BLOCK * SPAN_CONSUMERS))
    spans, hulls = interpreted_call(
        spans_kernel,
        (ranges, operands.query_lengths, operands.key_lengths, *sizes),
        [
            jax.ShapeDtypeStruct((tiles * SPAN_CONSUMERS, 4), jnp.int32),
            jax.ShapeDtypeStruct((tiles, 2), jnp.int32),
        ],
        (tiles,),
        {"BLOCK": SPAN_BLOCK, "CONSUMERS": SPAN_CONSUMERS, "LEFT": left, "RIGHT": right},
    )
    pairs = np.asarray(reference.pairs(operands, settings))[0, 0]
    pairs = np.broadcast_to(pairs, (sizes[0], sizes[1]))
    limits = [full if x is None else x for x, full in zip(lengths, sizes, strict=True)]
    of_segments = None if ranges is None else np.asarray(ranges)[0]
    for index, span in enumerate(np.asarray(spans).tolist()):
        start = index * SPAN_BLOCK
        expected = visited_blocks(start, limits, (left, right), of_segments)
        assert_span(span, start, pairs, limits, expected)
    for own, hull in zip(
        np.asarray(spans).reshape(tiles, -1, 4), np.asarray(hulls).tolist(), strict=True
    ):
        computing = own[own[:, 3] > 0]
        if len(computing):
            assert hull == [computing[:, 0].min(), computing[:, 3].max()]
        else:
            assert hull[1] == 0


def visited_blocks(
    start: int,
    limits: list[int],
    window: tuple[int | None, int | None],
    ranges: np.ndarray | None,
) -> set[int]:
    """The key blocks that the window of rows from start on meets, and the rows' range."""
    if start >= limits[0]:
        return set()
    width = -(-limits[1] // SPAN_BLOCK) * SPAN_BLOCK
    rows, keys = np.arange(start, start + SPAN_BLOCK)[:, None], np.arange(width)[None, :]
    seen = np.ones((SPAN_BLOCK, width), bool)
    left, right = window
    if left is not None:
        seen &= keys >= rows - left
    if right is not None:
        seen &= keys <= rows + right
    blocks = {int(key) // SPAN_BLOCK for key in np.flatnonzero(seen.any(0))}
    if ranges is not None:
        begin, end, _ = ranges[start // SPAN_BLOCK].tolist()
        blocks &= {key // SPAN_BLOCK for key in range(begin, end)}
    return blocks


def assert_span(
    span: list[int], start: int, pairs: np.ndarray, limits: list[int], expected: set[int]
) -> None:
    """The visited blocks are those expected, no pair is lost, and none is excluded unseen."""
    begin, inner, inner_end, end = span
    assert begin % SPAN_BLOCK == 0
    assert {first // SPAN_BLOCK for first in range(begin, end, SPAN_BLOCK)} == expected
    rows = pairs[start : min(start + SPAN_BLOCK, limits[0])]
    needed = np.flatnonzero(rows.any(0))
    assert {int(key) // SPAN_BLOCK for key in needed} <= expected
    for first in range(begin, end, SPAN_BLOCK):
        if inner <= first < inner_end:
            block = rows[:, first : first + SPAN_BLOCK]
            assert block.shape[1] == SPAN_BLOCK
            assert block.all()


def assert_none(lines: list[str]) -> None:
    """Raises AssertionError with the lines, if there are any."""
    if lines:
        raise AssertionError("; ".join(lines))


@dataclass(frozen=True)
class PairCase:
    """A call with arguments that concern single pairs.

    Attributes:
        length: T.
        key_length: S.
        groups: query heads a key head serves; K is 2, B too.
        bias: shape of the bias, broadcastable to [B, N, T, S].
        mask: shape of the mask, likewise.
        window: (left, right).
        segments: lengths of the packed sequences of each row; the rest is padding.
        key_segments: those of the keys; None is segments.
        gap: rows of padding before each packed sequence.
        turned_keys: whether the keys of the last sequence come first.
        lengths: whether query and key lengths are given.
        biases: whether sigmoid_bias and key_bias are given.
        is_causal: as in the op.
    """

    length: int = 70
    key_length: int = 90
    groups: int = 2
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    window: tuple[int, int] | None = None
    segments: tuple[int, ...] | None = None
    key_segments: tuple[int, ...] | None = None
    gap: int = 0
    turned_keys: bool = False
    lengths: bool = False
    biases: bool = False
    is_causal: bool = False

    def inputs(self) -> numerics.Named:
        """The op's arguments by name, and the output's cotangent."""
        base = Case("float32", 16, self.length, self.key_length, self.groups, biases=self.biases)
        inputs, rng = numerics.make_inputs(base), np.random.default_rng(1)
        if self.bias is not None:
            inputs["bias"] = rng.standard_normal(self.bias).astype(np.float32)
        if self.mask is not None:
            inputs["mask"] = rng.random(self.mask) < 0.6
        if self.lengths:
            inputs["query_seq_lengths"] = np.array([self.length - 5, 33], np.int32)
            inputs["key_value_seq_lengths"] = np.array(
                [self.key_length // TILE.block_k * TILE.block_k, self.key_length - 1], np.int32
            )
        if self.segments is not None:
            rows = packed(self.segments, self.length, self.gap)
            columns = packed(self.key_segments or self.segments, self.key_length, self.gap)
            if self.turned_keys:
                columns = np.where(columns > 0, len(self.segments) + 1 - columns, 0)
                columns = columns.astype(np.int32)
            # The second sequence is packed in another order.
            inputs["query_segment_ids"] = np.stack([rows, rows[::-1]])
            inputs["key_value_segment_ids"] = np.stack([columns, columns[::-1]])
            for name, ids in (("query", rows), ("key", columns), ("value", columns)):
                inputs[name][0, ids <= 0] = np.nan  # padding must not reach anything
        return inputs


def packed(lengths: tuple[int, ...], total: int, gap: int = 0) -> np.ndarray:
    """Segment ids 1, 2, ... of sequences in one row, 0 for the rest and a gap before each."""
    parts = [(0, gap, index, length) for index, length in enumerate(lengths, 1)]
    ids = np.concatenate([np.repeat(part[::2], part[1::2]) for part in parts])
    return np.pad(ids, (0, total - len(ids))).astype(np.int32)


def reference_results(
    inputs: numerics.Named, dtype: type[np.floating], **options: Any
) -> numerics.Named:
    """Output and gradients of the plain definition in one dtype."""
    arrays = {
        name: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x
        for name, x in inputs.items()
    }
    return definition.results(arrays, **options)


def check_masked_nan(mask_shape: list[int]) -> None:
    """Raises AssertionError where a mask lets a NaN through, or takes away one that counts."""
    inputs = numerics.make_inputs(Case("float32", 16, 70, 90, 2))
    mask = np.random.default_rng(1).random(tuple(mask_shape)) < 0.6
    mask[..., 7], mask[..., 8] = False, True
    inputs["mask"] = mask
    inputs["key"][:, 7] = np.nan  # no query sees it
    inputs["query"][:, 3] = np.nan
    output = np.asarray(run_forward(*checked(inputs)))
    assert np.isnan(output[:, 3]).all()
    assert np.isfinite(np.delete(output, 3, axis=1)).all()
