"""Device memory of one forward and backward pass, in a process of its own: peaks never fall.

    python -m benchmarks.variants_memory IMPLEMENTATION

reads a workload as JSON from standard input and prints the bytes as JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.provenance import ROOT
from sigjax.testing import Workload

FLOAT32 = 4


class MemoryProcessError(RuntimeError):
    """The process that measures memory failed, with its last line."""


@dataclass(frozen=True)
class Bytes:
    """What a compiled program plans to take and what its device's allocator saw."""

    argument: int
    output: int
    temp: int
    peak: int | None

    @property
    def planned(self) -> int:
        """Arguments, outputs and temporaries together."""
        return self.argument + self.output + self.temp


def allowed_bytes(shape: Workload) -> int:
    """Inputs, output, gradients and one float32 query gradient.

    Inputs are query, key, value and the output's gradient.

    Example:
        >>> allowed_bytes(Workload("memory", 1, 8, 1, 16))
        2560
    """
    elements = shape.batch * shape.length * shape.heads * shape.head_size
    inputs, output, gradients = 4, 1, 3
    itemsize = ml_dtypes.finfo(shape.dtype).bits // 8
    return elements * (itemsize * (inputs + output + gradients) + FLOAT32)


def measure(
    shape: Workload, implementation: str, seconds: float, platforms: str | None = None
) -> Bytes:
    """Measures in a process of its own.

    Args:
        shape: of query, key and value.
        implementation: of the call.
        seconds: that it may take.
        platforms: JAX_PLATFORMS of that process; None is as here.

    Raises:
        MemoryProcessError: it failed, or took longer than seconds.
    """
    # Without the first the allocator takes most of the card at once. Filtered tracebacks end on
    # a note, not on the error.
    settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_TRACEBACK_FILTERING": "off"}
    if platforms is not None:
        settings["JAX_PLATFORMS"] = platforms
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.variants_memory", implementation],
            input=json.dumps(asdict(shape)),
            env=os.environ | settings,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        msg = f"not done after {seconds:g} s"
        raise MemoryProcessError(msg) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        msg = f"ended with status {done.returncode}: {lines[-1]}"
        raise MemoryProcessError(msg)
    return Bytes(**json.loads(done.stdout.splitlines()[-1]))


def measure_here(shape: Workload, implementation: Any) -> Bytes:
    """Runs output and gradients once in this process, which has run nothing before."""
    import jax

    from sigjax.attention import sigmoid_attention

    def both(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        def attention(query: Any, key: Any, value: Any) -> Any:
            return sigmoid_attention(query, key, value, implementation=implementation)

        output, pullback = jax.vjp(attention, query, key, value)
        return output, pullback(cotangent)

    # Made on the host: a device would need temporaries of its own for random numbers.
    size = (shape.batch, shape.length, shape.heads, shape.head_size)
    values = np.random.default_rng(shape.seed).standard_normal(size, np.float32)
    inputs = [jax.device_put(values.astype(shape.dtype)) for _ in range(4)]
    compiled = jax.jit(both).lower(*inputs).compile()
    jax.block_until_ready(compiled(*inputs))
    planned: Any = compiled.memory_analysis()
    seen = jax.local_devices()[0].memory_stats()  # None on a CPU
    return Bytes(
        argument=planned.argument_size_in_bytes,
        output=planned.output_size_in_bytes,
        temp=planned.temp_size_in_bytes,
        peak=None if seen is None else seen["peak_bytes_in_use"],
    )


def main(argv: Sequence[str]) -> None:
    """The process of its own."""
    shape = Workload(**json.load(sys.stdin))
    print(json.dumps(asdict(measure_here(shape, argv[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
