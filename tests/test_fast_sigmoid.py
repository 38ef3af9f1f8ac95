"""fast_sigmoid: the hardware's tanh in the Hopper forward kernel, and nowhere else."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax_triton import triton_lib

import sigjax
from benchmarks.jax_contenders import ATTENTIONS
from sigjax import attention_slot
from sigjax.choice import compile_for
from sigjax.kernels import (
    backward,
    forward,
    hopper_backward,
    hopper_choice,
    hopper_forward,
    query_sums,
)
from tests.in_turn import HEAD_SIZES, in_turn

TANH = "tanh.approx.f32"
FORWARD, BACKWARD = "hopper_forward_kernel", "hopper_backward_kernel"
KERNELS: tuple[Any, ...] = (
    hopper_forward.hopper_forward_kernel,
    hopper_backward.hopper_backward_kernel,
    query_sums.query_sums_kernel,
    forward.forward_kernel,
    backward.query_gradient_kernel,
    backward.key_value_gradient_kernel,
)
# What a weight may be off by, 5.3 %, and what rounds weights and outputs to bfloat16.
ERROR = 6e-2


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both Hopper kernels serve what they can, as by default."""
    monkeypatch.delenv(hopper_choice.VARIABLE, raising=False)


@pytest.fixture
def binaries(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Grows by the PTX of every kernel that is lowered, by its name."""
    binaries: dict[str, str] = {}
    make = triton_lib.triton_kernel_call_lib.TritonKernel

    def spy(name: str, *arguments: Any) -> Any:
        binaries[name] = next(x for x in arguments if isinstance(x, str) and ".version" in x)
        return make(name, *arguments)

    monkeypatch.setattr(triton_lib.triton_kernel_call_lib, "TritonKernel", spy)
    for kernel in KERNELS:  # jax-triton keeps what it compiled
        monkeypatch.setattr(kernel, "_jT_kernel_cache", {}, raising=False)
    return binaries


def shape(*sizes: int, dtype: str = "bfloat16") -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)


def loss(query: Any, key: Any, *, implementation: Any = "triton", **options: Any) -> jax.Array:
    output = sigjax.sigmoid_attention(query, key, key, implementation=implementation, **options)
    return output.astype(jnp.float32).sum()


both = partial(jax.value_and_grad, argnums=(0, 1))


def lower(function: Any, *arrays: Any, capability: int = 90, **named: Any) -> str:
    """The lowered text for a GPU that this host does not have."""
    with compile_for(capability):
        traced = jax.jit(function).trace(*arrays, **named)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


LENGTHS = {
    "query_seq_lengths": shape(2, dtype="int32"),
    "key_value_seq_lengths": shape(2, dtype="int32"),
}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dense": ("bfloat16", {}, {}),
    "causal": ("bfloat16", {}, {"is_causal": True}),
    "lengths": ("bfloat16", LENGTHS, {}),
    "key_bias": ("bfloat16", {"key_bias": shape(2, 200, dtype="float32")}, {}),
    "float16": ("float16", {}, {}),
    "float16-all": (
        "float16",
        {**LENGTHS, "key_bias": shape(2, 200, dtype="float32")},
        {"is_causal": True},
    ),
}


@in_turn("variant", VARIANTS, head_size=HEAD_SIZES)
def test_the_hopper_forward_kernel_takes_the_tanh_of_the_hardware(
    head_size: int, variant: tuple[str, dict, dict], binaries: dict[str, str]
):
    dtype, arrays, options = variant
    query, key = (shape(2, length, 2, head_size, dtype=dtype) for length in (300, 200))
    lower(partial(loss, fast_sigmoid=True, **options), query, key, **arrays)
    assert list(binaries) == [FORWARD]
    assert TANH in binaries[FORWARD]
    assert "ex2.approx" not in binaries[FORWARD]


@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_the_default_is_exact(head_size: int, binaries: dict[str, str]):
    x = shape(2, 300, 2, head_size)
    lower(loss, x, x)
    assert TANH not in binaries[FORWARD]


@pytest.mark.parametrize("deterministic", [False, True], ids=["hopper", "portable"])
def test_gradients_are_exact(deterministic: bool, binaries: dict[str, str]):
    x = shape(2, 300, 2, 64)
    options: dict[str, Any] = {"fast_sigmoid": True, "deterministic": deterministic}
    lower(both(partial(loss, **options)), x, x)
    others = {BACKWARD, "query_sums_kernel"}
    if deterministic:
        others = {"key_value_gradient_kernel", "query_gradient_kernel"}
    assert set(binaries) == {FORWARD, *others}
    assert not any(TANH in binaries[name] for name in others)


def test_blocks_of_a_sequence_over_devices_take_it_too(binaries: dict[str, str]):
    mesh = jax.make_mesh((1,), ("s",))
    op = partial(
        sigjax.context_parallel_attention,
        mesh=mesh,
        axis_name="s",
        implementation="triton",
        fast_sigmoid=True,
    )
    x = shape(1, 256, 2, 64)
    lower(op, x, x, x)
    assert TANH in binaries[FORWARD]


def test_the_fast_contender_of_the_benchmark_takes_it_and_the_other_does_not(
    binaries: dict[str, str],
):
    x = shape(2, 300, 2, 64)  # as of the tests above: the same kernels
    for name in ("sigjax", "sigjax_fast"):
        lower(lambda x, attention=ATTENTIONS[name]: attention(x, x, x, None), x)
        assert (TANH in binaries.pop(FORWARD)) == (name == "sigjax_fast")


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size"),
    [(80, "bfloat16", 64), (90, "float32", 64), (90, "bfloat16", 96)],
    ids=["sm_80", "float32", "H96"],
)
def test_portable_kernels_are_the_same_with_and_without(
    capability: int, dtype: str, head_size: int, binaries: dict[str, str]
):
    x = shape(2, 100, 2, head_size, dtype=dtype)
    exact, fast = (
        lower(both(partial(loss, fast_sigmoid=fast)), x, x, capability=capability)
        for fast in (False, True)
    )
    assert fast == exact
    assert FORWARD not in binaries


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_xla_gives_the_same_bits_with_and_without(dtype: str):
    query, key = (
        jnp.asarray(np.random.default_rng(seed).normal(size=(2, 19, 2, 16)), dtype)
        for seed in range(2)
    )
    exact, fast = (
        both(partial(loss, implementation="xla", fast_sigmoid=fast))(query, key)
        for fast in (False, True)
    )
    jax.tree.map(np.testing.assert_array_equal, fast, exact)


@pytest.mark.parametrize("fast", [False, True])
def test_modules_pass_it_on(fast: bool, monkeypatch: pytest.MonkeyPatch):
    given: list[bool] = []

    def spy(query: jax.Array, *_: Any, fast_sigmoid: bool, **__: Any) -> jax.Array:
        given.append(fast_sigmoid)
        return query

    monkeypatch.setattr(attention_slot, "sigmoid_attention", spy)
    x = jnp.ones((2, 5, 24))
    sigjax.SigmoidAttention(4, 24, fast_sigmoid=fast, rngs=nnx.Rngs(0))(x)
    slot = partial(sigjax.attention_fn, fast_sigmoid=fast)
    nnx.MultiHeadAttention(4, 24, attention_fn=slot, decode=False, rngs=nnx.Rngs(0))(x)
    assert given == [fast, fast]


def test_a_module_refuses_what_is_no_bool_when_it_is_made():
    wrong: Any = "yes"
    with pytest.raises(TypeError, match="fast_sigmoid must be a Python bool, got str"):
        sigjax.SigmoidAttention(4, 24, fast_sigmoid=wrong, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("capability", "options", "note"),
    [
        (90, {}, "fast_sigmoid: the hardware's tanh in the forward pass, exact gradients"),
        (80, {}, "no effect: the portable forward kernel computes the exact sigmoid"),
        (90, {"bias": shape(2, 4, 300, 300)}, "no effect: the portable forward kernel computes"),
        (90, {"implementation": "xla"}, 'no effect: "xla" computes the exact sigmoid'),
    ],
    ids=["sm_90", "sm_80", "bias", "xla"],
)
def test_explain_says_whether_it_takes_effect(capability: int, options: dict, note: str):
    x = shape(2, 300, 4, 64)
    with compile_for(capability):
        explanation = sigjax.explain(x, x, x, fast_sigmoid=True, **options)
        silent = sigjax.explain(x, x, x, **options)
    (said,) = explanation.notes
    assert note in said
    assert said in str(explanation)
    assert ("weights='tanh'" in str(explanation)) == ("no effect" not in said)
    assert silent.notes == ()
    assert "fast_sigmoid" not in str(silent)
    assert "weights='tanh'" not in str(silent)


def normal(*sizes: int, dtype: str, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), sizes, dtype)


GPU_VARIANTS = pytest.mark.parametrize(
    ("head_size", "dtype"),
    [(head_size, dtype) for head_size in (64, 128) for dtype in ("bfloat16", "float16")],
)
op = partial(sigjax.sigmoid_attention, implementation="triton")
fast_op = partial(op, fast_sigmoid=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"biases": True}],
    ids=["full", "causal", "biases"],
)
@pytest.mark.parametrize("length", [333, 16384])
@GPU_VARIANTS
def test_outputs_are_within_the_documented_error(
    head_size: int, dtype: str, length: int, options: dict
):
    options = dict(options)
    if options.pop("biases", False):
        options["sigmoid_bias"] = normal(2, dtype="float32", seed=3) - np.log(length)
        options["key_bias"] = normal(1, length, dtype="float32", seed=4)
    rows = 130 if not options else min(length, 4096)
    query = normal(1, rows, 2, head_size, dtype=dtype, seed=0)
    key, value = (normal(1, length, 2, head_size, dtype=dtype, seed=seed) for seed in (1, 2))
    weights = sigjax.attention_weights(query, key, **options)
    values = value.astype(jnp.float32)
    exact, magnitude = (
        jnp.einsum("bnts,bsnh->btnh", weights, x, precision="highest")
        for x in (values, jnp.abs(values))
    )
    fast = fast_op(query, key, value, **options)
    assert not jnp.array_equal(fast, op(query, key, value, **options))
    error = jnp.abs(fast.astype(jnp.float32) - exact)
    assert bool((error <= ERROR * magnitude).all()), float((error / magnitude).max())


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@GPU_VARIANTS
def test_a_nan_stays_in_its_row_and_padding_reaches_nothing(
    head_size: int, dtype: str, is_causal: bool
):
    query, key, value = (normal(2, 333, 2, head_size, dtype=dtype, seed=seed) for seed in range(3))
    lengths = {
        "query_seq_lengths": jnp.array([333, 190]),
        "key_value_seq_lengths": jnp.array([333, 190]),
    }
    call = partial(fast_op, is_causal=is_causal, **lengths)
    clean = call(query, key, value)
    assert bool(jnp.isfinite(clean).all())
    assert bool((clean[1, 190:] == 0).all())
    # What padding holds changes no bit.
    poisoned = (x.at[1, 190:].set(jnp.nan) for x in (query, key, value))
    assert jnp.array_equal(call(*poisoned), clean)
    # A NaN in a query is in all of its own output and nowhere else.
    output = call(query.at[0, 100, 1].set(jnp.nan), key, value)
    assert bool(jnp.isnan(output[0, 100, 1]).all())
    assert int(jnp.isnan(output).sum()) == head_size
    assert jnp.array_equal(jnp.where(jnp.isnan(output), clean, output), clean)


@pytest.mark.gpu
@GPU_VARIANTS
def test_a_masked_pair_has_a_weight_of_exactly_0(head_size: int, dtype: str):
    query, key, value = (normal(1, 333, 2, head_size, dtype=dtype, seed=seed) for seed in range(3))
    largest = float(jnp.finfo(dtype).max)
    output, other = (
        fast_op(query, key, value.at[:, 200:].set(future), is_causal=True)
        for future in (0.0, largest)
    )
    assert jnp.array_equal(output[:, :200], other[:, :200])


@pytest.mark.gpu
@GPU_VARIANTS
def test_gradients_have_the_same_bits_with_and_without(head_size: int, dtype: str):
    query, key = (normal(2, 333, 2, head_size, dtype=dtype, seed=seed) for seed in range(2))
    exact, fast = (
        jax.grad(partial(loss, deterministic=True, fast_sigmoid=fast), (0, 1))(query, key)
        for fast in (False, True)
    )
    assert all(jnp.array_equal(x, y) for x, y in zip(fast, exact, strict=True))
