"""Speed of tile choices: what the rows of sigjax.kernels.tiles are chosen by.

    python -m benchmarks.tune --lengths 1024,4096,16384 --out DIR

times every candidate of each portable kernel on the paper's dense shapes, in the
interleaved bursts of measure.py, and writes tiles.csv. A candidate that does not
compile or does not fit the card is reported and left out.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from triton.errors import TritonError

from benchmarks.clocks import NvmlProbe
from benchmarks.measure import Plan, interleave
from sigjax.kernels import launch
from sigjax.kernels.tiles import Kernel, Tile
from sigjax.operands import Operands, Settings
from sigjax.testing import Workload, workload

# Matrix products that a kernel computes, two FLOP a multiply-add.
PRODUCTS: dict[Kernel, int] = {"forward": 2, "query_gradient": 3, "key_value_gradient": 4}
COLUMNS = (
    "T", "H", "kernel", "block_q", "block_k", "num_warps", "num_stages",
    "tflops_median", "tflops_min", "tflops_max",
)  # fmt: skip

# Those without heavy spills (ptxas -v) among powers of two that fit the shared memory.
CANDIDATES: dict[Kernel, tuple[Tile, ...]] = {
    "forward": (
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 4), Tile(64, 32, 4, 4),
        Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 128, 8, 2),
    ),
    "query_gradient": (
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 4), Tile(64, 32, 4, 3),
        Tile(128, 64, 8, 2), Tile(128, 64, 8, 3),
    ),
    "key_value_gradient": (
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 4), Tile(32, 64, 4, 4),
        Tile(32, 128, 8, 3), Tile(64, 128, 8, 2), Tile(64, 128, 8, 3),
    ),
}  # fmt: skip


class TileContender:
    """One kernel with one tile, compiled and ready."""

    def __init__(self, kernel: Kernel, tile: Tile, arrays: tuple[Array, ...]) -> None:
        self.tile = tile
        self.name = f"{kernel} {tile.block_q}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}"
        self._arrays = arrays
        self._run = jax.jit(_launcher(kernel, tile)).lower(*arrays).compile()
        jax.block_until_ready(self._run(*arrays))

    def burst(self, calls: int) -> float:
        """Runs back to back and waits; milliseconds per call."""
        return milliseconds(self._run, self._arrays, calls)


def milliseconds(run: Callable[..., Any], arrays: tuple[Array, ...], calls: int) -> float:
    """Per call, of calls back to back after one that is not timed."""
    jax.block_until_ready(run(*arrays))
    start = time.perf_counter()
    results = None
    for _ in range(calls):
        results = run(*arrays)
    jax.block_until_ready(results)
    return (time.perf_counter() - start) * 1e3 / calls


def main() -> int:
    """Times the candidates; 1 where none could be timed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", default="4096,16384", help="T, comma-separated")
    parser.add_argument("--head-sizes", default="64,128", help="H, comma-separated")
    parser.add_argument("--kernels", default=",".join(PRODUCTS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="folder of tiles.csv")
    chosen = parser.parse_args()
    plan = Plan(rounds=chosen.rounds, burst_ms=20, rest_s=0.1)
    rows = []
    for length in map(int, chosen.lengths.split(",")):
        for head_size in map(int, chosen.head_sizes.split(",")):
            shape = workload("dense", length, head_size)
            for kernel in chosen.kernels.split(","):
                rows += measure(shape, kernel, plan)
    write(rows, chosen.out / "tiles.csv")
    return 0 if rows else 1


def measure(shape: Workload, kernel: Kernel, plan: Plan) -> list[dict[str, Any]]:
    """A row for each tile of one kernel on one shape, the fastest first."""
    contenders = list(_compiled(kernel, _inputs(shape)))
    if not contenders:
        return []
    measurement = interleave(contenders, plan, NvmlProbe())
    flops = shape.flops("forward") / 2 * PRODUCTS[kernel]
    rows: list[dict[str, Any]] = []
    for contender in contenders:
        tflops = [flops / round_[contender.name].ms / 1e9 for round_ in measurement.rounds]
        rows.append(
            {"T": shape.length, "H": shape.head_size, "kernel": kernel, **asdict(contender.tile)}
            | {
                "tflops_median": round(float(np.median(tflops)), 1),
                "tflops_min": round(min(tflops), 1),
                "tflops_max": round(max(tflops), 1),
            }
        )
    rows.sort(key=lambda row: -row["tflops_median"])
    best = rows[0]
    sys.stdout.write(f"{shape.label} {kernel}: {best['tflops_median']} TFLOPS, {best}\n")
    return rows


def write(rows: list[dict[str, Any]], path: Path, columns: Sequence[str] = COLUMNS) -> None:
    """Writes the rows, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf8") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)
    partial.replace(path)


def _compiled(kernel: Kernel, arrays: tuple[Array, ...]) -> Iterable[TileContender]:
    for tile in CANDIDATES[kernel]:
        try:
            yield TileContender(kernel, tile, arrays)
        except (
            TritonError,
            RuntimeError,
            ValueError,
        ) as error:  # does not compile, or does not fit the card
            sys.stderr.write(f"{kernel} {tile}: {str(error).splitlines()[0]}\n")


def _launcher(kernel: Kernel, tile: Tile) -> Callable[..., Array | tuple[Array | None, ...]]:
    def run(query: Array, key: Array, value: Array, output_gradient: Array):
        operands = Operands(query, key, value)
        settings = Settings(scale=query.shape[-1] ** -0.5)
        if kernel == "forward":
            return launch.portable_forward(operands, settings, tile)
        backward = getattr(launch, kernel)
        return backward(operands, settings, output_gradient, tile)

    return run


def _inputs(shape: Workload) -> tuple[Array, ...]:
    size = (shape.batch, shape.length, shape.heads, shape.head_size)
    keys = jax.random.split(jax.random.key(shape.seed), 4)
    return tuple(jax.random.normal(key, size, jnp.bfloat16) for key in keys)


if __name__ == "__main__":
    sys.exit(main())
