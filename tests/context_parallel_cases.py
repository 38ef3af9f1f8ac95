"""What tests/test_context_parallel.py runs in a process with eight devices."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sigjax
from sigjax import numerics
from sigjax.choice import compile_for
from tests.calls import Arrays, Call, Sizes, assert_equal
from tests.sharded_cases import run

VARIANTS = {
    "plain": ((), {}),
    "causal": ((), {"is_causal": True}),
    "lengths": (("query_seq_lengths", "key_value_seq_lengths"), {}),
    "causal lengths": (("query_seq_lengths", "key_value_seq_lengths"), {"is_causal": True}),
    "biases": (("sigmoid_bias", "key_bias", "key_value_seq_lengths"), {"scale": 0.5}),
    "causal biases": (("sigmoid_bias", "key_bias"), {"is_causal": True}),
}
SIZES = Sizes(batch=2, length=32, keys=32, heads=4, kv_heads=2, head_size=8)


def both(op: Any, call: Call, arrays: Arrays) -> Any:
    floats = {name: arrays[name] for name in call.floats}
    output, pull = jax.vjp(lambda floats: op(**{**arrays, **floats}, **call.options), floats)
    return output, pull(jnp.cos(jnp.arange(output.size)).reshape(output.shape))[0]


def equals_one_device(variant: str, devices: int, kind: str = "Auto") -> None:
    extras, options = VARIANTS[variant]
    call = Call(extras, options)
    arrays = call.arrays(sizes=SIZES)
    mesh = jax.make_mesh(
        (devices,), ("s",), axis_types=(AxisType[kind],), devices=jax.devices()[:devices]
    )

    def ring(**given: Any) -> jax.Array:
        return sigjax.context_parallel_attention(**given, mesh=mesh, axis_name="s")

    got = jax.jit(lambda arrays: both(ring, call, arrays))(arrays)
    assert_equal(got, both(sigjax.sigmoid_attention, call, arrays))


def keeps_the_tolerance_rule(dtype: str, order: str) -> None:
    causal = order == "causal"
    case = numerics.Case(
        dtype, 32, 64, 64, 2, causal, True, ((64, 64), (37, 41), (0, 3), (5, 0), (16, 16))
    )
    mesh = jax.make_mesh((4,), ("s",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    def ring(**given: Any) -> jax.Array:
        return sigjax.context_parallel_attention(**given, mesh=mesh, axis_name="s")

    inputs = numerics.make_inputs(case)
    got = numerics.run(ring, case, inputs)
    wrong = numerics.violations(got, numerics.exact(case, inputs), numerics.run_plain(case, inputs))
    assert not wrong, "\n".join(wrong)


def batch_and_heads_may_be_sharded_too(kind: str) -> None:
    extras, options = VARIANTS["causal lengths"]
    call = Call((*extras, "sigmoid_bias", "key_bias"), options)
    arrays = call.arrays(sizes=SIZES)
    mesh = jax.make_mesh((2, 2, 2), ("b", "s", "n"), axis_types=(AxisType[kind],) * 3)

    def ring(**given: Any) -> jax.Array:
        return sigjax.context_parallel_attention(
            **given, mesh=mesh, axis_name="s", batch_axis_name="b", head_axis_name="n"
        )

    got = jax.jit(lambda arrays: both(ring, call, arrays))(arrays)
    assert_equal(got, both(sigjax.sigmoid_attention, call, arrays))


def only_blocks_travel(variant: str) -> None:
    """No device ever has all keys: what moves are blocks, from neighbour to neighbour."""
    extras, options = VARIANTS[variant]
    call = Call(extras, options)
    arrays = call.arrays(sizes=SIZES)
    mesh = jax.make_mesh((4,), ("s",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    sequence = NamedSharding(mesh, P(None, "s"))
    placed = {name: jax.device_put(x, sequence) for name, x in arrays.items()}

    def ring(**given: Any) -> jax.Array:
        return sigjax.context_parallel_attention(**given, mesh=mesh, axis_name="s")

    (output, _), found = run(lambda arrays: both(ring, call, arrays), placed)
    assert output.sharding.is_equivalent_to(sequence, 4), output.sharding
    block = arrays["key"].size // 4 * SIZES.heads // SIZES.kv_heads
    moved = [x for x in found if x[0] != "collective-permute" and x[1] > SIZES.heads * SIZES.batch]
    assert not moved, moved
    assert max(size for _, size in found) <= block, found


def a_block_is_sent_before_the_last_is_computed_with() -> None:
    mesh = jax.make_mesh((4,), ("s",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    x = jnp.ones((1, 32, 2, 8))

    def ring(x: jax.Array) -> jax.Array:
        return sigjax.context_parallel_attention(x, x, x, mesh=mesh, axis_name="s")

    for function in (ring, jax.grad(lambda x: ring(x).sum())):
        bodies = list(ring_steps(jax.make_jaxpr(function)(x).jaxpr))
        assert bodies
        for body in bodies:
            names = [equation.primitive.name for equation in body.eqns]
            first = names.index("ppermute")
            assert first < names.index(next(x for x in names if x.startswith("custom_v"))), names
            assert all(x in body.invars for x in body.eqns[first].invars)


def ring_steps(jaxpr: Any) -> Iterator[Any]:
    """The bodies of scans in which something travels."""
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            if equation.primitive.name == "scan" and any(
                x.primitive.name == "ppermute" for x in inner.eqns
            ):
                yield inner
            yield from ring_steps(inner)


def memory_is_that_of_a_block() -> None:
    devices, length = 8, 16384
    mesh = jax.make_mesh((devices,), ("s",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P(None, "s"))
    x = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32, sharding=sharding)

    def loss(x: jax.Array) -> jax.Array:
        return sigjax.context_parallel_attention(
            x, x, x, mesh=mesh, axis_name="s", is_causal=True
        ).sum()

    memory = jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis()
    assert memory is not None
    block = length // devices * 2 * 32 * 4  # bytes of a device's query, key or value
    weights = chunked_logits(length // devices)
    assert memory.temp_size_in_bytes < 40 * block + 6 * weights, memory


def chunked_logits(length: int) -> int:
    """Bytes of one step's logits in "xla", for two pairs of half blocks and two heads."""
    return 2 * 2 * (length // 2) * 1024 * 4


def a_mapped_ring_equals_rings_one_by_one() -> None:
    call = Call(*VARIANTS["lengths"])
    arrays = call.arrays((3,), sizes=SIZES)
    mesh = jax.make_mesh((2,), ("s",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def ring(arrays: dict[str, Any]) -> jax.Array:
        return sigjax.context_parallel_attention(**arrays, mesh=mesh, axis_name="s")

    assert_equal(jax.jit(jax.vmap(ring))(arrays), jax.vmap(call)(arrays))


def second_derivatives_equal_one_device() -> None:
    call = Call(*VARIANTS["causal"])
    arrays = call.arrays(sizes=SIZES)
    mesh = jax.make_mesh((2,), ("s",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def ring(**given: Any) -> jax.Array:
        return sigjax.context_parallel_attention(**given, mesh=mesh, axis_name="s")

    def second(op: Any, query: jax.Array) -> jax.Array:
        def first(query: jax.Array) -> jax.Array:
            return jax.grad(lambda q: jnp.sin(op(**{**arrays, "query": q}, is_causal=True)).sum())(
                query
            )

        return jax.vjp(first, query)[1](jnp.cos(query))[0]

    got = jax.jit(lambda q: second(ring, q))(arrays["query"])
    np.testing.assert_allclose(
        got, second(sigjax.sigmoid_attention, arrays["query"]), rtol=1e-4, atol=1e-5
    )


def triton_lowers_with_its_kernels() -> None:
    mesh = jax.make_mesh((8,), ("s",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P(None, "s"))
    x = jax.ShapeDtypeStruct((1, 1024, 2, 32), jnp.bfloat16, sharding=sharding)

    def loss(x: jax.Array) -> jax.Array:
        output = sigjax.context_parallel_attention(
            x, x, x, mesh=mesh, axis_name="s", is_causal=True, implementation="triton"
        )
        return output.astype(jnp.float32).sum()

    with compile_for(90):
        text = jax.jit(jax.grad(loss)).trace(x).lower(lowering_platforms=("cuda",)).as_text()
    assert "CustomSPMDPartitioning" not in text
    # Causal and full pairs of parts, forward and twice backward; shared by all steps.
    assert text.count("custom_call @triton_kernel_call") >= 6
    assert "collective_permute" in text
