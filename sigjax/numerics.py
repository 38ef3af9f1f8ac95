"""The numeric grid, its float64 oracle and the tolerance rule: what every implementation meets.

The oracle is NumPy and loops over sequences; it shares no line with the code that it judges.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sigjax import reference
from sigjax.checks import check

# The length a sequence of the grid may have: 0, 1, primes, a tile and its neighbours.
BUCKET = (160, 192)  # T, S of every padded case
PADDED_LENGTHS = (
    ((0, 192), (160, 0)),  # ((query length, key length) of each sequence)
    ((1, 1), (2, 131)),
    ((63, 64), (65, 63)),
    ((64, 65), (127, 129)),
    ((128, 127), (129, 128)),
    ((160, 192), (113, 191)),
    ((31, 17), (159, 33)),
    ((160, 1), (1, 192)),
    ((95, 97), (97, 95)),
    ((16, 15), (17, 16)),
    ((149, 181), (151, 179)),
    ((2, 3), (3, 2)),
    ((126, 190), (130, 66)),
)
FULL_LENGTHS = ((1, 1), (1, 67), (67, 1), (64, 64), (65, 129), (0, 5), (5, 0))
LONG_LENGTHS = ((16, 6000), (6000, 16))  # long sums, of outputs and of key gradients
WINDOW = (40, 25)
EXTRAS = ("bias", "mask", "window", "segments")
DTYPES = ("bfloat16", "float16", "float32")

# What the name of an argument without a gradient ends with.
FIXED_ARGUMENTS = ("lengths", "segment_ids", "mask")

type Named = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One call of the op, with its operands' shapes.

    Attributes:
        dtype: of query, key and value.
        head_size: H.
        length: T.
        key_length: S.
        groups: query heads a key head serves; K is 2.
        is_causal: as in the op.
        biases: learnable sigmoid_bias [N] and key_bias [B, S] are given.
        lengths: (query length, key length) of each sequence; None where both are full.
        scale: as in the op.
        extra: one of EXTRAS: bias [1, N, T, S], mask [B, 1, T, S], a local window, or
            segments; or none.
    """

    dtype: str
    head_size: int
    length: int
    key_length: int
    groups: int = 1
    is_causal: bool = False
    biases: bool = False
    lengths: tuple[tuple[int, int], ...] | None = None
    scale: float | None = None
    extra: str = ""

    @property
    def label(self) -> str:
        """Readable test id: "bfloat16-H64-T160-S192-G2-causal-biases-(1,1)(2,131)"."""
        parts = [self.dtype, f"H{self.head_size}", f"T{self.length}", f"S{self.key_length}"]
        parts += [f"G{self.groups}"] * (self.groups > 1) + ["causal"] * self.is_causal
        parts += ["biases"] * self.biases + [self.extra] * bool(self.extra)
        if self.lengths is not None:
            parts.append("".join(f"({q},{k})" for q, k in self.lengths))
        return "-".join(parts)

    @property
    def batch(self) -> int:
        """B."""
        return 2 if self.lengths is None else len(self.lengths)


def numeric_grid() -> list[Case]:
    """Every case that "xla" and "triton" must pass: over 700."""
    padded = [
        Case(dtype, head_size, *BUCKET, groups, causal, biases, lengths)
        for dtype in DTYPES
        for head_size in (16, 64, 96, 128)
        for groups in (1, 2)
        for causal in (False, True)
        for biases in (False, True)
        for lengths in PADDED_LENGTHS
    ]
    full = [
        Case(dtype, head_size, *shape, is_causal=causal, biases=causal)
        for dtype in DTYPES
        for shape in FULL_LENGTHS
        for head_size, causal in ((64, False), (256, True))
    ]
    long = [Case(dtype, 64, *shape) for dtype in DTYPES for shape in LONG_LENGTHS]
    return padded + full + long


def extended_grid() -> list[Case]:
    """Cases of bias, mask, window and segments, with lengths: over 300."""
    return [
        Case(
            dtype, 64, *BUCKET, groups, causal, causal and extra != "segments", lengths, extra=extra
        )
        for dtype in DTYPES
        for extra in EXTRAS
        for groups, causal in ((1, True), (2, False))
        for lengths in PADDED_LENGTHS
    ]


def make_inputs(case: Case, seed: int = 0) -> Named:
    """Standard normal operands by the op's argument names, and the output's cotangent."""
    rng = np.random.default_rng(seed)
    heads = 2 * case.groups
    shapes = {
        "query": (case.batch, case.length, heads, case.head_size),
        "key": (case.batch, case.key_length, 2, case.head_size),
        "value": (case.batch, case.key_length, 2, case.head_size),
        "cotangent": (case.batch, case.length, heads, case.head_size),
    }
    dtype = jnp.dtype(case.dtype)
    inputs = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    if case.biases:
        wide = np.float64 if dtype == np.float64 else np.float32
        inputs["sigmoid_bias"] = rng.uniform(-6, -1, heads).astype(wide)
        inputs["key_bias"] = rng.standard_normal((case.batch, case.key_length)).astype(wide)
    logits = (heads, case.length, case.key_length)
    if case.extra == "bias":
        inputs["bias"] = rng.standard_normal((1, *logits)).astype(np.float32)
    if case.extra == "mask":
        inputs["mask"] = rng.random((case.batch, 1, *logits[1:])) < 0.8
    if case.extra == "segments":
        # Up to four sequences a row, and padding, at cuts of their own in queries and keys.
        for name, size in (("query", case.length), ("key_value", case.key_length)):
            ids = np.sort(rng.integers(-1, 5, (case.batch, size)), axis=1)
            inputs[f"{name}_segment_ids"] = np.flip(ids, 1).astype(np.int32)
    if case.lengths is not None:
        lengths = np.asarray(case.lengths, np.int32)
        inputs["query_seq_lengths"], inputs["key_value_seq_lengths"] = lengths.T.copy()
    return inputs


def run(op: Callable[..., Array], case: Case, inputs: Mapping[str, np.ndarray]) -> Named:
    """The op's output and gradients by argument name, in their own dtypes; jitted once a shape."""
    result = compiled(op, case)(dict(inputs))
    return {name: np.asarray(x) for name, x in result.items()}


def compiled(op: Callable[..., Array], case: Case) -> Callable[[Named], dict[str, Array]]:
    """The op's output and gradients of inputs as make_inputs makes them; jitted once a shape."""
    # The lengths are operands: cases that differ in nothing else share a compilation.
    return _compile(op, replace(case, lengths=None))


@functools.cache
def _compile(op: Callable[..., Array], case: Case) -> Callable[[Named], dict[str, Array]]:
    def output_and_gradients(inputs: Mapping[str, Array]) -> dict[str, Array]:
        inputs = dict(inputs)
        cotangent = inputs.pop("cotangent")
        fixed = {name: inputs.pop(name) for name in list(inputs) if name.endswith(FIXED_ARGUMENTS)}
        window = {"local_window_size": WINDOW} if case.extra == "window" else {}

        def call(arrays: Mapping[str, Array]) -> Array:
            return op(**arrays, **fixed, **window, is_causal=case.is_causal, scale=case.scale)

        output, pullback = jax.vjp(call, inputs)
        return {"output": output, **pullback(cotangent)[0]}

    return jax.jit(output_and_gradients)


def plain(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    **others: Any,
) -> Array:
    """The plain jnp definition with the op's arguments, float32 products exact."""
    options: dict[str, Any] = {"sigmoid_bias": None, "key_bias": None, "local_window_size": None}
    options |= {"query_seq_lengths": None, "key_value_seq_lengths": None, **others}
    operands, settings = check(
        query, key, value, bias, mask, scale=scale, is_causal=is_causal, **options
    )
    with jax.default_matmul_precision("highest"):
        return reference.attention(operands, settings)


def run_plain(case: Case, inputs: Mapping[str, np.ndarray]) -> Named:
    """The plain definition's output and gradients, computed on the CPU."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return run(plain, case, inputs)


def exact(case: Case, inputs: Mapping[str, np.ndarray]) -> Named:
    """Output and gradients in float64, sequence by sequence.

    For the gradients of the biases, sums over all pairs, also NAME_magnitude: the sum of
    the absolute values.
    """
    arrays = {name: np.asarray(x).astype(np.float64) for name, x in inputs.items()}
    names = ("query", "key", "value", "bias", "sigmoid_bias", "key_bias")
    result = {name: np.zeros_like(arrays[name]) for name in names if name in arrays}
    result["output"] = np.zeros_like(arrays["query"])
    for name in ("bias", "sigmoid_bias", "key_bias"):
        if name in arrays:
            result[f"{name}_magnitude"] = np.zeros_like(arrays[name])
    full = ((case.length, case.key_length),) * case.batch
    for row, (length, keys) in enumerate(case.lengths or full):
        _exact_sequence(case, arrays, result, row, length, keys)
    return result


def _exact_sequence(
    case: Case, arrays: Named, result: Named, row: int, length: int, keys: int
) -> None:
    scale = case.head_size**-0.5 if case.scale is None else case.scale
    allowed, counts = _exact_pairs(case, arrays, row, length, keys)
    for head in range(2 * case.groups):
        kv_head = head // case.groups
        query, cotangent = (arrays[x][row, :length, head] for x in ("query", "cotangent"))
        key, value = (arrays[x][row, :keys, kv_head] for x in ("key", "value"))
        logits = query @ key.T * scale - np.log(np.maximum(counts, 1))[:, None]
        if "sigmoid_bias" in arrays:
            bias = arrays["sigmoid_bias"][head] + arrays["key_bias"][row, None, :keys]
            logits = query @ key.T * scale + bias
        if "bias" in arrays:
            logits = logits + arrays["bias"][0, head, :length, :keys]
        weights = np.where(allowed, 1 / (1 + np.exp(-logits)), 0)
        gradient = weights * (1 - weights) * (cotangent @ value.T)
        result["output"][row, :length, head] = weights @ value
        result["query"][row, :length, head] = scale * gradient @ key
        result["key"][row, :keys, kv_head] += scale * gradient.T @ query
        result["value"][row, :keys, kv_head] += weights.T @ cotangent
        for suffix, terms in (("", gradient), ("_magnitude", np.abs(gradient))):
            if "sigmoid_bias" in result:
                result["sigmoid_bias" + suffix][head] += terms.sum()
                result["key_bias" + suffix][row, :keys] += terms.sum(0)
            if "bias" in result:
                result["bias" + suffix][0, head, :length, :keys] += terms


def _exact_pairs(
    case: Case, arrays: Named, row: int, length: int, keys: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs take part, [length, keys], and how many keys each query's sequence has."""
    allowed = np.ones((length, keys), bool)
    counts = np.full(length, keys)
    offset = np.arange(keys)[None, :] - np.arange(length)[:, None]
    if case.extra == "segments":
        queries, others = (arrays[f"{side}_segment_ids"][row] for side in ("query", "key_value"))
        for i in range(length):
            allowed[i] = (others[:keys] == queries[i]) & (queries[i] > 0)
        counts = allowed.sum(1)
    if case.is_causal:
        allowed &= offset <= 0
    if case.extra == "window":
        allowed &= (offset >= -WINDOW[0]) & (offset <= WINDOW[1])
    if case.extra == "mask":
        allowed &= arrays["mask"][row, 0, :length, :keys] > 0
    return allowed, counts


def tolerance(exact_values: np.ndarray, plain_values: np.ndarray, magnitude: float) -> float:
    """The rule: twice the plain definition's largest error, plus a few ulps at the magnitude.

    After the rule of flash-attention's tests: the plain definition in the same dtype,
    not a hand-set number, says what that dtype allows.
    """
    plain_error = np.abs(plain_values.astype(np.float64) - exact_values).max()
    return float(2 * plain_error + few_ulps(plain_values.dtype) * magnitude)


def few_ulps(dtype: np.dtype) -> float:
    """Two ulps of the dtype and two of float32, in which everything is summed."""
    return 2 * float(jnp.finfo(dtype).eps) + 2 * float(np.finfo(np.float32).eps)


def violations(got: Named, exact_values: Named, plain_values: Named) -> list[str]:
    """What breaks the rule, a line per output or gradient; empty where nothing does."""
    lines = []
    for name, want in exact_values.items():
        if name.endswith("_magnitude") or not want.size:
            continue
        # A gradient summed over all pairs cancels: its ulps are those of what it sums.
        magnitude = exact_values.get(f"{name}_magnitude", np.abs(want)).max()
        allowed = tolerance(want, plain_values[name], float(magnitude))
        error = np.abs(got[name].astype(np.float64) - want).max()
        if not error <= allowed:  # a NaN error is a violation too
            lines.append(f"{name}: error {error:.3e}, allowed {allowed:.3e}")
    return lines
