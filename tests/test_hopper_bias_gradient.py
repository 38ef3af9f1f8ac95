"""The Hopper kernel for the gradient of a bias of pairs: hopper_bias_gradient.py."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sigjax
from sigjax import numerics, reference
from sigjax.attention import sigmoid_attention
from sigjax.checks import check
from sigjax.choice import compile_for
from sigjax.kernels import hopper_choice, launch
from sigjax.kernels.tiles import BiasTile
from sigjax.operands import Operands, Settings
from tests import definition, emulated_hopper
from tests.in_turn import HEAD_SIZES, in_turn

BATCH, LENGTH, KEYS, HEADS = 2, 150, 200, 2
HOPPER, PORTABLE = "hopper_bias_gradient_kernel", "bias_gradient_kernel"
AXES = {"BNTS": (1, 1), "NTS": (0, 1), "BTS": (1, 0), "TS": (0, 0)}  # whether of B, of N
RAGGED = ((150, 70), (131, 200))
SHORT = ((60, 3), (64, 1))  # tiles that no sequence reaches, for a bias without B too
TILES = {
    "deep": BiasTile(3, 4, 168),
    "small": BiasTile(2, 2, 168),
    "held": BiasTile(3, 4, 168, held=True),
}
axes = pytest.mark.parametrize("axes", AXES.values(), ids=list(AXES))
head_sizes = pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hopper kernels serve what they can, as by default."""
    monkeypatch.delenv(hopper_choice.VARIABLE, raising=False)


@dataclass(frozen=True)
class Call:
    """A call with a bias of pairs.

    Attributes:
        length: T.
        keys: S.
        kv_heads: K.
        lengths: query lengths, and key lengths; None where all rows are full.
        biases: whether sigmoid_bias and key_bias are given too.
        is_causal: as in the op.
        window: local_window_size.
    """

    length: int = LENGTH
    keys: int = KEYS
    kv_heads: int = HEADS
    lengths: tuple[tuple[int, int], tuple[int, int]] | None = None
    biases: bool = False
    is_causal: bool = False
    window: tuple[int, int] | None = None

    def inputs(
        self, dtype: str, head_size: int, axes: tuple[int, int], bias_dtype: str | None = None
    ) -> dict[str, np.ndarray]:
        """The op's arrays and the output's cotangent, by name."""
        rng = np.random.default_rng(0)
        shapes: dict[str, tuple[int, ...]] = {
            "query": (BATCH, self.length, HEADS, head_size),
            "key": (BATCH, self.keys, self.kv_heads, head_size),
            "value": (BATCH, self.keys, self.kv_heads, head_size),
            "cotangent": (BATCH, self.length, HEADS, head_size),
            "bias": (BATCH if axes[0] else 1, HEADS if axes[1] else 1, self.length, self.keys),
        }
        if self.biases:
            shapes |= {"sigmoid_bias": (HEADS,), "key_bias": (BATCH, self.keys)}
        dtypes = {"bias": bias_dtype or dtype, "sigmoid_bias": "float32", "key_bias": "float32"}
        made: dict[str, np.ndarray] = {
            name: rng.standard_normal(shape).astype(jnp.dtype(dtypes.get(name, dtype)))
            for name, shape in shapes.items()
        }
        if self.lengths is not None:
            for name, lengths in zip(("query", "key_value"), self.lengths, strict=True):
                made[f"{name}_seq_lengths"] = np.array(lengths, np.int32)
        return made

    def op(self, op: Callable[..., Any], arrays: dict[str, Any]) -> Any:
        """What an op with this call's options makes of the arrays."""
        return op(**arrays, scale=None, is_causal=self.is_causal, local_window_size=self.window)

    def operands(self, inputs: dict[str, np.ndarray]) -> tuple[Operands, Settings, jax.Array]:
        """The op's arguments as its checks hand them on, and the cotangent."""
        given: dict[str, Any] = dict.fromkeys(("mask", "sigmoid_bias", "key_bias"))
        given |= dict.fromkeys(("query_seq_lengths", "key_value_seq_lengths")) | inputs
        cotangent = jnp.asarray(given.pop("cotangent"))
        return *self.op(check, given), cotangent


CALLS = {
    "plain": Call(),
    "grouped": Call(kv_heads=1, biases=True),
    "lengths": Call(lengths=RAGGED, biases=True),
    "short-lengths": Call(lengths=SHORT),
    "causal": Call(is_causal=True),
    "causal-lengths": Call(is_causal=True, lengths=RAGGED, length=200),
    "window": Call(window=(20, 31), keys=400),
    "window-left": Call(window=(3, 2**30), length=300, keys=136, lengths=((300, 140), (136, 71))),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))


def kernels_of(
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    axes: tuple[int, int] = (0, 1),
    head_size: int = 64,
    *,
    dtype: str = "bfloat16",
    bias_dtype: str = "bfloat16",
    compiles: bool = False,
    capability: int = 90,
    **changes: Any,
) -> set[str]:
    """The kernels of a backward pass; with compiles, compiled. Changes are of the settings."""
    names: list[str] = []
    original = launch.call

    def spy(kernel, *arguments, **options):
        names.append(kernel.__name__)
        return original(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "call", spy)
    inputs = call.inputs(dtype, head_size, axes, bias_dtype)
    operands, settings, cotangent = call.operands(inputs)
    settings = replace(settings, **changes)

    def gradient(operands: Operands, cotangent: jax.Array):
        if compiles:
            return launch.bias_gradient(operands, settings, cotangent)
        return launch.backward(operands, settings, cotangent)

    with compile_for(capability):
        traced = jax.jit(gradient).trace(operands, cotangent)
        if compiles:
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert text.count("triton_kernel_call") == len(names)
    return set(names)


@axes
@calls
@head_sizes
def test_the_gradient_of_a_16_bit_bias_is_the_hopper_kernels(
    head_size: int, call: Call, axes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    names = kernels_of(call, monkeypatch, axes, head_size, deterministic=True)
    assert HOPPER in names
    assert PORTABLE not in names


VARIANTS: dict[str, tuple[str, tuple[str, str], str, dict[str, Any]]] = {
    "plain": ("plain", ("bfloat16", "bfloat16"), "NTS", {}),
    "grouped": ("grouped", ("bfloat16", "float16"), "TS", {}),
    "lengths": ("lengths", ("float16", "bfloat16"), "BTS", {}),
    "causal-lengths": ("causal-lengths", ("bfloat16", "bfloat16"), "BNTS", {}),
    "window-partial": (
        "window", ("float16", "float16"), "NTS", {"result_dtype": np.dtype("float32")},
    ),
}  # fmt: skip


@in_turn("variant", VARIANTS, head_size=HEAD_SIZES)
def test_every_variant_compiles(
    head_size: int,
    variant: tuple[str, tuple[str, str], str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
):
    name, dtypes, axes, changes = variant
    call = CALLS[name]
    names = kernels_of(
        call, monkeypatch, AXES[axes], head_size, dtype=dtypes[0], bias_dtype=dtypes[1],
        compiles=True, **changes,
    )  # fmt: skip
    assert names == {HOPPER}


@pytest.mark.parametrize(
    ("call", "options"),
    [
        (Call(), {"bias_dtype": "float32"}),
        (Call(), {"dtype": "float32"}),
        (Call(keys=196), {}),
        (Call(), {"head_size": 32}),
        (Call(), {"capability": 80}),
    ],
    ids=["float32-bias", "float32", "S-not-8", "H32", "sm_80"],
)
def test_other_gradients_are_the_portable_kernels(
    call: Call, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    names = kernels_of(call, monkeypatch, **options)
    assert PORTABLE in names
    assert HOPPER not in names


@pytest.mark.parametrize("named", ["", "forward"])
def test_the_variable_turns_the_kernel_off(named: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(hopper_choice.VARIABLE, named)
    assert PORTABLE in kernels_of(Call(), monkeypatch)


def test_explain_tells_the_kernel():
    x = jax.ShapeDtypeStruct((2, 304, 4, 64), jnp.bfloat16)
    with compile_for(90):
        for dtype, name in (("bfloat16", "hopper bias_gradient"), ("float32", "bias_gradient")):
            bias = jax.ShapeDtypeStruct((4, 304, 304), dtype)
            assert sigjax.explain(x, x, x, bias).kernels[-1][0] == name


@in_turn("call", CALLS, axes=AXES.values())
@pytest.mark.parametrize(("tile", "programs"), [("deep", 1), ("small", 3), ("held", 2)])
def test_the_emulated_gradient_is_that_of_the_definition_whatever_padding_holds(
    tile: str, programs: int, call: Call, axes: tuple[int, int]
):
    operands, settings, cotangent = call.operands(call.inputs("float32", 64, axes))
    assert operands.bias is not None
    want = definition.gradients(operands, settings, cotangent, ["bias"])["bias"]
    got = emulated_hopper.bias_gradient(operands, settings, cotangent, TILES[tile], programs)
    # Float32 sums in another order.
    largest = float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1, largest))
    rows = reference.valid_queries(operands)[:, :, None, None]
    columns = reference.valid_keys(operands)[:, :, None, None]
    # What nobody contributes to: of a bias that all share, past the longest alone.
    takes = jnp.broadcast_to(
        reference.pairs(operands, settings), (BATCH, HEADS, call.length, call.keys)
    )
    shared = tuple(axis for axis in (0, 1) if operands.bias.shape[axis] == 1)
    taken = takes.any(shared, keepdims=True)
    dirty = operands._replace(
        query=jnp.where(rows, operands.query, jnp.nan),
        key=jnp.where(columns, operands.key, jnp.inf),
        value=jnp.where(columns, operands.value, jnp.nan),
        bias=jnp.where(taken, operands.bias, jnp.nan),
    )
    poisoned = emulated_hopper.bias_gradient(
        dirty, settings, jnp.where(rows, cotangent, -jnp.inf), TILES[tile], programs
    )
    assert jnp.array_equal(poisoned, got)
    assert not jnp.where(taken, 0, poisoned).any()


LONG = {
    "long": Call(length=1000, keys=1048, biases=True),
    "long-ragged": Call(length=1000, keys=1048, lengths=((1000, 333), (71, 1048)), kv_heads=1),
    "long-causal": Call(length=1048, keys=1048, is_causal=True),
    "long-window": Call(length=1048, keys=1048, window=(130, 70)),
}


# Each call with two of the four biases, one of either dtype: a kernel of its own every time.
RULE_CASES = [
    pytest.param(call, axes, ("bfloat16", "float16")[j // 2], id=f"{name}-{label}")
    for i, (name, call) in enumerate((CALLS | LONG).items())
    for j, (label, axes) in enumerate(AXES.items())
    if (i + j) % 2 == 0
]


@pytest.mark.gpu
@pytest.mark.parametrize(("call", "axes", "dtype"), RULE_CASES)
@head_sizes
def test_the_gradient_keeps_the_tolerance_rule(
    head_size: int, call: Call, axes: tuple[int, int], dtype: str
):
    inputs = call.inputs(dtype, head_size, axes)
    operands, settings, _ = call.operands(inputs)
    assert hopper_choice.serves_bias_gradient(operands, settings)
    triton = partial(sigmoid_attention, implementation="triton")
    got = {"bias": gradient_of(call, triton, inputs)}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        plain = {"bias": gradient_of(call, numerics.plain, inputs)}
        with jax.enable_x64(True):
            exact = exact_gradient(call, inputs)
    assert numerics.violations(got, exact, plain) == []


@pytest.mark.gpu
@pytest.mark.parametrize("call", LONG.values(), ids=list(LONG))
@head_sizes
def test_the_gradient_has_the_same_bits_in_every_run(head_size: int, call: Call):
    operands, settings, cotangent = call.operands(call.inputs("bfloat16", head_size, (0, 0)))
    run = jax.jit(partial(launch.bias_gradient, operands, settings))
    first = run(cotangent)
    assert all(jnp.array_equal(run(cotangent), first) for _ in range(100))


@pytest.mark.gpu
@pytest.mark.parametrize("call", LONG.values(), ids=list(LONG))
@head_sizes
def test_partial_sums_round_to_the_gradient(head_size: int, call: Call):
    operands, settings, cotangent = call.operands(call.inputs("bfloat16", head_size, (0, 1)))
    wide = replace(settings, result_dtype=np.dtype("float32"))
    partial_sums = launch.bias_gradient(operands, wide, cotangent)
    gradient = launch.bias_gradient(operands, settings, cotangent)
    assert partial_sums.dtype == jnp.float32
    assert jnp.array_equal(partial_sums.astype(gradient.dtype), gradient)


@pytest.mark.gpu
@head_sizes
def test_a_nan_stays_with_its_query_and_padding_changes_no_bit(head_size: int):
    call = LONG["long-ragged"]
    operands, settings, cotangent = call.operands(call.inputs("bfloat16", head_size, (1, 1)))
    clean = launch.bias_gradient(operands, settings, cotangent)
    with_nan = operands._replace(query=operands.query.at[0, 100, 1].set(jnp.nan))
    found = jnp.isnan(launch.bias_gradient(with_nan, settings, cotangent))
    assert found[0, 1, 100, :71].all()
    # The padding beside the last of 71 keys shares a reciprocal with it.
    assert not jnp.delete(found.reshape(-1, found.shape[3]), 1000 + 100, axis=0).any()
    assert not found[0, 1, 100, 72:].any()
    rows, columns = reference.valid_queries(operands), reference.valid_keys(operands)
    pairs = rows[:, None, :, None] & columns[:, None, None, :]
    rows, columns = rows[:, :, None, None], columns[:, :, None, None]
    dirty = operands._replace(
        query=jnp.where(rows, operands.query, jnp.nan),
        key=jnp.where(columns, operands.key, jnp.nan),
        value=jnp.where(columns, operands.value, jnp.inf),
        bias=jnp.where(pairs, operands.bias, jnp.nan),  # pyrefly: ignore[bad-argument-type]
    )
    got = launch.bias_gradient(dirty, settings, jnp.where(rows, cotangent, jnp.nan))
    assert jnp.array_equal(got, clean)
    assert not jnp.where(pairs, 0, got).any()


def exact_gradient(call: Call, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The bias's gradient in float64, and the sum of the absolute values of what it sums."""
    wide = {
        name: x if x.dtype == np.int32 else x.astype(np.float64) for name, x in inputs.items()
    }  # fmt: skip
    bias = wide["bias"]
    wide["bias"] = np.broadcast_to(bias, (BATCH, HEADS, *bias.shape[2:]))
    of_pairs = gradient_of(call, numerics.plain, wide)
    shared = tuple(axis for axis in (0, 1) if bias.shape[axis] == 1)
    return {
        "bias": of_pairs.sum(shared, keepdims=True),
        "bias_magnitude": np.abs(of_pairs).sum(shared, keepdims=True),
    }


def gradient_of(
    call: Call, op: Callable[..., jax.Array], inputs: dict[str, np.ndarray]
) -> np.ndarray:
    """The op's gradient of the bias."""
    arrays = {name: jnp.asarray(x) for name, x in inputs.items()}
    cotangent, bias = arrays.pop("cotangent"), arrays.pop("bias")
    _, pullback = jax.vjp(lambda bias: call.op(op, arrays | {"bias": bias}), bias)
    return np.asarray(pullback(cotangent)[0])
