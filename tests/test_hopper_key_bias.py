"""A bias without an axis of queries in the Hopper kernels, beside key_bias or alone."""

from collections.abc import Callable
from dataclasses import dataclass
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
from sigjax.operands import Operands, Settings
from tests import emulated_hopper
from tests.in_turn import HEAD_SIZES, in_turn
from tests.interpreted_kernels import packed

BATCH, LENGTH, KEYS, HEADS = 2, 300, 200, 2
FORWARD, BACKWARD = "hopper_forward_kernel", "hopper_backward_kernel"
PORTABLE = ["key_value_gradient_kernel", "query_gradient_kernel"]
AXES = {"BNS": (1, 1), "NS": (0, 1), "BS": (1, 0), "S": (0, 0)}  # whether of B, of N
axes = pytest.mark.parametrize("axes", AXES.values(), ids=list(AXES))
head_sizes = pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both Hopper kernels serve what they can, even where they are slower."""
    monkeypatch.setenv(hopper_choice.VARIABLE, "forward,backward,narrow")


@dataclass(frozen=True)
class Call:
    """A call with a bias per key.

    Attributes:
        keys: S.
        kv_heads: K.
        lengths: query lengths, and key lengths; None where all rows are full.
        key_bias: whether key_bias and sigmoid_bias are given too.
        segments: whether rows are packed, with padding between the sequences.
        is_causal: as in the op.
        window: local_window_size.
    """

    keys: int = KEYS
    kv_heads: int = HEADS
    lengths: tuple[tuple[int, int], tuple[int, int]] | None = None
    key_bias: bool = False
    segments: bool = False
    is_causal: bool = False
    window: tuple[int, int] | None = None

    def inputs(self, dtype: str, head_size: int, axes: tuple[int, int]) -> dict[str, np.ndarray]:
        """The op's arrays and the output's cotangent, by name."""
        rng = np.random.default_rng(0)
        shapes: dict[str, tuple[int, ...]] = {
            "query": (BATCH, LENGTH, HEADS, head_size),
            "key": (BATCH, self.keys, self.kv_heads, head_size),
            "value": (BATCH, self.keys, self.kv_heads, head_size),
            "cotangent": (BATCH, LENGTH, HEADS, head_size),
            "bias": (BATCH if axes[0] else 1, HEADS if axes[1] else 1, 1, self.keys),
        }
        if self.key_bias:
            shapes |= {"sigmoid_bias": (HEADS,), "key_bias": (BATCH, self.keys)}
        made: dict[str, np.ndarray] = {
            name: rng.standard_normal(shape).astype(
                np.float32 if name.endswith("_bias") else jnp.dtype(dtype)
            )
            for name, shape in shapes.items()
        }
        if self.lengths is not None:
            for name, lengths in zip(("query", "key_value"), self.lengths, strict=True):
                made[f"{name}_seq_lengths"] = np.array(lengths, np.int32)
        if self.segments:
            for name, size in (("query", LENGTH), ("key_value", self.keys)):
                made[f"{name}_segment_ids"] = np.stack([packed((50, 70, 40), size, 9)] * BATCH)
        return made

    def op(self, op: Callable[..., jax.Array], arrays: dict[str, Any]) -> jax.Array:
        """The output of an op with this call's options."""
        return op(**arrays, scale=None, is_causal=self.is_causal, local_window_size=self.window)


RAGGED = ((300, 77), (131, 200))
CALLS = {
    "plain": Call(),
    "key-bias": Call(key_bias=True),
    "lengths": Call(lengths=RAGGED, is_causal=True),
    "lengths-key-bias": Call(lengths=RAGGED, key_bias=True),
    "window": Call(window=(40, 25), keys=300),
    "segments": Call(segments=True),
    "segments-key-bias": Call(segments=True, key_bias=True, is_causal=True),
}
MORE_CALLS = {  # of few keys no weights are computed adaptively
    "many-keys": Call(keys=2000),
    "many-keys-lengths": Call(keys=2000, lengths=((300, 77), (1999, 1601)), key_bias=True),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))


def kernels_of(
    call: Call, dtype: str, head_size: int, axes: tuple[int, int], monkeypatch: pytest.MonkeyPatch,
    *, compiles: bool = False, fast_sigmoid: bool = False,
) -> list[str]:  # fmt: skip
    """The kernels of a forward and a backward pass on a Hopper GPU; with compiles, compiled."""
    names: list[str] = []
    original = launch.call

    def spy(kernel, *arguments, **options):
        names.append(kernel.__name__)
        return original(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "call", spy)
    operands, settings, cotangent = operands_of(call, dtype, head_size, axes)
    settings = Settings(**vars(settings) | {"fast_sigmoid": fast_sigmoid})

    def both(operands: Operands, cotangent: jax.Array):
        return (
            launch.forward(operands, settings), launch.backward(operands, settings, cotangent)
        )  # fmt: skip

    with compile_for(90):
        traced = jax.jit(both).trace(operands, cotangent)
        if compiles:
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert text.count("triton_kernel_call") == len(names)
    return sorted(set(names) - {"segment_kernel"})


def operands_of(
    call: Call, dtype: str, head_size: int, axes: tuple[int, int]
) -> tuple[Operands, Settings, jax.Array]:
    """The op's arguments as its checks hand them on, and the cotangent."""
    given: dict[str, Any] = dict.fromkeys(("mask", "sigmoid_bias", "key_bias"))
    given |= dict.fromkeys(("query_seq_lengths", "key_value_seq_lengths"))
    given |= call.inputs(dtype, head_size, axes)
    cotangent = jnp.asarray(given.pop("cotangent"))
    operands, settings = call.op(check, given)  # pyrefly: ignore[bad-argument-type]
    return operands, settings, cotangent


@axes
@calls
@head_sizes
def test_a_bias_per_key_is_served(
    head_size: int, call: Call, axes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    assert kernels_of(call, "bfloat16", head_size, axes, monkeypatch) == [BACKWARD, FORWARD]


@pytest.mark.parametrize(
    ("call", "dtype", "axes", "fast"),
    [
        (CALLS["key-bias"], "bfloat16", "BNS", False),
        (CALLS["lengths"], "float16", "NS", False),
        (CALLS["window"], "bfloat16", "BS", False),
        (CALLS["segments"], "float16", "S", False),
        (CALLS["plain"], "bfloat16", "NS", True),
        (MORE_CALLS["many-keys"], "bfloat16", "NS", False),
    ],
    ids=["both", "float16", "window", "segments", "fast", "many-keys"],
)
@head_sizes
def test_the_kernels_of_a_bias_per_key_compile(
    head_size: int, call: Call, dtype: str, axes: str, fast: bool, monkeypatch: pytest.MonkeyPatch
):
    names = kernels_of(
        call, dtype, head_size, AXES[axes], monkeypatch, compiles=True, fast_sigmoid=fast
    )
    assert names == [BACKWARD, FORWARD]


def test_the_gradient_of_grouped_heads_bias_is_the_portable_kernels(
    monkeypatch: pytest.MonkeyPatch,
):
    names = kernels_of(Call(kv_heads=1), "bfloat16", 64, AXES["NS"], monkeypatch)
    assert names == sorted([FORWARD, *PORTABLE])


@pytest.mark.parametrize(
    "shape", [(1, 1, LENGTH, KEYS), (1, 1, LENGTH, 1), (1, 2, 1, 1)], ids=["TS", "T", "N"]
)
def test_other_biases_are_served_by_the_portable_forward_kernel(shape: tuple[int, ...]):
    operands, settings, _ = operands_of(Call(), "bfloat16", 64, AXES["S"])
    with compile_for(90):
        assert hopper_choice.serves("forward", operands, settings)
        other = operands._replace(bias=jnp.zeros(shape))
        assert not hopper_choice.serves("forward", other, settings)


def test_explain_tells_the_hopper_kernels():
    x = jax.ShapeDtypeStruct((2, 300, 4, 64), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((4, 1, 300), jnp.float32)
    with compile_for(90):
        explanation = sigjax.explain(x, x, x, bias)
    assert [name for name, _ in explanation.kernels] == ["hopper forward", "hopper backward"]
    assert explanation.reason is None


@axes
@in_turn("call", CALLS, head_size=HEAD_SIZES)
def test_emulated_gradients_are_those_of_the_definition_whatever_padding_holds(
    head_size: int, call: Call, axes: tuple[int, int]
):
    operands, settings, cotangent = operands_of(call, "float32", head_size, axes)
    names = ["query", "key", "value", "bias", *["sigmoid_bias", "key_bias"] * call.key_bias]
    _, pullback = jax.vjp(
        lambda arrays: reference.attention(operands._replace(**arrays), settings),
        {name: getattr(operands, name) for name in names},
    )
    want = pullback(cotangent)[0]
    got, _ = emulated_hopper.backward(operands, settings, cotangent)
    for name in names:
        # Float32 sums in another order.
        largest = float(jnp.abs(want[name]).max())
        np.testing.assert_allclose(
            getattr(got, name), want[name], rtol=0, atol=2e-5 * max(1, largest), err_msg=name
        )
    if axes[0] and operands.bias is not None:
        columns = reference.valid_keys(operands)[:, None, None, :]
        dirty = operands._replace(bias=jnp.where(columns, operands.bias, jnp.nan))
        poisoned, _ = emulated_hopper.backward(dirty, settings, cotangent)
        for name in names:
            assert jnp.array_equal(getattr(poisoned, name), getattr(got, name)), name


# Each call with two of the four biases, one of either dtype: kernels of its own every time.
RULE_CASES = [
    pytest.param(call, axes, ("bfloat16", "float16")[j // 2], id=f"{name}-{label}")
    for i, (name, call) in enumerate((CALLS | MORE_CALLS).items())
    for j, (label, axes) in enumerate(AXES.items())
    if (i + j) % 2 == 0
]


@pytest.mark.gpu
@pytest.mark.parametrize(("call", "axes", "dtype"), RULE_CASES)
@head_sizes
def test_outputs_and_gradients_keep_the_tolerance_rule(
    head_size: int, call: Call, axes: tuple[int, int], dtype: str
):
    inputs = call.inputs(dtype, head_size, axes)
    dirty = dict(inputs)
    if axes[0] and call.lengths is not None:
        past = np.arange(call.keys) >= np.array(call.lengths[1])[:, None]
        dirty["bias"] = np.where(past[:, None, None], np.nan, inputs["bias"])
        dirty["bias"] = dirty["bias"].astype(inputs["bias"].dtype)
    got = results_of(call, partial(sigmoid_attention, implementation="triton"), dirty)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        plain = results_of(call, numerics.plain, inputs)
        with jax.enable_x64(True):
            exact = exact_results(call, inputs)
    assert numerics.violations(got, exact, plain) == []


def exact_results(call: Call, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Output and gradients in float64, and of a sum over pairs that of the absolute values."""
    wide = {
        name: x if x.dtype == np.int32 else x.astype(np.float64) for name, x in inputs.items()
    }  # fmt: skip
    bias = wide["bias"]
    full = wide | {"bias": np.broadcast_to(bias, (BATCH, HEADS, LENGTH, call.keys))}
    exact = results_of(call, numerics.plain, full)
    of_pairs = exact.pop("bias")
    shared = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
    summed = {"bias": shared, "sigmoid_bias": (0, 2, 3), "key_bias": (1, 2)}
    for name in summed.keys() & inputs.keys():
        keeps = name == "bias"
        exact[name] = of_pairs.sum(summed[name], keepdims=keeps)
        exact[f"{name}_magnitude"] = np.abs(of_pairs).sum(summed[name], keepdims=keeps)
    return exact


def results_of(
    call: Call, op: Callable[..., jax.Array], inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The op's output and gradients by argument name."""
    arrays = {name: jnp.asarray(x) for name, x in inputs.items() if x.dtype != np.int32}
    fixed = {name: jnp.asarray(x) for name, x in inputs.items() if x.dtype == np.int32}
    cotangent = arrays.pop("cotangent")
    output, pullback = jax.vjp(lambda arrays: call.op(op, arrays | fixed), arrays)
    return {"output": np.asarray(output)} | {
        name: np.asarray(x) for name, x in pullback(cotangent)[0].items()
    }
