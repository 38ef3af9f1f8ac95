"""The Flax module, against plain jnp written out by hand."""

import doctest
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from sigjax import attention_slot, modules
from sigjax.attention_slot import attention_fn
from sigjax.modules import SigmoidAttention

pytestmark = pytest.mark.usefixtures("code_is_not_optimised")
# What is judged against float64 is compiled as users have it.
OPTIMISED = {"xla_backend_optimization_level": "3", "xla_llvm_disable_expensive_passes": False}

FEATURES, HEADS, B, T, S = 24, 4, 3, 13, 17
LENGTHS_Q = np.array([13, 6, 0], np.int32)
LENGTHS_K = np.array([11, 17, 0], np.int32)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def parameters(module: nnx.Module) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def plain(
    p: dict[str, Any], x: jax.Array, y: jax.Array, q_lengths, k_lengths, *, bias, key_bias, causal
) -> jax.Array:
    """The module's definition with every weight formed; bias is a number or [N]."""

    def heads(name, inputs):
        projected = jnp.einsum("btf,fnh->btnh", inputs, p[name]["kernel"])
        return projected + p[name]["bias"][None, None]

    def normalised(name, x):
        scale = p[f"{name}_norm"]["scale"] if f"{name}_norm" in p else None
        if scale is None:
            return x
        squares = jnp.mean(x * x, -1, keepdims=True)
        return x / jnp.sqrt(squares + 1e-6) * scale[None, None, None]

    query, key, value = heads("query", x), heads("key", y), heads("value", y)
    query, key = normalised("query", query), normalised("key", key)
    key, value = (jnp.repeat(z, query.shape[2] // key.shape[2], 2) for z in (key, value))
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(query.shape[-1])
    if bias == "per_sequence":
        keys = jnp.maximum(jnp.asarray(k_lengths), 1)
        bias = -jnp.log(keys.astype(x.dtype))[:, None]
    else:
        bias = p["sigmoid_bias"][None] if bias == "learnable" else jnp.full((1, 1), bias, x.dtype)
    logits = logits + bias[:, :, None, None]
    logits = logits + key_bias[:, None, None, :]
    rows = jnp.arange(x.shape[1])[None, :] < q_lengths[:, None]
    keys = jnp.arange(y.shape[1])[None, :] < k_lengths[:, None]
    pairs = rows[:, None, :, None] & keys[:, None, None, :]
    if causal:
        pairs &= jnp.tri(x.shape[1], y.shape[1], dtype=bool)[None, None]
    weights = jnp.where(pairs, jax.nn.sigmoid(logits), 0)
    encoded = jnp.einsum("bnts,bsnh->btnh", weights, value)
    out = jnp.einsum("btnh,nho->bto", encoded, p["out"]["kernel"]) + p["out"]["bias"][None, None]
    return jnp.where(rows[:, :, None], out, 0)


def assert_as_good_as_plain(actual: Any, plain32: Any, exact: Any) -> None:
    """Every leaf at most twice as far from float64 as plain float32, plus eight ulps."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(exact)]
    leaves = (jax.tree.leaves(tree) for tree in (actual, plain32, exact))
    for name, *arrays in zip(names, *leaves, strict=True):
        got, ours, true = (np.asarray(x, np.float64) for x in arrays)
        allowed = 2 * np.abs(ours - true).max() + 8 * np.finfo(np.float32).eps * np.abs(true).max()
        assert got.shape == true.shape, name
        assert np.abs(got - true).max() <= allowed, name


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "causal": {"causal": True},
    "key_bias": {"with_key_bias": True},
    "fixed_bias": {"sigmoid_bias": -1.5},
    "learnable_bias": {"sigmoid_bias": "learnable", "initial_length": 17},
    "qk_norm": {"normalize_qk": True},
    "grouped_heads": {"num_kv_heads": 2},
    "one_kv_head": {"num_kv_heads": 1},
    "other_widths": {"qkv_features": 32, "out_features": 10, "in_kv_features": 7},
    "all_at_once": {
        "causal": True,
        "with_key_bias": True,
        "sigmoid_bias": "learnable",
        "initial_length": 5,
        "normalize_qk": True,
        "num_kv_heads": 2,
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_output_and_every_gradient_are_those_of_the_plain_form(case):
    settings = dict(case)
    causal = settings.pop("causal", False)
    key_bias = normal(3, B, S) if settings.pop("with_key_bias", False) else jnp.zeros((B, S))
    module = SigmoidAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), **settings)
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda x: x + 0.1 * normal(x.size, *x.shape), state)
    x, y = normal(1, B, T, FEATURES), normal(2, B, S, settings.get("in_kv_features", FEATURES))
    cotangent = normal(4, B, T, settings.get("out_features", FEATURES))

    def ours(state, x, y, key_bias):
        out = nnx.merge(graph, state)(
            x,
            y,
            key_bias=key_bias,
            is_causal=causal,
            query_seq_lengths=LENGTHS_Q,
            key_value_seq_lengths=LENGTHS_K,
        )
        return jnp.sum(out * cotangent), out

    def by_hand(p, x, y, key_bias):
        bias = settings.get("sigmoid_bias", "per_sequence")
        out = plain(p, x, y, LENGTHS_Q, LENGTHS_K, bias=bias, key_bias=key_bias, causal=causal)
        return jnp.sum(out * cotangent.astype(out.dtype)), out

    def grad(function, **compiler_options: str | bool):
        gradients = jax.grad(function, argnums=(0, 1, 2, 3), has_aux=True)
        return jax.jit(gradients, compiler_options=compiler_options)

    operands = (nnx.to_pure_dict(state), x, y, key_bias)
    gradients, out = grad(ours, **OPTIMISED)(state, x, y, key_bias)
    actual = (nnx.to_pure_dict(gradients[0]), *gradients[1:], out)
    # What is compared with is not optimised: that takes longer than to run it.
    by_hand_grad = grad(by_hand, xla_backend_optimization_level="0")
    plain32 = by_hand_grad(*operands)
    with jax.enable_x64(True):
        exact = by_hand_grad(*jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), operands))
    assert_as_good_as_plain(actual, (*plain32[0], plain32[1]), (*exact[0], exact[1]))


def test_the_learnable_bias_begins_at_minus_log_of_the_length_and_has_a_gradient_per_head():
    module = SigmoidAttention(
        HEADS, FEATURES, sigmoid_bias="learnable", initial_length=500, rngs=nnx.Rngs(0)
    )
    assert isinstance(module.sigmoid_bias, nnx.Param)
    np.testing.assert_allclose(module.sigmoid_bias[...], np.full(HEADS, -math.log(500)), rtol=1e-7)
    gradients = nnx.grad(lambda m: jnp.sum(m(normal(0, B, T, FEATURES)) ** 2))(module)
    assert gradients["sigmoid_bias"].shape == (HEADS,)
    assert bool((jnp.abs(gradients["sigmoid_bias"][...]) > 0).all())


@pytest.mark.parametrize(
    ("sigmoid_bias", "names"),
    [
        ("per_sequence", {"query", "key", "value", "out"}),
        (-3.0, {"query", "key", "value", "out"}),
        ("learnable", {"query", "key", "value", "out", "sigmoid_bias"}),
    ],
)
def test_only_a_learnable_bias_is_a_parameter(sigmoid_bias, names):
    length = 9 if sigmoid_bias == "learnable" else None
    module = SigmoidAttention(
        2, 8, sigmoid_bias=sigmoid_bias, initial_length=length, rngs=nnx.Rngs(0)
    )
    assert set(parameters(module)) == names


def test_a_sequence_gives_the_same_in_any_bucket():
    module = SigmoidAttention(HEADS, FEATURES, rngs=nnx.Rngs(0))
    x = normal(0, 1, 40, FEATURES)
    tight = module(x[:, :21], sequence_lengths=jnp.array([21]))
    wide = module(x, sequence_lengths=jnp.array([21]))
    np.testing.assert_allclose(tight, wide[:, :21], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(wide[:, 21:], 0)


def test_lengths_may_have_a_dtype_too_narrow_for_positions():
    module = SigmoidAttention(HEADS, FEATURES, rngs=nnx.Rngs(0))
    x = normal(0, 1, 300, FEATURES)
    out = module(x, sequence_lengths=jnp.array([20], jnp.uint8))
    np.testing.assert_array_equal(out, module(x, sequence_lengths=jnp.array([20])))


def test_both_lengths_have_one_shorthand():
    module = SigmoidAttention(HEADS, FEATURES, rngs=nnx.Rngs(0))
    x = normal(0, B, T, FEATURES)
    np.testing.assert_array_equal(
        module(x, sequence_lengths=LENGTHS_Q),
        module(x, query_seq_lengths=LENGTHS_Q, key_value_seq_lengths=LENGTHS_Q),
    )


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("normalize_qk", [False, True], ids=["no_qk_norm", "qk_norm"])
def test_padding_reaches_no_output_and_no_gradient_whatever_it_holds(poison, normalize_qk):
    module = SigmoidAttention(HEADS, FEATURES, normalize_qk=normalize_qk, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    padded = np.arange(T)[None, :] >= LENGTHS_Q[:, None]
    clean = jnp.where(padded[:, :, None], 0, normal(0, B, T, FEATURES))
    dirty = jnp.where(padded[:, :, None], poison, clean)

    def loss(state, x):
        out = nnx.merge(graph, state)(x, sequence_lengths=LENGTHS_Q)
        return jnp.sum((out - 1) ** 2), out

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    gradients, output = grad(state, dirty)
    expected = grad(state, clean)
    jax.tree.map(np.testing.assert_array_equal, (gradients, output), expected)
    np.testing.assert_array_equal(output[padded], 0)
    np.testing.assert_array_equal(gradients[1][padded], 0)


def test_any_number_of_batch_axes_is_one_batch():
    module = SigmoidAttention(HEADS, FEATURES, rngs=nnx.Rngs(0))
    x = normal(0, 2, 3, T, FEATURES)
    lengths = jnp.array([[13, 1, 4], [0, 9, 2]], jnp.int32)
    mask = normal(1, 2, 3, 1, T, T) > 0
    bias = normal(2, 3, HEADS, T, T)
    key_bias = normal(3, 2, 3, T)
    flat = module(
        x.reshape(6, T, FEATURES),
        sequence_lengths=lengths.reshape(6),
        mask=mask.reshape(6, 1, T, T),
        bias=jnp.tile(bias, (2, 1, 1, 1)),
        key_bias=key_bias.reshape(6, T),
    )
    out = module(x, sequence_lengths=lengths, mask=mask, bias=bias, key_bias=key_bias)
    np.testing.assert_array_equal(out, flat.reshape(2, 3, T, FEATURES))
    np.testing.assert_array_equal(
        module(x[0, 1], sequence_lengths=jnp.int32(5)),
        module(x[0, 1:2], sequence_lengths=jnp.array([5]))[0],
    )


@pytest.mark.parametrize("batch", [(0,), (2, 0)], ids=["one_axis", "two_axes"])
def test_an_empty_batch_gives_an_empty_output(batch):
    module = SigmoidAttention(HEADS, FEATURES, rngs=nnx.Rngs(0))
    assert module(jnp.zeros((*batch, T, FEATURES))).shape == (*batch, T, FEATURES)


@pytest.mark.parametrize("shape", [(T, T), (1, 1, 1, T), (B, 1, T, T), (HEADS, 1, T)])
def test_a_mask_hides_pairs_as_a_bias_of_minus_infinity_would(shape):
    module = SigmoidAttention(HEADS, FEATURES, rngs=nnx.Rngs(0))
    x, mask = normal(0, B, T, FEATURES), normal(1, *shape) > 0
    by_bias = module(x, bias=jnp.where(mask, 0.0, -jnp.inf))
    np.testing.assert_allclose(module(x, mask=mask), by_bias, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(module(x, mask=mask), module(x, mask=mask.astype(jnp.float32)))


def test_a_local_window_reaches_the_op():
    module = SigmoidAttention(HEADS, FEATURES, rngs=nnx.Rngs(0))
    x = normal(0, B, T, FEATURES)
    band = np.abs(np.arange(T)[:, None] - np.arange(T)[None, :]) <= 2
    np.testing.assert_allclose(
        module(x, local_window_size=2), module(x, mask=band), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_computation_has_the_dtype_that_was_asked_for(dtype):
    module = SigmoidAttention(HEADS, FEATURES, dtype=dtype, normalize_qk=True, rngs=nnx.Rngs(0))
    assert module(normal(0, B, T, FEATURES)).dtype == dtype
    assert module.query.kernel[...].dtype == jnp.float32


def test_a_training_step_lowers_the_loss():
    module = SigmoidAttention(
        HEADS,
        FEATURES,
        num_kv_heads=2,
        normalize_qk=True,
        sigmoid_bias="learnable",
        initial_length=T,
        rngs=nnx.Rngs(0),
    )
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)
    x, target = normal(0, B, T, FEATURES), normal(1, B, T, FEATURES)

    @nnx.jit
    def step(module, optimizer):
        def loss_of(module):
            return jnp.mean((module(x, sequence_lengths=LENGTHS_Q) - target) ** 2)

        loss, gradients = nnx.value_and_grad(loss_of)(module)
        optimizer.update(module, gradients)
        return loss

    losses = [float(step(module, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


def test_it_holds_the_parameters_of_nnx_multi_head_attention_and_gives_its_output():
    ours = SigmoidAttention(HEADS, FEATURES, 32, 10, 2, 7, rngs=nnx.Rngs(5))
    theirs = nnx.MultiHeadAttention(
        HEADS, FEATURES, 32, 10, 2, 7, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(5)
    )
    jax.tree.map(np.testing.assert_array_equal, parameters(ours), parameters(theirs))
    x, y = normal(0, B, T, FEATURES), normal(1, B, S, 7)
    np.testing.assert_array_equal(ours(x, y), theirs(x, y))


def test_metadata_reach_the_parameters_that_they_name():
    module = SigmoidAttention(
        HEADS,
        FEATURES,
        normalize_qk=True,
        kernel_metadata={"role": "kernel"},
        out_kernel_metadata={"role": "out kernel"},
        bias_metadata={"role": "bias"},
        out_bias_metadata={"role": "out bias"},
        query_ln_scale_metadata={"role": "query scale"},
        key_ln_scale_metadata={"role": "key scale"},
        rngs=nnx.Rngs(0),
    )
    roles = {
        ".".join(map(str, path)): variable.get_metadata()["role"]
        for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }
    names = ("query", "key", "value")
    assert roles == {f"{name}.kernel": "kernel" for name in names} | {
        f"{name}.bias": "bias" for name in names
    } | {
        "out.kernel": "out kernel",
        "out.bias": "out bias",
        "query_norm.scale": "query scale",
        "key_norm.scale": "key scale",
    }


def test_products_and_dtypes_of_the_projections_are_the_callers():
    calls: list[str] = []

    def product(name: str):
        def dot_general(*arguments, **options):
            calls.append(name)
            return jax.lax.dot_general(*arguments, **options)

        return dot_general

    def promoted(name: str):
        def promote(*arguments, **options):
            calls.append(name)
            return promote_dtype(*arguments, **options)

        return promote

    module = SigmoidAttention(
        HEADS,
        FEATURES,
        normalize_qk=True,
        qkv_dot_general=product("qkv product"),
        out_dot_general=product("out product"),
        qkv_promote_dtype=promoted("qkv dtype"),
        out_promote_dtype=promoted("out dtype"),
        ln_promote_dtype=promoted("norm dtype"),
        rngs=nnx.Rngs(0),
    )
    module(normal(0, B, T, FEATURES))
    products = ["qkv dtype", "qkv product"] * 3
    assert calls == [*products, "norm dtype", "norm dtype", "out dtype", "out product"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"num_heads": 0}, "num_heads must be at least 1, got 0", id="no_heads"),
        pytest.param({"num_heads": 5}, "qkv_features must be a multiple of num_heads", id="heads"),
        pytest.param({"num_kv_heads": 3}, "num_kv_heads must divide num_heads = 4", id="groups"),
        pytest.param({"num_kv_heads": 0}, "num_kv_heads must be at least 1", id="no_kv_heads"),
        pytest.param({"qkv_features": 0}, "qkv_features must be a multiple", id="no_features"),
        pytest.param({"sigmoid_bias": "fixed"}, "sigmoid_bias must be 'per_sequence'", id="name"),
        pytest.param({"sigmoid_bias": math.inf}, "sigmoid_bias must be", id="infinite"),
        pytest.param({"sigmoid_bias": "learnable"}, "initial_length must be the", id="no_length"),
        pytest.param(
            {"sigmoid_bias": "learnable", "initial_length": 0},
            "initial_length must be the usual number of keys, above 0",
            id="zero_length",
        ),
        pytest.param({"initial_length": 9}, "initial_length must be None", id="length_alone"),
        pytest.param({"implementation": "cudnn"}, "implementation must be None", id="name_of_impl"),
    ],
)
def test_a_module_that_cannot_be_is_refused_when_it_is_made(
    arguments: dict[str, Any], message: str
):
    arguments = dict(arguments)
    with pytest.raises(ValueError, match=message):
        SigmoidAttention(arguments.pop("num_heads", HEADS), FEATURES, rngs=nnx.Rngs(0), **arguments)


@pytest.mark.parametrize("argument", ["dropout_rate", "attention_fn", "keep_rngs"])
def test_arguments_of_flax_that_have_no_meaning_here_are_unknown(argument):
    unknown: dict[str, Any] = {argument: None}
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
        SigmoidAttention(HEADS, FEATURES, rngs=nnx.Rngs(0), **unknown)


X = jnp.ones((B, T, FEATURES))


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        pytest.param([X[..., 1:]], {}, r"inputs_q must have shape .* 24\], got", id="features"),
        pytest.param([X[0, 0]], {}, "inputs_q must have shape", id="rank"),
        pytest.param([X, X[..., 1:]], {}, "inputs_k must have shape", id="key_features"),
        pytest.param([X, X, X[..., 1:]], {}, "inputs_v must have shape", id="value_features"),
        pytest.param([X, None, X], {}, "inputs_k must be given beside inputs_v", id="no_key"),
        pytest.param(
            [X, X], {"sequence_lengths": LENGTHS_Q}, "sequence_lengths is both", id="cross"
        ),
        pytest.param(
            [X],
            {"sequence_lengths": LENGTHS_Q, "query_seq_lengths": LENGTHS_Q},
            "sequence_lengths is both lengths of self-attention and stands alone",
            id="twice",
        ),
        pytest.param(
            [X],
            {"query_seq_lengths": LENGTHS_Q[:2]},
            r"query_seq_lengths must have shape \[B...\] = \(3,\), got \(2,\)",
            id="query_lengths",
        ),
        pytest.param(
            [X],
            {"key_value_seq_lengths": LENGTHS_Q[:2]},
            r"key_value_seq_lengths must have shape \[B...\]",
            id="key_lengths",
        ),
    ],
)
def test_inputs_that_do_not_fit_the_module_are_refused(inputs, arguments, message):
    module = SigmoidAttention(HEADS, FEATURES, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        module(*inputs, **arguments)


def test_lengths_that_are_no_integers_are_refused():
    module = SigmoidAttention(HEADS, FEATURES, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="must be an int32 array"):
        module(X, sequence_lengths=LENGTHS_Q.astype(np.float32))


def test_a_named_implementation_that_cannot_serve_is_refused_with_the_reason():
    module = SigmoidAttention(HEADS, FEATURES, 8 * HEADS, implementation="triton", rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="it takes head sizes 16 to 256, got 8"):
        jax.eval_shape(module, X)


@pytest.mark.parametrize("documented", [modules, attention_slot], ids=lambda m: m.__name__)
def test_the_documented_example_runs(documented):
    result = doctest.testmod(documented)
    assert result.attempted > 0
    assert result.failed == 0
