"""Versions of the Hopper kernels beside cuDNN: what their rows in sigjax.kernels.tiles rest on.

    python -m benchmarks.tune_hopper --lengths 1024,4096,16384 --out DIR

times every version on the paper's dense shapes, interleaved with the softmax attention of cuDNN
(jax.nn.dot_product_attention) in the bursts of measure.py, and writes hopper_versions.csv: per
version TFLOPS and the ratio to cuDNN, round by round. --logits 8 makes the logits 8 times larger.
--pairs bias (or mask, key_bias) times the forward kernel with a bias [1, N, T, S] (a mask
[B, 1, T, S], a key_bias [B, S]), and without as version "plain". A version
that does not compile is reported and left out.
"""

import argparse
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax import Array
from triton.errors import TritonError

from benchmarks.clocks import NvmlProbe
from benchmarks.jax_contenders import JaxContender, make_inputs
from benchmarks.measure import Plan, interleave
from benchmarks.tune import milliseconds, write
from sigjax.kernels import hopper_backward_launch, hopper_launch
from sigjax.kernels.tiles import (
    BackwardTile,
    ForwardTile,
    hopper_backward_tile,
    hopper_forward_tile,
)
from sigjax.operands import Operands, Settings
from sigjax.testing import DIRECTIONS, Direction, Workload, workload

# What --pairs adds to a call.
type Added = Literal["bias", "mask", "key_bias"]
ADDED: tuple[Added, ...] = ("bias", "mask", "key_bias")
CUDNN = "jax_cudnn"
PLAIN = "plain"  # without what --pairs adds
COLUMNS = (
    "T", "H", "logits", "direction", "version", "tflops_median", "tflops_q20", "tflops_q80",
    "ratio_vs_cudnn_median", "ratio_vs_cudnn_q20", "ratio_vs_cudnn_q80", "sm_clock_mhz_min",
    "temperature_c_max", "throttle_reasons",
)  # fmt: skip


class Version:
    """One compiled program, ready to be timed."""

    def __init__(self, name: str, run: Callable[..., Any], arrays: tuple[Array, ...]) -> None:
        self.name = name
        self._arrays = arrays
        self._run = jax.jit(run).lower(*arrays).compile()
        jax.block_until_ready(self._run(*arrays))

    def burst(self, calls: int) -> float:
        """Runs back to back and waits; milliseconds per call."""
        return milliseconds(self._run, self._arrays, calls)


def forward_versions(head_size: int, *, pairs: Added | None = None) -> dict[str, ForwardTile]:
    """The table's tile and its rivals, by name; those with a bias or mask where pairs is given."""
    table = hopper_forward_tile(head_size)
    if pairs == "key_bias":
        return {PLAIN: table} | key_bias_versions(head_size)
    if pairs is not None:
        return {PLAIN: table} | pairs_versions(head_size, pairs)
    return {
        "table": table,
        "short": hopper_forward_tile(head_size, short=True),
        "pair": table.exact(),
        "pair, no turns": replace(table.exact(), turns="never"),
        "4.5 deviations": replace(table, deviations=4.5, deviations_of_many=4.5),
        "4.7 deviations": replace(table, deviations=4.7, deviations_of_many=4.7),
        "a large weight": replace(table, deviations=0, deviations_of_many=0),
        "every so many-th": replace(table, counts="lengths"),
        "adaptive": replace(table, few=0),
        "always turns": replace(table, turns="always"),
        "no turns": replace(table, turns="never"),
        "tanh": hopper_forward_tile(head_size, fast_sigmoid=True),
    }


def pairs_versions(head_size: int, pairs: Literal["bias", "mask"]) -> dict[str, ForwardTile]:
    """The table's tile with a bias or mask and its rivals, by name."""
    own = hopper_forward_tile(head_size, pairs=pairs)
    adaptive = replace(
        own, weights="adaptive", early=head_size == 128, turns="always",
        matrix="scores" if pairs == "bias" else "logits",
    )  # fmt: skip
    return {
        "table": own,
        "exact": own.exact(),
        "pair logits": replace(own.exact(), matrix="logits"),
        "adaptive logits": replace(adaptive, matrix="logits"),
        "adaptive": adaptive,
        "adaptive late": replace(adaptive, early=False),
        "adaptive free": replace(adaptive, turns="never"),
        "tanh": hopper_forward_tile(head_size, fast_sigmoid=True, pairs=pairs),
    }


def key_bias_versions(head_size: int) -> dict[str, ForwardTile]:
    """The table's tile with a bias per key and its rivals, by name."""
    table = hopper_forward_tile(head_size)
    exact = table.exact()
    return {
        "table": table,
        "logits": replace(table, key_bias="logits"),
        "scores": replace(table, key_bias="scores"),
        "pair logits": replace(exact, key_bias="logits"),
        "pair scores": replace(exact, key_bias="scores"),
        "tanh logits": replace(
            hopper_forward_tile(head_size, fast_sigmoid=True), key_bias="logits"
        ),
        "tanh": hopper_forward_tile(head_size, fast_sigmoid=True),
    }


def backward_versions(head_size: int) -> dict[str, BackwardTile]:
    """The table's tile and its rivals, by name."""
    table = hopper_backward_tile(head_size)
    return {"table": table}


def main() -> int:
    """Times the versions; 1 where none could be timed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384", help="T")
    parser.add_argument("--head-sizes", default="64,128", help="H")
    parser.add_argument("--directions", default=",".join(DIRECTIONS))
    parser.add_argument("--versions", help="those of these names; default: all")
    parser.add_argument("--pairs", choices=ADDED, help="forward alone")
    parser.add_argument("--logits", default="1", help="factors of the logits")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rest-s", type=float, default=0.15)
    parser.add_argument("--out", type=Path, required=True, help="folder of hopper_versions.csv")
    chosen = parser.parse_args()
    plan = Plan(rounds=chosen.rounds, burst_ms=25, rest_s=chosen.rest_s)
    names = chosen.versions and chosen.versions.split(",")
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    for direction in chosen.directions.split(","):
        for head_size in map(int, chosen.head_sizes.split(",")):
            for length in map(int, chosen.lengths.split(",")):
                for factor in map(float, chosen.logits.split(",")):
                    shape = workload("dense", length, head_size)
                    rows += measure(shape, direction, factor, plan, names, chosen.pairs)
                    write(rows, chosen.out / "hopper_versions.csv", COLUMNS)
                    sys.stdout.write(f"{time.perf_counter() - start:.0f} s\n")
                    sys.stdout.flush()
    return 0 if rows else 1


def measure(
    shape: Workload,
    direction: Direction,
    factor: float,
    plan: Plan,
    names: Collection[str] | None = None,
    pairs: Added | None = None,
) -> list[dict[str, Any]]:
    """A row for each version, or those of these names, on one shape, and one for cuDNN."""
    inputs = make_inputs(shape)
    inputs = inputs._replace(query=inputs.query * factor)
    cudnn = JaxContender(CUDNN)
    cudnn.prepare(shape, inputs, direction)
    versions = [cudnn, *compiled(shape, direction, inputs[:4], names, pairs)]
    rounds = interleave(versions, plan, NvmlProbe()).rounds
    rows = []
    for version in versions:
        bursts = [round_[version.name] for round_ in rounds]
        tflops = [shape.flops(direction) / burst.ms / 1e9 for burst in bursts]
        ratios = [round_[CUDNN].ms / round_[version.name].ms for round_ in rounds]
        row = {"T": shape.length, "H": shape.head_size, "logits": factor, "direction": direction}
        row |= {"version": version.name} | quantiles("tflops", tflops, 1)
        row |= quantiles("ratio_vs_cudnn", ratios, 3)
        states = [burst.state for burst in bursts]
        row |= {
            "sm_clock_mhz_min": min(state.sm_clock_mhz or 0 for state in states),
            "temperature_c_max": max(state.temperature_c or 0 for state in states),
            "throttle_reasons": hex(np.bitwise_or.reduce([state.reasons for state in states])),
        }
        rows.append(row)
    said = ", ".join(
        f"{row['version']} {row['tflops_median']} ({row['ratio_vs_cudnn_median']})" for row in rows
    )
    sys.stdout.write(f"{shape.label} x{factor:g} {direction}: {said}; ")
    return rows


def compiled(
    shape: Workload,
    direction: Direction,
    arrays: tuple[Array, ...],
    names: Collection[str] | None = None,
    pairs: Added | None = None,
) -> list[Version]:
    """The versions that compile, or those of these names that do."""
    candidates: dict[str, Any] = backward_versions(shape.head_size)
    if direction == "forward":
        # As the op would take them: of few keys exact.
        tiles = forward_versions(shape.head_size, pairs=pairs)
        candidates = {name: tile.for_keys(shape.length) for name, tile in tiles.items()}
    matrix = () if pairs is None else (matrix_of(shape, pairs),)
    versions = []
    for name, tile in candidates.items():
        if names is not None and name not in names:
            continue
        try:
            call = partial(run, direction, tile, None if name == PLAIN else pairs)
            versions.append(Version(name, call, (*arrays, *matrix)))
        except (TritonError, RuntimeError, ValueError) as error:
            sys.stderr.write(f"{direction} {name}: {str(error).splitlines()[0]}\n")
    return versions


def matrix_of(shape: Workload, pairs: str) -> Array:
    """A bias [1, N, T, S], a mask [B, 1, T, S] or a key_bias [B, S]."""
    key = jax.random.key(shape.seed + 1)
    length = shape.length
    if pairs == "bias":
        return jax.random.normal(key, (1, shape.heads, length, length), shape.dtype)
    if pairs == "key_bias":
        return jax.random.normal(key, (shape.batch, length), "float32")
    return jax.random.bernoulli(key, 0.9, (shape.batch, 1, length, length))


def run(
    direction: Direction,
    tile: Any,
    pairs: str | None,
    query: Array,
    key: Array,
    value: Array,
    gradient: Array,
    *matrix: Array,
) -> Any:
    """A pass of the Hopper kernel with a tile; the matrix is what pairs names."""
    operands = Operands(query, key, value)
    if pairs is not None:
        operands = operands._replace(**dict(zip((pairs,), matrix, strict=True)))
    settings = Settings(scale=query.shape[-1] ** -0.5)
    if direction == "forward":
        return hopper_launch.forward(operands, settings, tile)
    gradients = hopper_backward_launch.backward(operands, settings, gradient, tile)
    return gradients.query, gradients.key, gradients.value


def quantiles(name: str, values: list[float], digits: int) -> dict[str, float]:
    """Median and 20 and 80 % quantiles, as columns."""
    levels = {"median": 0.5, "q20": 0.2, "q80": 0.8}
    return {
        f"{name}_{level}": round(float(np.quantile(values, q)), digits)
        for level, q in levels.items()
    }


if __name__ == "__main__":
    sys.exit(main())
