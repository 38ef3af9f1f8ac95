"""Runs the kernels and their host side in Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined: tests call this in the process of the
fixture interpreter. A small wrapper gives NumPy arrays the methods that Triton's interpreter asks
of torch tensors.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sigjax import numerics, reference
from sigjax.checks import check
from sigjax.choice import compile_for
from sigjax.kernels import launch
from sigjax.kernels.segments import tile_ranges
from sigjax.kernels.tile_math import PLAIN
from sigjax.kernels.tiles import Kernel, Tile
from sigjax.numerics import Case
from sigjax.operands import Operands, Settings

# Small tiles: every case has full tiles, an edge tile and, beyond the lengths, empty ones.
TILE = Tile(block_q=32, block_k=32, num_warps=1, num_stages=1)

# What the interpreter has no use for.
COMPILER_OPTIONS = ("num_warps", "num_stages", "compute_capability", "backend_options")

# The op's arguments, None where they have no default.
ARGUMENTS = {
    name: None if parameter.default is parameter.empty else parameter.default
    for name, parameter in inspect.signature(check).parameters.items()
}

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
    launch.call, launch.tile_of = interpreted_call, small_tile
    with compile_for(90):
        output = launch.portable_forward(operands, settings)
        gradients = launch.portable_backward(operands, settings, jnp.asarray(inputs["cotangent"]))
    results = {"output": output, **gradients._asdict()}
    named = {name: np.asarray(x) for name, x in results.items() if x is not None}
    if "sigmoid_bias" in named:  # given as [N]
        named["sigmoid_bias"] = named["sigmoid_bias"].sum(0)
    return named


def small_tile(kernel: Kernel, operands: Operands) -> Tile:
    """launch.tile_of: one tile for all."""
    del kernel, operands
    return TILE


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
    given: dict[str, Any] = ARGUMENTS | {"is_causal": False} | options
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
        bias: shape of the bias, broadcastable to [B, N, T, S]; B is 2, N is 4, K is 2.
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
        base = Case("float32", 16, self.length, self.key_length, 2, biases=self.biases)
        inputs, rng = numerics.make_inputs(base), np.random.default_rng(1)
        if self.bias is not None:
            inputs["bias"] = rng.standard_normal(self.bias).astype(np.float32)
        if self.mask is not None:
            inputs["mask"] = rng.random(self.mask) < 0.6
        if self.lengths:
            inputs["query_seq_lengths"] = np.array([self.length - 5, 33], np.int32)
            inputs["key_value_seq_lengths"] = np.array([64, self.key_length - 1], np.int32)
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
        name: jnp.asarray(x.astype(dtype))
        for name, x in inputs.items()
        if np.issubdtype(x.dtype, np.floating)
    }
    cotangent = arrays.pop("cotangent")
    fixed = {name: x for name, x in inputs.items() if name not in (*arrays, "cotangent")}

    def op(arrays: dict[str, Any]) -> jax.Array:
        return reference.attention(*checked(arrays | fixed, **options))

    output, pullback = jax.vjp(op, arrays)
    results = {"output": output, **pullback(cotangent)[0]}
    return {name: np.asarray(x) for name, x in results.items()}


def check_masked_nan(mask_shape: list[int]) -> None:
    """Raises AssertionError where a mask lets a NaN through, or takes away one that counts."""
    inputs = numerics.make_inputs(Case("float32", 16, 70, 90, 2))
    mask = np.random.default_rng(1).random(tuple(mask_shape)) < 0.6
    mask[..., 7], mask[..., 8] = False, True
    inputs["mask"] = mask
    inputs["key"][:, 7] = np.nan  # no query sees it
    inputs["query"][:, 3] = np.nan
    output = run(inputs)["output"]
    assert np.isnan(output[:, 3]).all()
    assert np.isfinite(np.delete(output, 3, axis=1)).all()
