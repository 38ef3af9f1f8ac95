"""vmap folds its axis into the batch: one call, no loop, whatever is mapped along which axis."""

import jax
import jax.numpy as jnp
import pytest

from sigjax.choice import compile_for
from tests.calls import CALLS, SHAPES, Arrays, Call, assert_equal

pytestmark = pytest.mark.usefixtures("code_is_not_optimised")
SIZE = 4  # calls of one map, or of two nested ones: the same programs
MAPPED = {
    "all": lambda call: call.names,
    "query": lambda call: ("query",),
    "key and value": lambda call: ("key", "value"),
    "extras": lambda call: call.extras,
    "value and extras": lambda call: ("value", *call.extras),
}
AXES = {"first": 0, "second": 1, "last": -1}


def mapped_arrays(
    call: Call, names: tuple[str, ...], axis: int
) -> tuple[Arrays, dict[str, int | None]]:
    """All operands, those of names mapped along axis; and the axes of vmap."""
    arrays = call.arrays()
    axes: dict[str, int | None] = dict.fromkeys(call.names)
    for name, x in call.arrays((SIZE,), seed=1).items():
        if name in names:
            axis_ = min(axis, len(SHAPES[name]))
            arrays[name], axes[name] = jnp.moveaxis(x, 0, axis_), axis_
    return arrays, axes


def one_by_one(function, arrays: Arrays, axes: dict[str, int | None], size: int = SIZE) -> Arrays:
    def pick(index: int) -> Arrays:
        return {
            name: x if axes[name] is None else jnp.take(x, index, axis=axes[name])
            for name, x in arrays.items()
        }

    results = [function(pick(index)) for index in range(size)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *results)


# The axes in turn, as each is a program of its own: every call, and every choice of what is mapped,
# meets all of them.
CASES = [
    pytest.param(call, select(call), AXES[where], id=f"{name}-{mapped} mapped-{where} axis")
    for i, (name, call) in enumerate(CALLS.items())
    for j, (mapped, select) in enumerate(MAPPED.items())
    if select(call)
    for where in [[*AXES][(i + j) % len(AXES)]]
]


@pytest.mark.parametrize(("call", "names", "axis"), CASES)
def test_a_mapped_call_equals_the_calls_one_by_one(call: Call, names: tuple[str, ...], axis: int):
    arrays, axes = mapped_arrays(call, names, axis)
    got = jax.vmap(call.both, in_axes=(axes,))(arrays)
    assert_equal(got, one_by_one(call.both, arrays, axes))


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_the_gradient_of_what_all_mapped_calls_share_is_their_sum(call: Call):
    arrays, axes = mapped_arrays(call, ("query",), 0)

    def total(arrays: Arrays) -> jax.Array:
        return jax.vmap(call.loss, in_axes=(axes,))(arrays).sum()

    shared = [name for name in call.floats if name != "query"]
    got = jax.grad(lambda floats: total({**arrays, **floats}))({n: arrays[n] for n in shared})
    want = one_by_one(call.gradients, arrays, axes)
    assert_equal(got, {name: want[name].sum(0) for name in shared})


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_nested_maps_equal_the_calls_one_by_one(call: Call):
    arrays = call.arrays((2, SIZE // 2))
    inner = {name: None if name == "key" else 0 for name in arrays}
    arrays["key"] = arrays["key"][:, 0]
    nested = jax.vmap(jax.vmap(call.both, in_axes=(inner,)))
    rows = [
        one_by_one(call.both, jax.tree.map(lambda x, i=i: x[i], arrays), inner, SIZE // 2)
        for i in range(2)
    ]
    assert_equal(nested(arrays), jax.tree.map(lambda *xs: jnp.stack(xs), *rows))


def test_a_map_of_no_calls_gives_no_results():
    call = CALLS["bias and mask"]
    output = jax.vmap(call)(call.arrays((0,)))
    assert output.shape == (0, *SHAPES["query"])


def lowered(function, *shapes: jax.ShapeDtypeStruct) -> str:
    with compile_for(90):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("kernels_without_code")
def test_a_mapped_call_launches_the_kernels_of_one_call():
    x = jax.ShapeDtypeStruct((SIZE, 2, 64, 2, 32), jnp.bfloat16)

    def loss(x: jax.Array) -> jax.Array:
        y = jax.vmap(lambda x: Call()({"query": x, "key": x, "value": x}, "triton"))(x)
        return y.astype(jnp.float32).sum()

    text = lowered(jax.value_and_grad(loss), x)
    assert text.count("triton_kernel_call") == 3
    assert "stablehlo.while" not in text


def test_a_shared_bias_is_not_expanded_by_a_map():
    call = CALLS["shared bias and mask"]
    arrays, axes = mapped_arrays(call, ("query",), 0)
    text = jax.jit(jax.vmap(call, in_axes=(axes,))).lower(arrays).as_text()
    batch, heads, length, keys = SHAPES["bias"]
    assert f"{SIZE * batch}x1x{length}x" not in text
    assert f"{SIZE * batch}x{heads}x{length}x{keys}xf32" not in text
