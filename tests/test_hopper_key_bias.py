"""A bias without an axis of queries in the Hopper kernels, beside key_bias or alone."""

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
from sigjax.kernels import hopper_choice, hopper_launch, hopper_matrices, launch
from sigjax.kernels.hopper_forward import hopper_forward_kernel
from sigjax.kernels.tiles import ForwardTile, KeyBiasPlace, hopper_forward_tile
from sigjax.operands import Operands, Settings
from tests import definition, emulated_hopper, ptxas
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
    return sorted(set(names) - {"segment_kernel", "query_sums_kernel"})


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


COMPILED: dict[str, tuple[Call, str, str, bool]] = {
    "both": (CALLS["key-bias"], "bfloat16", "BNS", False),
    "float16": (CALLS["lengths"], "float16", "NS", False),
    "window": (CALLS["window"], "bfloat16", "BS", False),
    "segments": (CALLS["segments"], "float16", "S", False),
    "fast": (CALLS["plain"], "bfloat16", "NS", True),
}


@in_turn("case", COMPILED, head_size=HEAD_SIZES)
def test_the_kernels_of_a_bias_per_key_compile(
    case: tuple[Call, str, str, bool], head_size: int, monkeypatch: pytest.MonkeyPatch
):
    call, dtype, axes, fast = case
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


PLACES: tuple[KeyBiasPlace, ...] = ("scores", "logits")
places = pytest.mark.parametrize("place", PLACES)


def tile_of(operands: Operands, settings: Settings, place: KeyBiasPlace) -> ForwardTile:
    """The table's tile, its adaptive weights of any number of keys, with a bias in a place."""
    tile = hopper_forward_tile(operands.query.shape[3], fast_sigmoid=settings.fast_sigmoid)
    if operands.query_segments is not None:
        tile = tile.exact()
    return replace(tile, few=0, few_in_window=0, key_bias=place)


def emulated(
    operands: Operands, settings: Settings, place: KeyBiasPlace
) -> tuple[jax.Array, jax.Array]:
    """The output of the kernel's source and that of the definition, of bfloat16 in float32."""
    settings = replace(settings, result_dtype=np.dtype("float32"))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, operands)
    got = emulated_hopper.forward(operands, settings, tile_of(operands, settings, place))
    return got, definition.attention(wide, settings)


@places
@in_turn("call", CALLS, head_size=HEAD_SIZES, axes=AXES.values(), fast=(False, False, False, True))
def test_emulated_outputs_are_those_of_the_definition(
    place: KeyBiasPlace, head_size: int, call: Call, axes: tuple[int, int], fast: bool
):
    operands, settings, _ = operands_of(call, "bfloat16", head_size, axes)
    # Of a small scale all weights are small, of a large one they are not; the last three keep a
    # bias in the logits, wherever it should be.
    for scale in (0.01, 0.7, *((-0.5, 0.0, 2.0**-40) if place == "scores" else ())):
        settings = replace(settings, scale=scale, fast_sigmoid=fast)
        got, want = emulated(operands, settings, place)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize(
    ("scale", "head_size", "place"),
    [
        (scale, head_size, PLACES[(i + j) % 2])
        for i, scale in enumerate((0.01, 1.0, -0.5))
        for j, head_size in enumerate((64, 128))
    ],
)
def test_an_infinite_bias_is_a_weight_of_0_or_1_and_nan_stays_nan(
    scale: float, head_size: int, place: KeyBiasPlace
):
    operands, settings, _ = operands_of(Call(key_bias=True), "bfloat16", head_size, AXES["BS"])
    settings = replace(settings, scale=scale)
    assert operands.key_bias is not None
    # The first block decides how adaptive weights are computed.
    few = operands.key_bias.at[0, jnp.array([0, 7, 150])].set(-jnp.inf)
    for some in (few, few.at[0, jnp.array([3, 199])].set(jnp.inf)):
        got, want = emulated(operands._replace(key_bias=some), settings, place)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-5)
    for infinite, expected in ((-jnp.inf, 0), (jnp.inf, 1)):
        one = operands._replace(key_bias=operands.key_bias.at[0].set(infinite))
        got, want = emulated(one, settings, place)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-5)
        assert expected or not got[0].any()
    got, _ = emulated(
        operands._replace(key_bias=operands.key_bias.at[0, 130].set(jnp.nan)), settings, place
    )
    assert jnp.isnan(got[0]).all()
    assert not jnp.isnan(got[1]).any()


@places
@head_sizes
def test_a_bias_of_all_plus_infinity_lets_no_padding_in(head_size: int, place: KeyBiasPlace):
    """With a negative scale its quotient is -inf, which would stand for a pair without a part."""
    operands, settings, _ = operands_of(CALLS["lengths-key-bias"], "bfloat16", head_size, (1, 0))
    operands = operands._replace(key_bias=jnp.full((BATCH, KEYS), jnp.inf))
    for scale in (0.3, -0.3):
        got, want = emulated(operands, replace(settings, scale=scale), place)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-5)


@places
@head_sizes
def test_what_a_bias_holds_past_the_length_changes_no_emulated_bit(
    head_size: int, place: KeyBiasPlace
):
    operands, settings, _ = operands_of(CALLS["lengths-key-bias"], "bfloat16", head_size, (1, 1))
    columns = reference.valid_keys(operands)
    assert operands.bias is not None
    assert operands.key_bias is not None
    for poison in (jnp.nan, jnp.inf):
        dirty = operands._replace(
            bias=jnp.where(columns[:, None, None], operands.bias, poison),
            key_bias=jnp.where(columns, operands.key_bias, poison),
        )
        for scale in (0.01, 1.0):
            settings = replace(settings, scale=scale)
            got, want = (emulated(x, settings, place)[0] for x in (dirty, operands))
            np.testing.assert_array_equal(got, want)


def test_scores_begin_with_a_bias_per_key_where_they_can():
    def begin(scale: float = 0.1, bias: Any = None, **tile: Any) -> bool:
        operands, settings, _ = operands_of(Call(), "bfloat16", 64, AXES["NS"])
        return hopper_matrices.scores_begin_with_bias_of_keys(
            operands._replace(bias=bias), replace(settings, scale=scale),
            replace(hopper_forward_tile(64), **tile),
        )  # fmt: skip

    assert begin()
    assert begin(weights="pair")
    assert begin(weights="tanh")
    assert not begin(key_bias="logits")
    # Such a quotient has no sign, the other one, or no end.
    assert not any(begin(scale) for scale in (0.0, -0.1, 2.0**-40, 2.0**40, float("nan")))
    # They begin with one bias.
    assert not begin(bias=jnp.zeros((1, 1, LENGTH, KEYS), jnp.bfloat16))


def test_each_pair_of_keys_comes_twice_for_the_scores():
    operands, settings, _ = operands_of(Call(), "bfloat16", 64, AXES["NS"])
    settings, tile = replace(settings, scale=0.25), hopper_forward_tile(64)
    assert operands.bias is not None
    of_keys = hopper_launch._key_bias_of_blocks(operands, settings, tile, in_scores=True)
    assert of_keys is not None
    assert of_keys.shape == (1, HEADS, 2 * 256)
    quads = of_keys.reshape(HEADS, 128, 2, 2)
    bias = np.asarray(operands.bias, np.float32)[0, :, 0] * 4
    np.testing.assert_array_equal(quads[:, :100, 0].reshape(HEADS, KEYS), bias)
    np.testing.assert_array_equal(quads[:, :, 1], quads[:, :, 0])
    assert not quads[:, 100:].any()


@in_turn(
    "name", {x: x for x in ("lengths", "plain", "fast", "float16", "short")}, head_size=HEAD_SIZES
)
def test_scores_begin_with_what_is_loaded_and_no_register_spills(head_size: int, name: str):
    keys = 600 if name == "short" else 2048
    dtype = "float16" if name == "float16" else "bfloat16"
    query: Any = jax.ShapeDtypeStruct((2, keys, 2, head_size), dtype)
    key_bias: Any = jax.ShapeDtypeStruct((2, keys), "float32")
    operands = Operands(query, query, query, key_bias=key_bias)
    if name == "lengths":
        lengths: Any = jax.ShapeDtypeStruct((2,), "int32")
        operands = operands._replace(query_lengths=lengths, key_lengths=lengths)
    settings = Settings(scale=head_size**-0.5, fast_sigmoid=name == "fast")
    assert hopper_launch.forward_tile(operands, settings).weights != "adaptive"
    forward = partial(hopper_launch.forward, settings=settings)
    ptx = ptxas.ptx_of(hopper_forward_kernel, forward, operands)
    assert "ld.global.nc.v4.f32" in ptx
    ptxas.assert_no_spill(ptx)


@axes
@in_turn("call", CALLS, head_size=HEAD_SIZES)
def test_emulated_gradients_are_those_of_the_definition_whatever_padding_holds(
    head_size: int, call: Call, axes: tuple[int, int]
):
    operands, settings, cotangent = operands_of(call, "float32", head_size, axes)
    names = ["query", "key", "value", "bias", *["sigmoid_bias", "key_bias"] * call.key_bias]
    want = definition.gradients(operands, settings, cotangent, names)
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


LONG = Call(keys=2000, key_bias=True)


def long_operands(head_size: int, dtype: str) -> tuple[Operands, Settings]:
    """Of many keys, whose weights are small where the scale is."""
    operands, settings, _ = operands_of(LONG, dtype, head_size, AXES["BS"])
    assert operands.sigmoid_bias is not None
    return operands._replace(sigmoid_bias=operands.sigmoid_bias - 10), settings


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.01, 0.125, 1.0, -0.125])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@head_sizes
def test_outputs_are_near_one_another_wherever_a_bias_comes_in(
    head_size: int, dtype: str, scale: float
):
    operands, settings = long_operands(head_size, dtype)
    settings = replace(settings, scale=scale)
    exact = tile_of(operands, settings, "logits").exact()
    want = hopper_launch.forward(operands, settings, exact).astype(jnp.float32)
    for place in PLACES:
        tile = tile_of(operands, settings, place)
        for weights in (tile, tile.exact()):
            got = hopper_launch.forward(operands, settings, weights).astype(jnp.float32)
            assert jnp.abs(got - want).max() <= 2**-6 * jnp.abs(want).max()


@pytest.mark.gpu
@places
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@head_sizes
def test_an_infinite_bias_is_a_weight_of_exactly_0_or_1(
    head_size: int, dtype: str, place: KeyBiasPlace
):
    operands, settings = long_operands(head_size, dtype)
    assert operands.key_bias is not None
    excluded = jnp.arange(2000) % 3 == 0
    key_bias = jnp.where(excluded, -jnp.inf, operands.key_bias)
    tile = tile_of(operands, settings, place)

    def output(key_bias: jax.Array, value: jax.Array) -> np.ndarray:
        given = operands._replace(key_bias=key_bias, value=value)
        return np.asarray(hopper_launch.forward(given, settings, tile))

    # What weights of 0 meet changes nothing, and alone they give 0.
    large = jnp.where(excluded[:, None, None], 1000, operands.value).astype(dtype)
    np.testing.assert_array_equal(output(key_bias, large), output(key_bias, operands.value))
    assert not output(jnp.full_like(key_bias, -jnp.inf), operands.value).any()
    ones = jnp.ones_like(operands.value)
    taken = jnp.where(jnp.arange(2000) < 1024, jnp.inf, -jnp.inf)
    assert (output(jnp.broadcast_to(taken, key_bias.shape), ones) == 1024).all()
    got = output(key_bias.at[0, 1030].set(jnp.nan), operands.value)
    assert np.isnan(got[0]).all()
    assert not np.isnan(got[1]).any()


@pytest.mark.gpu
@places
@head_sizes
def test_what_a_bias_holds_past_the_length_changes_no_bit(head_size: int, place: KeyBiasPlace):
    call = MORE_CALLS["many-keys-lengths"]
    operands, settings, _ = operands_of(call, "bfloat16", head_size, AXES["BNS"])
    columns = reference.valid_keys(operands)
    assert operands.bias is not None
    assert operands.key_bias is not None
    dirty = operands._replace(
        bias=jnp.where(columns[:, None, None], operands.bias, jnp.nan),
        key_bias=jnp.where(columns, operands.key_bias, jnp.inf),
    )
    for scale in (0.01, 1.0):
        settings = replace(settings, scale=scale)
        tile = tile_of(operands, settings, place)
        got, want = (
            np.asarray(hopper_launch.forward(x, settings, tile)) for x in (dirty, operands)
        )
        np.testing.assert_array_equal(got, want)


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
