"""JAX's tests of dot_product_attention, asked of sigmoid attention.

Names and parameters are those of JAX (jax-ml/jax at cec06d1): a user who swaps one op for the
other can look up what still holds. What is compared is ours: float64, and the tolerance rule.

tests/nn_test.py (testDotProductAttention is test_dot_product_attention here, and so on):
    testDotProductAttention, testDotProductAttentionMask,
    testDotProductAttentionFloat64MaskDebugInfs, testDotProductAttentionBiasGradient,
    testDotProductAttention_localWindowSizeWithoutMask
tests/fused_attention_stablehlo_test.py, under their own names:
    test_sdpa_large_head_size, test_jacobian, test_vmap_partial_in_axes, test_vmap_of_vjp,
    test_vmap_of_grad, test_jacobian_with_bias, test_vmap_of_grad_shared_bias,
    test_jacobian_with_mask, test_jacobian_gqa_unequal_seqlen, test_all_batched_vmap,
    test_sdpa_mixed_batching_values, test_bool_mask_only_skips_dbias, test_bias_keeps_dbias,
    test_bool_mask_with_bias_keeps_dbias
    The batching tests there compare shapes; here they compare values, at smaller sizes.
tests/fused_attention_stablehlo_multigpu_test.py, under their own names:
    test_sdpa, test_sdpa_inference, test_sdpa_var_seq, test_sdpa_broadcast_bias_and_dbias,
    test_sdpa_dbias, test_sdpa_sliding_window_length, test_sdpa_packed_layout,
    test_sdpa_grad_sharded_regression_25986, test_sdpa_shard_map_grad_regression_36008
    Sharded over four GPUs there; here on one device, shorter. Only the last two are about
    sharding itself; tests/test_partitioning.py has the rest of it.

Left out:
    return_residual of testDotProductAttention, test_sdpa_residual: the residual is the
        logarithm of softmax's normaliser, and a sigmoid has none.
    test_sdpa_paged_attention: no page tables.
    test_sdpa_mla: value has key's head size; another is refused (tests/test_checks.py).
    test_float_mask_keeps_dbias: a mask is bool, and a float one is refused with a pointer to
        bias (tests/test_checks.py).
    DotProductAttentionF8Test, DotProductAttentionF8BatchingTest: no float8.
    is_bnth of test_sdpa: the layout is [B, T, N, H].
    "the cuDNN call is in the program" of several: that is tests/test_launch.py.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sigjax
from sigjax import numerics
from sigjax.choice import compile_for
from tests.other_process import OtherProcess

type Arrays = Mapping[str, Array]
type Op = Callable[..., Array]
type Call = Callable[[Op, Arrays], Array]
type Results = Callable[[Op, Arrays], Arrays]

OPS: dict[str, Op] = {
    "xla": partial(sigjax.sigmoid_attention, implementation="xla"),
    "triton": partial(sigjax.sigmoid_attention, implementation="triton"),
}

implementations = pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("triton", marks=pytest.mark.gpu)]
)


def of_each_implementation(names: str, *values: Sequence[Any]) -> pytest.MarkDecorator:
    """All combinations for "triton"; for "xla" the first value of the last axis, or the second.

    Which of them goes in turn: each combination is a program to compile.
    """
    *indices, last = (range(len(x)) for x in values)
    params = []
    for places in itertools.product(*indices, last):
        row = [x[place] for x, place in zip(values, places, strict=True)]
        label = "-".join(map(str, row))
        if sum(places) % len(last) == 0:
            params.append(pytest.param(*row, "xla", id=f"{label}-xla"))
        params.append(pytest.param(*row, "triton", marks=pytest.mark.gpu, id=f"{label}-triton"))
    return pytest.mark.parametrize((*names.split(), "implementation"), params)


def draw(dtype: str, **shapes: tuple[int, ...]) -> numerics.Named:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(s).astype(jnp.dtype(dtype)) for name, s in shapes.items()}


def draw_call(
    dtype: str, b: int, t: int, s: int, n: int, k: int, h: int, **more: tuple[int, ...]
) -> numerics.Named:
    """Operands [B, T, N, H] and [B, S, K, H], the output's cotangent, and what else is named."""
    rows, keys = (b, t, n, h), (b, s, k, h)
    return draw(dtype, query=rows, key=keys, value=keys, cotangent=rows, **more)


def stacked(dtype: str) -> numerics.Named:
    """Operands with a mapped axis of 3 in front of [2, 4, 4, 32]."""
    shape = (3, 2, 4, 4, 32)
    return draw(dtype, query=shape, key=shape, value=shape)


def widened(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def assert_keeps_the_rule(
    results: Results,
    inputs: numerics.Named,
    implementation: str,
    reference: Results | None = None,
) -> numerics.Named:
    """What the op gives meets the tolerance rule; reference, where given, says what is meant."""
    meant = partial(reference or results, numerics.plain)
    got = computed(partial(results, OPS[implementation]), inputs)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        # Compiled without optimisation: it takes longer to optimise than to run.
        plain = computed(meant, inputs, xla_backend_optimization_level="0")
        with jax.enable_x64(True):
            wide = {name: widened(x) for name, x in inputs.items()}
            exact = computed(meant, wide, xla_backend_optimization_level="0")
    wrong = numerics.violations(got, exact, plain)
    assert not wrong, "\n".join(wrong)
    return got


def computed(
    function: Callable[[Arrays], Arrays], inputs: numerics.Named, **compiler_options: str
) -> numerics.Named:
    compiled = jax.jit(function, compiler_options=compiler_options)
    results = compiled({name: jnp.asarray(x) for name, x in inputs.items()})
    return {name: np.asarray(x) for name, x in results.items()}


def called(**options: object) -> Call:
    return lambda op, arrays: op(**arrays, **options)


def mapped(**in_axes: int | None) -> Call:
    """Under vmap, over axis 0 of every array but those named."""

    def call(op: Op, arrays: Arrays) -> Array:
        axes = {name: in_axes.get(name, 0) for name in arrays}
        return jax.vmap(lambda arrays: op(**arrays), in_axes=(axes,))(dict(arrays))

    return call


def output_and_gradients(call: Call) -> Results:
    """The output, and the pullback of "cotangent" to every floating array."""

    def results(op: Op, arrays: Arrays) -> Arrays:
        floats, fixed = split(arrays)
        cotangent = floats.pop("cotangent")
        output, pullback = jax.vjp(lambda floats: call(op, {**floats, **fixed}), floats)
        return {"output": output, **pullback(cotangent)[0]}

    return results


def gradients_of_sum(call: Call) -> Results:
    """The output's sum's gradients: the cotangent is one number for all, and never mapped."""

    def results(op: Op, arrays: Arrays) -> Arrays:
        floats, fixed = split(arrays)

        def loss(floats: Arrays) -> Array:
            output = call(op, {**floats, **fixed})
            return output.astype(jnp.promote_types(output.dtype, jnp.float32)).sum()

        return jax.grad(loss)(floats)

    return results


def split(arrays: Arrays) -> tuple[dict[str, Array], dict[str, Array]]:
    fixed = {name: x for name, x in arrays.items() if name.endswith(numerics.FIXED_ARGUMENTS)}
    return {name: x for name, x in arrays.items() if name not in fixed}, fixed


def jacobian(name: str) -> Results:
    """The derivative of every element of the output to every element of the named array."""

    def results(op: Op, arrays: Arrays) -> Arrays:
        others = {other: x for other, x in arrays.items() if other != name}
        return {"jacobian": jax.jacobian(lambda x: op(**{name: x}, **others))(arrays[name])}

    return results


# tests/nn_test.py


@of_each_implementation(
    "group_num use_vmap dtype", (1, 2, 4), (False, True), ("bfloat16", "float16")
)
def test_dot_product_attention(dtype: str, group_num: int, use_vmap: bool, implementation: str):
    inputs = draw_call(dtype, 2, 128, 128, 4, 4 // group_num, 32)
    call = mapped() if use_vmap else called()
    assert_keeps_the_rule(
        output_and_gradients(call), inputs, implementation, output_and_gradients(called())
    )


MASK_MODES = [
    ("bias",),
    ("causal",),
    ("padding",),
    ("custom",),
    ("causal", "padding"),
    ("custom", "padding"),
    ("bias", "causal"),
    ("causal", "sliding_window"),
]


@implementations
@pytest.mark.parametrize("mask_mode", MASK_MODES, ids="-".join)
def test_dot_product_attention_mask(mask_mode: tuple[str, ...], implementation: str):
    bias = {"bias": (1, 4, 128, 128)} if "bias" in mask_mode else {}
    inputs = draw_call("bfloat16", 2, 128, 128, 4, 4, 32, **bias)
    if "padding" in mask_mode:
        inputs["query_seq_lengths"] = np.array([64, 32], np.int32)
        inputs["key_value_seq_lengths"] = np.array([32, 64], np.int32)
    if "custom" in mask_mode:
        inputs["mask"] = np.tril(np.ones((1, 1, 128, 128), bool))
    window = (3, 2) if "sliding_window" in mask_mode else None
    call = called(is_causal="causal" in mask_mode, local_window_size=window)
    assert_keeps_the_rule(output_and_gradients(call), inputs, implementation)


def test_dot_product_attention_float64_mask_debug_infs():
    """In "xla" alone: "triton" takes no float64. A warning would be an error here."""
    with jax.enable_x64(True), jax.debug_infs(True):
        query = jnp.zeros((5, 6, 11), jnp.float64)
        key = jnp.zeros((7, 3, 11), jnp.float64)
        mask = jnp.arange(7) <= 3
        output = sigjax.sigmoid_attention(query, key, key, mask=mask, implementation="xla")
        assert output.dtype == jnp.float64
        assert not output.any()


@of_each_implementation("batch_size use_vmap", (1, 16), (True, False))
def test_dot_product_attention_bias_gradient(batch_size: int, use_vmap: bool, implementation: str):
    x = (batch_size, 128, 4, 32)
    inputs = draw("bfloat16", x=x, bias=(batch_size, 4, 128, 128), cotangent=x)
    inputs["mask"] = np.ones((1, 1, 128), bool)

    def self_attention(use_vmap: bool) -> Results:
        call = mapped(mask=None) if use_vmap else called()

        def output(op: Op, arrays: Arrays) -> Array:
            x, others = arrays["x"], {name: arrays[name] for name in ("bias", "mask")}
            return call(op, {"query": x, "key": x, "value": x, **others})

        return output_and_gradients(output)

    assert_keeps_the_rule(self_attention(use_vmap), inputs, implementation, self_attention(False))


@implementations
def test_dot_product_attention_local_window_size_without_mask(implementation: str):
    inputs = draw_call("float32", 2, 128, 128, 4, 4, 32)
    large, small = (
        assert_keeps_the_rule(
            output_and_gradients(called(local_window_size=window)), inputs, implementation
        )
        for window in ((32, 32), (1, 1))
    )
    assert not np.allclose(large["output"], small["output"])


# tests/fused_attention_stablehlo_test.py


@implementations
def test_sdpa_large_head_size(implementation: str):
    inputs = draw_call("bfloat16", 2, 64, 64, 2, 2, 256)
    call = called(scale=1.0, is_causal=True)
    assert_keeps_the_rule(output_and_gradients(call), inputs, implementation)


SMALL = {"query": (2, 3, 2, 16), "key": (2, 3, 2, 16), "value": (2, 3, 2, 16)}


@implementations
def test_jacobian(implementation: str):
    """The operands are shared, the cotangents mapped."""
    assert_keeps_the_rule(jacobian("query"), draw("float16", **SMALL), implementation)


@implementations
def test_vmap_partial_in_axes(implementation: str):
    inputs = stacked("float16")
    inputs |= {name: inputs[name][0] for name in ("key", "value")}

    def output(op: Op, arrays: Arrays) -> Arrays:
        return {"output": mapped(key=None, value=None)(op, arrays)}

    assert_keeps_the_rule(output, inputs, implementation)


@implementations
def test_vmap_of_vjp(implementation: str):
    shape = (2, 4, 4, 32)
    inputs = draw("float16", query=shape, key=shape, value=shape, cotangents=(5, *shape))

    def pullbacks(op: Op, arrays: Arrays) -> Arrays:
        arrays = dict(arrays)
        cotangents = arrays.pop("cotangents")
        pullback = jax.vjp(lambda arrays: op(**arrays), arrays)[1]
        return jax.vmap(pullback)(cotangents)[0]

    assert_keeps_the_rule(pullbacks, inputs, implementation)


@implementations
def test_vmap_of_grad(implementation: str):
    def gradients(op: Op, arrays: Arrays) -> Arrays:
        return jax.vmap(partial(gradients_of_sum(called()), op))(arrays)

    assert_keeps_the_rule(gradients, stacked("float16"), implementation)


@implementations
def test_jacobian_with_bias(implementation: str):
    inputs = draw("float16", **SMALL, bias=(2, 2, 3, 3))
    assert_keeps_the_rule(jacobian("bias"), inputs, implementation)


@implementations
def test_vmap_of_grad_shared_bias(implementation: str):
    """Every mapped call has a gradient of its own of the bias that all share."""
    inputs = stacked("float16") | draw("float16", bias=(1, 4, 4, 4))

    def gradients(op: Op, arrays: Arrays) -> Arrays:
        axes = {name: None if name == "bias" else 0 for name in arrays}
        return jax.vmap(partial(gradients_of_sum(called()), op), in_axes=(axes,))(dict(arrays))

    assert_keeps_the_rule(gradients, inputs, implementation)


@implementations
def test_jacobian_with_mask(implementation: str):
    inputs = draw("float16", **SMALL) | {"mask": np.tril(np.ones((3, 3), bool))}
    assert_keeps_the_rule(jacobian("query"), inputs, implementation)


@implementations
def test_jacobian_gqa_unequal_seqlen(implementation: str):
    """No two sizes are equal, so that none can take another's place."""
    inputs = draw("float16", query=(2, 3, 4, 16), key=(2, 5, 1, 16), value=(2, 5, 1, 16))
    assert_keeps_the_rule(jacobian("query"), inputs, implementation)


@implementations
def test_all_batched_vmap(implementation: str):
    def output(op: Op, arrays: Arrays) -> Arrays:
        return {"output": mapped()(op, arrays)}

    assert_keeps_the_rule(output, stacked("float16"), implementation)


@implementations
def test_sdpa_mixed_batching_values(implementation: str):
    shape = (2, 64, 4, 64)
    inputs = draw("bfloat16", query=(3, *shape), key=shape, value=shape)

    def output_and_gradient_of_each(op: Op, arrays: Arrays) -> Arrays:
        axes = {"query": 0, "key": None, "value": None}
        gradients = partial(gradients_of_sum(called()), op)
        output = mapped(key=None, value=None)(op, arrays)
        return {"output": output, **jax.vmap(gradients, in_axes=(axes,))(dict(arrays))}

    assert_keeps_the_rule(output_and_gradient_of_each, inputs, implementation)


def kernels_of_gradient(*names: str, **extras: Array) -> int:
    """How many Triton kernels the gradients of the named arrays take."""
    x = jnp.ones((2, 4, 16, 32), jnp.float16)
    arrays = {"query": x, "key": x, "value": x, **extras}

    def gradients(floats: Arrays) -> Arrays:
        others = {name: x for name, x in arrays.items() if name not in floats}
        return gradients_of_sum(called(**others))(OPS["triton"], floats)

    def count(jaxpr: Any) -> int:
        inside = (sum(map(count, jaxprs_in_params(x.params))) for x in jaxpr.eqns)
        return sum(x.primitive.name == "triton_kernel_call" for x in jaxpr.eqns) + sum(inside)

    with compile_for(90):
        traced = jax.make_jaxpr(gradients)({name: arrays[name] for name in names})
    return count(traced.jaxpr)


BIAS = jnp.zeros((1, 16, 4, 4), jnp.float16)
MASK = jnp.tril(jnp.ones((1, 1, 4, 4), bool))
OPERANDS = ("query", "key", "value")


def test_bool_mask_only_skips_dbias():
    assert kernels_of_gradient(*OPERANDS, mask=MASK) == kernels_of_gradient(*OPERANDS)


def test_bias_keeps_dbias():
    assert kernels_of_gradient("bias", bias=BIAS) == kernels_of_gradient(*OPERANDS) + 1


def test_bool_mask_with_bias_keeps_dbias():
    kernels = kernels_of_gradient("bias", bias=BIAS, mask=MASK)
    assert kernels == kernels_of_gradient(*OPERANDS, mask=MASK) + 1


# tests/fused_attention_stablehlo_multigpu_test.py

SDPA = {"b": 2, "t": 128, "s": 128, "n": 4, "k": 4}


@implementations
@pytest.mark.parametrize(
    ("head_dim", "use_mask", "use_bias", "dtype"),
    [  # every pair of values; theirs are drawn at random from the product
        (64, False, True, "float16"),
        (64, True, False, "bfloat16"),
        (128, True, True, "float16"),
        (128, False, False, "float16"),
        (128, True, True, "bfloat16"),
        (64, False, False, "bfloat16"),
    ],
)
def test_sdpa(head_dim: int, use_mask: bool, use_bias: bool, dtype: str, implementation: str):
    logits = (2, 4, 128, 128)
    inputs = draw_call(dtype, **SDPA, h=head_dim, **({"bias": logits} if use_bias else {}))
    if use_mask:
        inputs["mask"] = np.random.default_rng(1).random(logits) < 0.5
    assert_keeps_the_rule(output_and_gradients(called(scale=0.5)), inputs, implementation)


@implementations
def test_sdpa_inference(implementation: str):
    inputs = draw_call("bfloat16", **SDPA, h=64)
    del inputs["cotangent"]

    def output(op: Op, arrays: Arrays) -> Arrays:
        return {"output": op(**arrays, scale=1.0)}

    assert_keeps_the_rule(output, inputs, implementation)


@implementations
def test_sdpa_var_seq(implementation: str):
    inputs = draw_call("bfloat16", **SDPA, h=64)
    lengths = np.array([64, 64], np.int32)
    inputs |= {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    assert_keeps_the_rule(output_and_gradients(called(scale=1.0)), inputs, implementation)


@implementations
@pytest.mark.parametrize("broadcast_dims", [(), (0,), (1,), (0, 1)], ids=str)
def test_sdpa_broadcast_bias_and_dbias(broadcast_dims: tuple[int, ...], implementation: str):
    bias = (1 if 0 in broadcast_dims else 2, 1 if 1 in broadcast_dims else 4, 128, 128)
    inputs = draw_call("bfloat16", **SDPA, h=64, bias=bias)
    assert_keeps_the_rule(output_and_gradients(called(scale=1.0)), inputs, implementation)


@implementations
@pytest.mark.parametrize("batch_size", [1, 16])
def test_sdpa_dbias(batch_size: int, implementation: str):
    """Under vmap and not, the bias of a batch has its true gradient; in cuDNN it was once 0."""
    x, bias = (batch_size, 1, 64, 16, 48), (batch_size, 1, 16, 64, 64)
    inputs = draw("bfloat16", query=x, key=x, value=x, bias=bias, cotangent=x)
    inputs["mask"] = np.ones((1, 1, 64), bool)

    def one_batch(op: Op, arrays: Arrays) -> Array:
        arrays = {name: x if name == "mask" else x[:, 0] for name, x in arrays.items()}
        return op(**arrays)[:, None]

    assert_keeps_the_rule(
        output_and_gradients(mapped(mask=None)),
        inputs,
        implementation,
        output_and_gradients(one_batch),
    )


@implementations
def test_sdpa_sliding_window_length(implementation: str):
    """Their length of 64 counts the query's own position."""
    inputs = draw_call("bfloat16", 2, 256, 256, 4, 4, 64)
    call = called(scale=1.0, is_causal=True, local_window_size=(63, 0))
    assert_keeps_the_rule(output_and_gradients(call), inputs, implementation)


# Three segments; three with padding inside and between; two; one.
PACKED = (
    [1] * 43 + [2] * 42 + [3] * 43,
    [1] * 38 + [2] * 46 + [0] * 3 + [3] * 41,
    [1] * 48 + [2] * 47 + [0] * 33,
    [1] * 100 + [0] * 28,
)


@of_each_implementation("num_kv_heads mask_type", (4, 2), ("NO_MASK", "PADDING_CAUSAL"))
def test_sdpa_packed_layout(num_kv_heads: int, mask_type: str, implementation: str):
    inputs = draw_call("bfloat16", 4, 128, 128, 4, num_kv_heads, 64)
    ids = np.array(PACKED, np.int32)
    inputs |= {"query_segment_ids": ids, "key_value_segment_ids": ids}
    call = called(scale=0.1, is_causal=mask_type == "PADDING_CAUSAL")
    assert_keeps_the_rule(output_and_gradients(call), inputs, implementation)


def test_sdpa_grad_sharded_regression_25986(eight_devices: OtherProcess):
    problem = eight_devices.check(__name__, "gradient_of_a_sum_is_sharded")
    assert problem is None, problem


def gradient_of_a_sum_is_sharded() -> None:
    """The cotangent of a sum is inferred as replicated beside a sharded query."""
    inputs = draw_call("bfloat16", 2, 128, 128, 2, 2, 64)
    del inputs["cotangent"]
    mesh = jax.make_mesh((2,), ("dp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    sharding = NamedSharding(mesh, P("dp"))
    gradients = gradients_of_sum(called(scale=0.5))

    def sharded(op: Op, arrays: Arrays) -> Arrays:
        placed = {name: jax.lax.with_sharding_constraint(x, sharding) for name, x in arrays.items()}
        return gradients(op, placed)

    assert_keeps_the_rule(sharded, inputs, "xla", gradients)
    placed = jax.device_put(inputs, sharding)
    for name, x in jax.jit(partial(gradients, OPS["xla"]))(placed).items():
        assert x.sharding.is_equivalent_to(sharding, 4), name


def test_sdpa_shard_map_grad_regression_36008(eight_devices: OtherProcess):
    problem = eight_devices.check(__name__, "gradient_through_shard_map")
    assert problem is None, problem


def gradient_through_shard_map() -> None:
    """The backward pass keeps the manual axes that the operands vary over."""
    mesh = jax.make_mesh(
        (2, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    spec = P("dp", None, "tp")

    def attention(op: Op, arrays: Arrays) -> Array:
        query, key, value = jnp.split(arrays["qkv"], 3, axis=-1)
        return op(query, key, value, scale=1.0, is_causal=True)

    def in_shard_map(op: Op, arrays: Arrays) -> Array:
        call = jax.shard_map(partial(attention, op), mesh=mesh, in_specs=spec, out_specs=spec)
        return call(dict(arrays))

    inputs = draw("bfloat16", qkv=(4, 128, 4, 192))
    assert_keeps_the_rule(
        gradients_of_sum(in_shard_map), inputs, "xla", gradients_of_sum(attention)
    )
