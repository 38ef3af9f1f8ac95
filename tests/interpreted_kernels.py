"""Runs the @triton.jit kernels in Triton's interpreter, in a process of its own.

    TRITON_INTERPRET=1 python tests/interpreted_kernels.py < cases.json > failures.json

Triton reads the variable when a kernel is defined, so the tests start this file. A small
wrapper gives NumPy arrays the methods that the interpreter asks of torch tensors.
"""

import json
import sys

import numpy as np
import triton

from sigjax import numerics
from sigjax.kernels.backward import key_value_gradient_kernel, query_gradient_kernel
from sigjax.kernels.forward import forward_kernel
from sigjax.kernels.tile_math import PLAIN
from sigjax.kernels.tiles import Tile, head_block
from sigjax.numerics import Case

# Small tiles: every case has full tiles, an edge tile and, beyond the lengths, empty ones.
TILE = Tile(block_q=32, block_k=32, num_warps=1, num_stages=1)


class Tensor:
    """A NumPy array, and its own storage, with the part of torch that the interpreter uses.

    The memory is on the host already: moving it there and back does nothing.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = {"float32": "fp32", "float16": "fp16", "int32": "i32"}[array.dtype.name]

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
    query, key = inputs["query"], inputs["key"]
    batch, length, heads, head_size = query.shape
    keys, kv_heads = key.shape[1:3]
    sigmoid_bias = inputs.get("sigmoid_bias")
    if sigmoid_bias is not None:
        sigmoid_bias = np.broadcast_to(sigmoid_bias, (batch, heads))
    shared = [
        inputs.get("query_seq_lengths"),
        inputs.get("key_value_seq_lengths"),
        sigmoid_bias,
        inputs.get("key_bias"),
    ]
    sizes = [length, keys, head_size**-0.5]
    operands = [query, key, inputs["value"]]
    options = {
        "N": heads, "K": kv_heads, "H": head_size, "BLOCK_H": head_block(head_size),
        "BLOCK_Q": TILE.block_q, "BLOCK_K": TILE.block_k, "STAGES": 1,
        "IS_CAUSAL": case.is_causal, "SIGMOID": PLAIN.value,
    }  # fmt: skip
    query_grid = (triton.cdiv(length, TILE.block_q) * heads * batch,)
    key_grid = (triton.cdiv(keys, TILE.block_k) * kv_heads * batch,)
    # Unwritten elements must show.
    output, query_gradient = (np.full_like(query, np.nan) for _ in range(2))
    key_gradient, value_gradient = (np.full_like(key, np.nan) for _ in range(2))
    sums = np.full((batch, heads, keys), np.nan, np.float32)
    range_scale = np.full((batch, kv_heads), 64.0, np.float32) if case.dtype == "float16" else None
    launch(forward_kernel, query_grid, [*operands, *shared, *sizes, output], options)
    inputs_of_backward = [*operands, inputs["cotangent"], *shared, range_scale, *sizes]
    launch(query_gradient_kernel, query_grid, [*inputs_of_backward, query_gradient], options)
    launch(
        key_value_gradient_kernel,
        key_grid,
        [*inputs_of_backward, key_gradient, value_gradient, sums if case.biases else None],
        options,
    )
    result = {
        "output": output,
        "query": query_gradient,
        "key": key_gradient,
        "value": value_gradient,
    }
    if case.biases:
        result["sigmoid_bias"] = sums.sum((0, 2))
        result["key_bias"] = sums.sum(1)
    return result


def launch(kernel: triton.JITFunction, grid: tuple[int], arguments: list, options: dict) -> None:
    """Calls one kernel; it writes into the arrays given."""
    arrays = [np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x for x in arguments]
    kernel[grid](*[Tensor(x) if isinstance(x, np.ndarray) else x for x in arrays], **options)


def main() -> None:
    failures = {}
    for fields in json.load(sys.stdin):
        fields["lengths"] = fields["lengths"] and tuple(map(tuple, fields["lengths"]))
        case = Case(**fields)
        inputs = numerics.make_inputs(case)
        got = run(case, inputs)
        wrong = numerics.violations(
            got, numerics.exact(case, inputs), numerics.run_plain(case, inputs)
        )
        failures[case.label] = wrong
        print(case.label, *wrong, file=sys.stderr)
    json.dump(failures, sys.stdout)


if __name__ == "__main__":
    main()
