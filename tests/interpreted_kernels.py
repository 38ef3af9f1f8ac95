"""Runs the @triton.jit kernels in Triton's interpreter, in a process of its own.

    TRITON_INTERPRET=1 python tests/interpreted_kernels.py < cases.json > failures.json

Triton reads the variable when a kernel is defined, so the tests start this file. A small
wrapper gives NumPy arrays the methods that the interpreter asks of torch tensors.
"""

import json
import math
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton

from sigjax import numerics, reference
from sigjax.kernels.backward import (
    bias_gradient_kernel,
    key_value_gradient_kernel,
    query_gradient_kernel,
)
from sigjax.kernels.forward import forward_kernel
from sigjax.kernels.segments import segment_ranges
from sigjax.kernels.tile_math import PLAIN
from sigjax.kernels.tiles import Tile, head_block
from sigjax.numerics import Case
from sigjax.operands import Operands, Settings

# Small tiles: every case has full tiles, an edge tile and, beyond the lengths, empty ones.
TILE = Tile(block_q=32, block_k=32, num_warps=1, num_stages=1)

# How Triton names the dtypes of arrays.
DTYPES = {"float32": "fp32", "float16": "fp16", "int32": "i32", "uint8": "u8"}


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


def run(case: Case, inputs: numerics.Named) -> numerics.Named:
    """Output and gradients by argument name, from the three kernels."""
    return run_arrays(inputs, right=0 if case.is_causal else None)


def run_arrays(
    inputs: numerics.Named, left: int | None = None, right: int | None = None
) -> numerics.Named:
    """Output and gradients by argument name: of query, key, value and every bias given.

    inputs has the op's arguments by name and the output's cotangent; query i sees key j only
    where i - left <= j <= i + right.
    """
    query, key = inputs["query"], inputs["key"]
    batch, length, heads, head_size = query.shape
    keys, kv_heads = key.shape[1:3]
    logits = (batch, heads, length, keys)
    sigmoid_bias = inputs.get("sigmoid_bias")
    if sigmoid_bias is not None:
        sigmoid_bias = np.broadcast_to(sigmoid_bias, (batch, heads))
    bias, mask = inputs.get("bias"), inputs.get("mask")
    queries_in, keys_in = inputs.get("query_segment_ids"), inputs.get("key_value_segment_ids")
    row_bias = ranges = key_ranges = None
    if queries_in is not None and keys_in is not None:
        if sigmoid_bias is None:
            sigmoid_bias = np.zeros((batch, heads), np.float32)
            row_bias = segment_bias(inputs)
        blocks = TILE.block_q, TILE.block_k
        rows, columns = jnp.asarray(queries_in), jnp.asarray(keys_in)
        ranges = np.asarray(segment_ranges(rows, columns, *blocks))
        key_ranges = np.asarray(segment_ranges(columns, rows, *blocks[::-1]))
    per_sequence = [
        inputs.get("query_seq_lengths"),
        inputs.get("key_value_seq_lengths"),
        sigmoid_bias,
        inputs.get("key_bias"),
    ]
    bytes_of_mask = None if mask is None else mask.view(np.uint8)
    per_pair = [bias, bytes_of_mask, queries_in, keys_in, row_bias]
    sizes = [length, keys, head_size**-0.5]
    operands = [query, key, inputs["value"]]
    options = {
        "N": heads, "K": kv_heads, "H": head_size, "BLOCK_H": head_block(head_size),
        "BLOCK_Q": TILE.block_q, "BLOCK_K": TILE.block_k, "STAGES": 1, "SIGMOID": PLAIN.value,
        "LEFT": left, "RIGHT": right, "BIAS_AXES": axes(bias, logits),
        "MASK_AXES": axes(mask, logits),
    }  # fmt: skip
    query_grid = (triton.cdiv(length, TILE.block_q) * heads * batch,)
    key_grid = (triton.cdiv(keys, TILE.block_k) * kv_heads * batch,)
    # Unwritten elements must show.
    output, query_gradient = (np.full_like(query, np.nan) for _ in range(2))
    key_gradient, value_gradient = (np.full_like(key, np.nan) for _ in range(2))
    sums = np.full((batch, heads, keys), np.nan, np.float32)
    range_scale = None
    if query.dtype == np.float16:
        range_scale = np.full((batch, kv_heads), 64.0, np.float32)
    inputs_forward = [*operands, *per_sequence, *per_pair, ranges, *sizes, output]
    launch(forward_kernel, query_grid, inputs_forward, options)
    operands = [*operands, inputs["cotangent"]]
    inputs_backward = [*operands, *per_sequence, *per_pair, ranges, range_scale, *sizes]
    launch(query_gradient_kernel, query_grid, [*inputs_backward, query_gradient], options)
    with_sums = "sigmoid_bias" in inputs or "key_bias" in inputs
    inputs_backward = [*operands, *per_sequence, *per_pair, key_ranges, range_scale, *sizes]
    outputs = [key_gradient, value_gradient, sums if with_sums else None]
    launch(key_value_gradient_kernel, key_grid, [*inputs_backward, *outputs], options)
    result = {
        "output": output,
        "query": query_gradient,
        "key": key_gradient,
        "value": value_gradient,
    }
    if bias is not None:
        result["bias"] = np.full_like(bias, np.nan)
        blocks = (1, 1, TILE.block_q, TILE.block_k)
        grid = (math.prod(map(triton.cdiv, bias.shape, blocks)),)
        inputs_bias = [*operands, *per_sequence, *per_pair, ranges, batch, *sizes]
        launch(bias_gradient_kernel, grid, [*inputs_bias, result["bias"]], options)
    if "sigmoid_bias" in inputs:
        result["sigmoid_bias"] = sums.sum((0, 2))
    if "key_bias" in inputs:
        result["key_bias"] = sums.sum(1)
    return result


def segment_bias(inputs: numerics.Named) -> np.ndarray:
    """The default bias of each query, [B, T]: of its own segment."""
    lengths = inputs.get("key_value_seq_lengths")
    operands = Operands(
        *(jnp.asarray(inputs[name]) for name in ("query", "key", "value")),
        key_lengths=None if lengths is None else jnp.asarray(lengths),
        query_segments=jnp.asarray(inputs["query_segment_ids"]),
        key_segments=jnp.asarray(inputs["key_value_segment_ids"]),
    )
    counts = np.asarray(reference.key_counts(operands))
    return -np.log(np.maximum(counts, 1)).astype(np.float32)


def axes(x: np.ndarray | None, shape: tuple[int, ...]) -> tuple[bool, ...] | None:
    """Which axes of [B, N, T, S] an array has."""
    return None if x is None else tuple(a == b for a, b in zip(x.shape, shape, strict=True))


def launch(kernel: triton.JITFunction, grid: tuple[int], arguments: list, options: dict) -> None:
    """Calls one kernel; it writes into the arrays given."""
    arrays = [np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x for x in arguments]
    kernel[grid](*[Tensor(x) if isinstance(x, np.ndarray) else x for x in arrays], **options)


def main() -> None:
    failures = {}
    for fields in json.load(sys.stdin):
        if "label" in fields:
            given: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            label, wrong = given["label"], pair_violations(PairCase(**given))
        else:
            fields["lengths"] = fields["lengths"] and tuple(map(tuple, fields["lengths"]))
            case = Case(**fields)
            inputs = numerics.make_inputs(case)
            got, exact = run(case, inputs), numerics.exact(case, inputs)
            label = case.label
            wrong = numerics.violations(got, exact, numerics.run_plain(case, inputs))
        failures[label] = wrong
        print(label, *wrong, file=sys.stderr)
    json.dump(failures, sys.stdout)


@dataclass(frozen=True)
class PairCase:
    """A call with arguments that concern single pairs.

    Attributes:
        label: test id.
        length: T.
        key_length: S.
        bias: shape of the bias, broadcastable to [B, N, T, S]; B is 2, N is 4, K is 2.
        mask: shape of the mask, likewise.
        window: (left, right).
        segments: lengths of the packed sequences of each row; the rest is padding.
        key_segments: those of the keys; None is segments.
        lengths: whether query and key lengths are given.
        biases: whether sigmoid_bias and key_bias are given.
        is_causal: as in the op.
    """

    label: str
    length: int = 70
    key_length: int = 90
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    window: tuple[int | None, int | None] = (None, None)
    segments: tuple[int, ...] | None = None
    key_segments: tuple[int, ...] | None = None
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
            rows = packed(self.segments, self.length)
            columns = packed(self.key_segments or self.segments, self.key_length)
            # The second sequence is packed in another order.
            inputs["query_segment_ids"] = np.stack([rows, rows[::-1]])
            inputs["key_value_segment_ids"] = np.stack([columns, columns[::-1]])
            for name, ids in (("query", rows), ("key", columns), ("value", columns)):
                inputs[name][0, ids <= 0] = np.nan  # padding must not reach anything
        return inputs


def packed(lengths: tuple[int, ...], total: int) -> np.ndarray:
    """Segment ids 1, 2, ... of sequences in one row, 0 for the rest."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(ids, (0, total - len(ids))).astype(np.int32)


def pair_violations(case: PairCase) -> list[str]:
    """What the kernels get wrong, by the tolerance rule; the oracle is the reference in float64."""
    inputs = case.inputs()
    left, right = case.window
    right = 0 if case.is_causal else right
    got = run_arrays(inputs, left, right)
    settings = Settings(scale=0.25, is_causal=case.is_causal, window=bounded(case))
    plain = reference_results(inputs, settings, np.float32)
    with jax.enable_x64(True):
        exact = reference_results(inputs, settings, np.float64)
    return numerics.violations(got, exact, plain)


def bounded(case: PairCase) -> tuple[int, int] | None:
    """The window as the reference takes it; no bound is a wide one."""
    if case.window == (None, None):
        return None
    left, right = (10**6 if x is None else x for x in case.window)
    return left, right


def reference_results(
    inputs: numerics.Named, settings: Settings, dtype: type[np.floating]
) -> numerics.Named:
    """Output and gradients of the plain definition in one dtype."""
    differentiable = ("query", "key", "value", "bias", "sigmoid_bias", "key_bias")
    arrays = {
        name: jnp.asarray(inputs[name].astype(dtype)) for name in differentiable if name in inputs
    }
    fixed = {
        "mask": inputs.get("mask"),
        "query_lengths": inputs.get("query_seq_lengths"),
        "key_lengths": inputs.get("key_value_seq_lengths"),
        "query_segments": inputs.get("query_segment_ids"),
        "key_segments": inputs.get("key_value_segment_ids"),
    }
    fixed = {name: None if x is None else jnp.asarray(x) for name, x in fixed.items()}

    def op(arrays: dict[str, jax.Array]) -> jax.Array:
        sigmoid_bias = arrays.get("sigmoid_bias")
        if sigmoid_bias is not None:
            batch, _, heads, _ = arrays["query"].shape
            sigmoid_bias = jnp.broadcast_to(sigmoid_bias, (batch, heads))
        given: Any = {**arrays, "sigmoid_bias": sigmoid_bias, **fixed}
        return reference.attention(Operands(**given), settings)

    output, pullback = jax.vjp(op, arrays)
    gradients = pullback(jnp.asarray(inputs["cotangent"].astype(dtype)))[0]
    return {name: np.asarray(x) for name, x in {"output": output, **gradients}.items()}


if __name__ == "__main__":
    main()
