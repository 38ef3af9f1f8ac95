"""The correctness gate: nothing is timed whose numbers are wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.jax_contenders import FAST, Inputs, JaxContender
from sigjax import reference
from sigjax.checks import check

TENSORS = ("output", "query gradient", "key gradient", "value gradient")
# What two float32 summation orders may differ by, for operands that are float32 themselves.
ROUNDING = 8 * float(jnp.finfo(jnp.float32).eps)

# By how much the hardware's tanh puts a single weight off at most, at 16,384 keys. The workloads'
# values are independent, so an output is off by no more of its norm.
TANH_ERROR = 0.053


@dataclass(frozen=True)
class Verdict:
    """One tensor of one batch row against the definition.

    Attributes:
        tensor: which one, of TENSORS.
        row: of the batch.
        error: relative to the definition in float32, ‖x − ref‖ / ‖ref‖.
        bound: twice the error of the plain definition in the workload's dtype; of an output by
            fast_sigmoid plus TANH_ERROR.
    """

    tensor: str
    row: int
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """False for a NaN, too."""
        return self.error <= self.bound

    def __str__(self) -> str:
        sign = "≤" if self.passed else "exceeds"
        return f"{self.tensor} of row {self.row}: error {self.error:.2e} {sign} {self.bound:.2e}"


def judge(contender: JaxContender, inputs: Inputs) -> list[Verdict]:
    """Output and gradients of the very functions that are timed, at full size.

    Two batch rows, the longest and the shortest one, and the first and last head
    are compared with the definition, which has to form all T x T logits.
    """
    results = (contender.forward(inputs), *contender.gradients(inputs))
    verdicts = []
    for row in rows_to_judge(inputs):
        part = _slice(inputs, row)
        exact, plain = _exact(part), _plain(part)
        for tensor, result, wanted, rough in zip(TENSORS, results, exact, plain, strict=True):
            error = relative_error(_corner(result, row), wanted)
            bound = 2 * relative_error(rough, wanted) + ROUNDING
            if contender.name in FAST and tensor == "output":
                bound += TANH_ERROR
            verdicts.append(Verdict(tensor, row, error, bound))
    return verdicts


def rows_to_judge(inputs: Inputs) -> Sequence[int]:
    """The longest and the shortest row; the first and the last where all are equal."""
    if inputs.lengths is None:
        return sorted({0, inputs.query.shape[0] - 1})
    lengths = np.asarray(inputs.lengths)
    return sorted({int(lengths.argmax()), int(lengths.argmin())})


def relative_error(x: Array, wanted: Array) -> float:
    """‖x − wanted‖ / ‖wanted‖ in float64; the numerator alone where wanted is 0."""
    got, true = np.asarray(x, np.float64), np.asarray(wanted, np.float64)
    norm = float(np.linalg.norm(true))
    return float(np.linalg.norm(got - true)) / (norm or 1.0)


def _slice(inputs: Inputs, row: int) -> Inputs:
    lengths = None if inputs.lengths is None else inputs.lengths[row : row + 1]
    return inputs.map_arrays(lambda x: _corner(x, row))._replace(lengths=lengths)


def _corner(x: Array, row: int) -> Array:
    heads = sorted({0, x.shape[2] - 1})
    return x[row : row + 1, :, jnp.array(heads)]


# The definition runs once a shape: trying out its products' algorithms would take longer.
_ONCE = {"xla_gpu_autotune_level": 0}


@partial(jax.jit, compiler_options=_ONCE)
def _exact(inputs: Inputs) -> tuple[Array, ...]:
    with jax.default_matmul_precision("highest"):
        return _definition(inputs.map_arrays(lambda x: x.astype(jnp.float32)))


@partial(jax.jit, compiler_options=_ONCE)
def _plain(inputs: Inputs) -> tuple[Array, ...]:
    return _definition(inputs)


def _definition(inputs: Inputs) -> tuple[Array, ...]:
    attention = partial(_reference, lengths=inputs.lengths)
    output, pullback = jax.vjp(attention, inputs.query, inputs.key, inputs.value)
    return output, *pullback(inputs.cotangent)


def _reference(query: Array, key: Array, value: Array, lengths: Array | None) -> Array:
    operands, settings = check(
        query,
        key,
        value,
        None,
        None,
        scale=None,
        sigmoid_bias=None,
        key_bias=None,
        is_causal=False,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None,
    )
    return reference.attention(operands, settings)
