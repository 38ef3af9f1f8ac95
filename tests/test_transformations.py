"""The op composes with JAX's transformations: each gives what the plain calls give."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from sigjax import sigmoid_attention
from sigjax.choice import compile_for
from sigjax.vjp import OUTPUT_NAME
from tests.calls import CALLS, Arrays, Call, assert_equal

pytestmark = pytest.mark.usefixtures("code_is_not_optimised")
SAVE_OUTPUT = jax.checkpoint_policies.save_only_these_names(OUTPUT_NAME)


def scanned(call: Call, arrays: Arrays) -> Any:
    """Two steps over the same operands; the carry feeds the query."""

    def step(query: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        output = call({**arrays, "query": query})
        return output, output

    return jax.lax.scan(step, arrays["query"], None, 2)[1][1]


def twice(call: Call, arrays: Arrays) -> Any:
    """What scanned computes."""
    return call({**arrays, "query": call(arrays)})


def gradients_of(function: Callable[[Call, Arrays], jax.Array]) -> Callable[[Call, Arrays], Any]:
    def gradients(call: Call, arrays: Arrays) -> Any:
        def loss(floats: Arrays) -> jax.Array:
            return jnp.sin(function(call, {**arrays, **floats})).sum()

        return jax.grad(loss)({name: arrays[name] for name in call.floats})

    return gradients


def once(call: Call, arrays: Arrays) -> Any:
    return call(arrays)


def remat(call: Call, arrays: Arrays, **options: Any) -> Any:
    return jax.checkpoint(call, **options)(arrays)


def branch(call: Call, arrays: Arrays) -> Any:
    return jax.lax.cond(arrays["query"].sum() < 1e9, call, lambda a: a["query"], arrays)


def looped(call: Call, arrays: Arrays) -> Any:
    return jax.lax.fori_loop(0, 2, lambda _, q: call({**arrays, "query": q}), arrays["query"])


def map_over_rows(call: Call, arrays: Arrays) -> Any:
    """lax.map over two copies of every operand."""
    copies = jax.tree.map(lambda x: jnp.stack([x, x]), arrays)
    return jax.lax.map(call, copies)[1]


def vmap_of_scan(call: Call, arrays: Arrays) -> Any:
    copies = jax.tree.map(lambda x: jnp.stack([x, x]), arrays)
    return jax.vmap(partial(scanned, call))(copies)[1]


def pullback(call: Call, arrays: Arrays) -> Any:
    """Of the gradient: reverse over reverse, along one direction."""
    gradients, pull = jax.vjp(lambda q: call.gradients({**arrays, "query": q}), arrays["query"])
    return pull(jax.tree.map(jnp.ones_like, gradients))


def mapped_pullback(call: Call, arrays: Arrays) -> Any:
    copies = jax.tree.map(lambda x: jnp.stack([x, x]), arrays)
    return jax.tree.map(lambda x: x[1], jax.vmap(partial(pullback, call))(copies))


def jitted(function: Callable[[Call, Arrays], Any]) -> Callable[[Call, Arrays], Any]:
    """As one program: the many small ones of second derivatives take longer to compile."""
    return jax.jit(function, static_argnums=0)


TRANSFORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "jit": (lambda call, arrays: jax.jit(call)(arrays), once),
    "jit of gradient": (
        lambda call, arrays: jax.jit(gradients_of(once), static_argnums=0)(call, arrays),
        gradients_of(once),
    ),
    "scan": (scanned, twice),
    "gradient of scan": (gradients_of(scanned), gradients_of(twice)),
    "gradient of remat": (gradients_of(remat), gradients_of(once)),
    "gradient of remat that saves the output": (
        gradients_of(partial(remat, policy=SAVE_OUTPUT)),
        gradients_of(once),
    ),
    "cond": (branch, once),
    "gradient of cond": (gradients_of(branch), gradients_of(once)),
    "loop": (looped, twice),
    "lax.map": (map_over_rows, once),
    "vmap of scan": (vmap_of_scan, twice),
    "gradient of vmap of scan": (gradients_of(vmap_of_scan), gradients_of(twice)),
    "vmap of second derivative": (jitted(mapped_pullback), jitted(pullback)),
}


# Compiled longer than the rest: not with every call.
SLOW = ("vmap of second derivative", "gradient of vmap of scan", "gradient of scan")
FEW_CALLS = ("lengths", "shared bias and mask", "everything")
# With every other call, neighbours here with the others: each is a program of its own.
IN_TURN = ("jit", "jit of gradient", "scan", "loop", "vmap of scan", "lax.map", "gradient of cond")


def has_its_turn(name: str, call_name: str) -> bool:
    if name in SLOW:
        return call_name in FEW_CALLS
    return name not in IN_TURN or (IN_TURN.index(name) + [*CALLS].index(call_name)) % 2 == 0


CASES = [
    pytest.param(*functions, call, id=f"{name}-{call_name}")
    for name, functions in TRANSFORMS.items()
    for call_name, call in CALLS.items()
    if has_its_turn(name, call_name)
]


@pytest.mark.parametrize(("transform", "plain", "call"), CASES)
def test_a_transformed_call_equals_the_plain_one(
    transform: Callable[..., Any], plain: Callable[..., Any], call: Call
):
    arrays = call.arrays()
    assert_equal(transform(call, arrays), plain(call, arrays))


def lowered(function: Callable[..., Any], *shapes: Any) -> str:
    with compile_for(90):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


X = jax.ShapeDtypeStruct((2, 64, 2, 32), jnp.bfloat16)
W = jax.ShapeDtypeStruct((32, 32), jnp.bfloat16)


def layer(x: jax.Array, w: jax.Array) -> jax.Array:
    query = jnp.sin(x @ w)
    return jnp.sin(sigmoid_attention(query, query, query, implementation="triton"))


def loss_of(layer: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda x, w: layer(layer(x, w), w).astype(jnp.float32).sum()


POLICIES = {
    # Two layers: a forward and two backward kernels each, and what is computed again.
    "no remat": (layer, 6),
    "everything again": (jax.checkpoint(layer), 8),
    "output saved by name": (jax.checkpoint(layer, policy=SAVE_OUTPUT), 6),
    "another name": (
        jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names("other")),
        8,
    ),
}


def launches(function: Callable[..., Any], *shapes: Any) -> int:
    """How many Triton kernels a call runs, through every jit and rule inside."""

    def count(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            total += equation.primitive.name == "triton_kernel_call"
            total += sum(map(count, jaxprs_in_params(equation.params)))
        return total

    with compile_for(90):
        return count(jax.make_jaxpr(function)(*shapes).jaxpr)


@pytest.mark.parametrize(("layer", "count"), POLICIES.values(), ids=list(POLICIES))
def test_a_saved_output_is_not_computed_again(layer: Callable[..., Any], count: int):
    assert launches(jax.grad(loss_of(layer), (0, 1)), X, W) == count


def test_forward_mode_is_refused_by_jax_with_its_reason():
    x = jnp.ones((1, 4, 1, 8))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: sigmoid_attention(x, x, x), (x,), (x,))


@pytest.mark.usefixtures("kernels_without_code")
def test_second_derivatives_of_triton_come_from_xla():
    def gradient(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: layer(x, jnp.eye(32, dtype=x.dtype)).astype(jnp.float32).sum())(x)

    text = lowered(lambda x: jax.vjp(gradient, x)[1](x)[0], X)
    assert text.count("triton_kernel_call") >= 2
    assert "stablehlo.while" in text  # the scan over key blocks


def test_second_derivatives_take_memory_linear_in_the_length():
    x = jax.ShapeDtypeStruct((1, 8192, 1, 16), jnp.float32)

    def gradient(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: sigmoid_attention(x, x, x, implementation="xla").sum())(x)

    compiled = jax.jit(lambda x: jax.vjp(gradient, x)[1](x)[0]).lower(x).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    # A block is 8,192 x 1,024 float32, 32 MB; all weights would be 256 MB an array.
    assert memory.temp_size_in_bytes < 512e6


def test_an_exported_call_survives_the_round_trip():
    call = CALLS["lengths"]
    arrays = call.arrays()
    exported = jax.export.export(jax.jit(call.both))(arrays)
    restored = jax.export.deserialize(exported.serialize())
    assert_equal(restored.call(arrays), call.both(arrays))


def test_an_exported_gradient_survives_the_round_trip():
    call = CALLS["everything"]
    arrays = call.arrays()
    exported = jax.export.export(jax.jit(call))(arrays)
    floats = {name: arrays[name] for name in call.floats}
    restored = jax.export.deserialize(exported.serialize(vjp_order=1))

    def loss(floats: Arrays) -> jax.Array:
        output = restored.call({**arrays, **floats})
        weights = jnp.cos(jnp.arange(output.size, dtype=output.dtype)).reshape(output.shape)
        return (weights * output).sum()

    assert_equal(jax.grad(loss)(floats), call.gradients(arrays))


def test_an_exported_triton_call_carries_its_kernels():
    jax_triton = pytest.importorskip("jax_triton")
    check = jax.export.DisabledSafetyCheck.custom_call(jax_triton.CUSTOM_CALL_TARGET_NAME)

    def loss(x: jax.Array) -> jax.Array:
        output = sigmoid_attention(x, x, x, implementation="triton")
        return output.astype(jnp.float32).sum()

    with compile_for(90):
        export = jax.export.export(
            jax.jit(jax.value_and_grad(loss)), platforms=["cuda"], disabled_checks=[check]
        )
        exported = export(X)
    restored = jax.export.deserialize(exported.serialize())
    assert restored.platforms == ("cuda",)
    assert restored.mlir_module().count("custom_call @triton_kernel_call") == 3
    assert restored.in_avals == exported.in_avals


def test_an_exported_triton_call_needs_the_check_disabled():
    with compile_for(90), pytest.raises(ValueError, match="triton_kernel_call"):
        jax.export.export(
            jax.jit(lambda x: sigmoid_attention(x, x, x, implementation="triton")),
            platforms=["cuda"],
        )(X)
