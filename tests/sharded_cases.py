"""What tests/test_partitioning.py runs in a process with eight devices."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sigjax
from sigjax.choice import compile_for
from tests.calls import CALLS, Arrays, Sizes, assert_equal

SIZES = {
    "equal heads": Sizes(batch=8, length=12, keys=10, heads=8, kv_heads=8),
    "grouped heads": Sizes(batch=8, length=12, keys=10, heads=16, kv_heads=8),
    "fewer key heads": Sizes(batch=8, length=12, keys=10, heads=8, kv_heads=2),
    "one key head": Sizes(batch=8, length=12, keys=10, heads=8, kv_heads=1),
    "odd heads": Sizes(batch=8, length=12, keys=10, heads=12, kv_heads=3),
}
# (devices over the batch, devices over the heads)
MESHES = {"batch": (8, 1), "heads": (1, 8), "both": (4, 2)}
COLLECTIVE = re.compile(
    r"= \(?\w+\[([\d,]*)\].*? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)


def run(function: Any, *arguments: Any) -> tuple[Any, list[tuple[str, int]]]:
    """The result, and what travels in the compiled program: each collective and its elements."""
    compiled = jax.jit(function).lower(*arguments).compile()
    found = [
        (name, int(np.prod([int(x) for x in shape.split(",") if x])))
        for shape, name in COLLECTIVE.findall(compiled.as_text() or "")
    ]
    return compiled(*arguments), found


def make_mesh(mesh: str, kind: str) -> jax.sharding.Mesh:
    return jax.make_mesh(MESHES[mesh], ("data", "model"), axis_types=(AxisType[kind],) * 2)


def specs(sizes: Sizes, mesh: jax.sharding.Mesh) -> dict[str, P]:
    """How a user shards: batch and heads, parameters whole."""
    devices = mesh.shape["model"]
    head = "model" if sizes.heads % devices == 0 else None
    kv_head = "model" if sizes.kv_heads % devices == 0 else None
    return {
        "query": P("data", None, head),
        "key": P("data", None, kv_head),
        "value": P("data", None, kv_head),
        "bias": P("data", head),
        "mask": P("data"),
        "key_bias": P("data"),
        "query_seq_lengths": P("data"),
        "key_value_seq_lengths": P("data"),
        "query_segment_ids": P("data"),
        "key_value_segment_ids": P("data"),
    }


def place(arrays: Arrays, mesh: jax.sharding.Mesh, where: dict[str, P]) -> Arrays:
    return {
        name: jax.device_put(x, NamedSharding(mesh, where.get(name, P())))
        for name, x in arrays.items()
    }


def forward_moves_nothing(call_name: str, sizes_name: str, mesh_name: str, kind: str) -> None:
    call, sizes, mesh = CALLS[call_name], SIZES[sizes_name], make_mesh(mesh_name, kind)
    arrays = call.arrays(sizes=sizes)
    placed = place(arrays, mesh, specs(sizes, mesh))
    output, found = run(call, placed)
    assert_equal(output, call(arrays))
    assert output.sharding.is_equivalent_to(placed["query"].sharding, 4), output.sharding
    assert found == []


def backward_adds_up_what_is_shared(
    call_name: str, sizes_name: str, mesh_name: str, kind: str
) -> None:
    call, sizes, mesh = CALLS[call_name], SIZES[sizes_name], make_mesh(mesh_name, kind)
    arrays = call.arrays(sizes=sizes)
    placed = place(arrays, mesh, specs(sizes, mesh))
    cotangent = jnp.cos(jnp.arange(arrays["query"].size, dtype=jnp.float32))
    cotangent = cotangent.reshape(arrays["query"].shape)

    def gradients(arrays: Arrays, cotangent: Array) -> Arrays:
        floats = {name: arrays[name] for name in call.floats}
        return jax.vjp(lambda floats: call({**arrays, **floats}), floats)[1](cotangent)[0]

    placed_cotangent = jax.device_put(cotangent, placed["query"].sharding)
    result, found = run(gradients, placed, placed_cotangent)
    assert_equal(result, gradients(arrays, cotangent))
    # On explicit axes a bias [N] is a replicated [B, N] before it meets the op.
    small = sizes.batch * sizes.heads if kind == "Explicit" else 0
    moved = [x for x in found if x[0] != "all-reduce" and x[1] > small]
    assert not moved, moved
    where = specs(sizes, mesh)
    shared = {name for name in call.floats if not any(where.get(name, P()))}
    shared |= {"key_bias"} & set(call.floats) if mesh.shape["model"] > 1 else set()
    shared |= {"key", "value"} if sizes.kv_heads % mesh.shape["model"] else set()
    assert shared or not [x for x in found if x[1] > small], found


def a_sharded_length_is_gathered_and_right() -> None:
    call, sizes = CALLS["everything"], SIZES["equal heads"]
    mesh = make_mesh("both", "Auto")
    arrays = call.arrays(sizes=sizes)
    where = {"query": P(None, "data"), "key": P(None, "model")}
    assert_equal(jax.jit(call.both)(place(arrays, mesh, where)), call.both(arrays))


def heads_that_do_not_divide_are_gathered_and_right() -> None:
    call, sizes = CALLS["lengths"], SIZES["odd heads"]
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    arrays = call.arrays(sizes=sizes)
    where = {"query": P("data", None, "model")}
    assert_equal(jax.jit(call.both)(place(arrays, mesh, where)), call.both(arrays))


def a_layer_of_sharded_weights_only_adds_up(kind: str) -> None:
    """Megatron's way: column-parallel projections, one all-reduce after the output's."""
    mesh = make_mesh("both", kind)
    rng = np.random.default_rng(0)
    x, *weights = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((8, 12, 32), *((32, 8, 8),) * 3, (8, 8, 32))
    )

    def layer(x: Array, query: Array, key: Array, value: Array, out: Array) -> Array:
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in (query, key, value))
        y = sigjax.sigmoid_attention(q, k, v)
        out_sharding = P("data") if kind == "Explicit" else None
        return jnp.einsum("btnh,nhd->btd", y, out, out_sharding=out_sharding)

    columns = NamedSharding(mesh, P(None, "model"))
    placed = [
        jax.device_put(x, NamedSharding(mesh, P("data"))),
        *(jax.device_put(w, columns) for w in weights[:3]),
        jax.device_put(weights[3], NamedSharding(mesh, P("model"))),
    ]
    with jax.set_mesh(mesh):
        output, found = run(layer, *placed)
    assert {name for name, _ in found} == {"all-reduce"}, found
    np.testing.assert_allclose(output, layer_on_one_device(x, weights), rtol=1e-4, atol=1e-4)


def layer_on_one_device(x: Array, weights: list[Array]) -> Array:
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in weights[:3])
    return jnp.einsum("btnh,nhd->btd", sigjax.sigmoid_attention(q, k, v), weights[3])


def shard_map_equals_one_device(call_name: str, sizes_name: str, kind: str) -> None:
    call, sizes, mesh = CALLS[call_name], SIZES[sizes_name], make_mesh("both", kind)
    arrays = call.arrays(sizes=sizes)
    where = specs(sizes, mesh)
    in_specs = {name: where.get(name, P()) for name in arrays}
    if "sigmoid_bias" in arrays:
        in_specs["sigmoid_bias"] = P("model")
    if "batch_sigmoid_bias" in arrays:
        in_specs["batch_sigmoid_bias"] = P("data")
    op = jax.shard_map(call, mesh=mesh, in_specs=(in_specs,), out_specs=P("data", None, "model"))
    placed = place(arrays, mesh, in_specs)

    def both(op: Any, arrays: Arrays) -> Any:
        floats = {name: arrays[name] for name in call.floats}
        output, pull = jax.vjp(lambda floats: op({**arrays, **floats}), floats)
        return output, pull(jnp.sin(output))[0]

    assert_equal(jax.jit(both, static_argnums=0)(op, placed), both(call, arrays))


def a_mapped_axis_may_be_sharded() -> None:
    call, sizes = CALLS["lengths"], Sizes(batch=2)
    mesh = make_mesh("batch", "Auto")
    arrays = call.arrays((8,), sizes=sizes)
    placed = place(arrays, mesh, dict.fromkeys(arrays, P("data")))
    mapped = jax.vmap(call)
    output, found = run(mapped, placed)
    assert_equal(output, mapped(arrays))
    assert found == []


def a_mapped_axis_may_be_explicit() -> None:
    call, sizes = CALLS["lengths"], Sizes(batch=2)
    mesh = make_mesh("batch", "Explicit")
    arrays = call.arrays((8,), sizes=sizes)
    placed = place(arrays, mesh, dict.fromkeys(arrays, P("data")))
    with jax.set_mesh(mesh):
        output = jax.jit(jax.vmap(call, spmd_axis_name="data"))(placed)
    assert_equal(output, jax.vmap(call)(arrays))


def calls_outside_of_jit_stay_sharded() -> None:
    call, sizes, mesh = CALLS["plain"], SIZES["equal heads"], make_mesh("both", "Auto")
    arrays = call.arrays(sizes=sizes)
    placed = place(arrays, mesh, specs(sizes, mesh))
    output = call(placed)
    assert output.sharding.is_equivalent_to(placed["query"].sharding, 4)
    assert_equal(output, call(arrays))


def triton_is_partitioned(kind: str) -> None:
    """Lowered for eight GPUs. XLA asks for the parts while it compiles, on a GPU host only."""
    mesh = make_mesh("both", kind)
    sharding = NamedSharding(mesh, P("data", None, "model"))
    x = jax.ShapeDtypeStruct((8, 64, 8, 32), jnp.bfloat16, sharding=sharding)

    def loss(x: Array) -> Array:
        output = sigjax.sigmoid_attention(x, x, x, implementation="triton")
        return output.astype(jnp.float32).sum()

    with compile_for(90):
        traced = jax.jit(jax.value_and_grad(loss)).trace(x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@CustomSPMDPartitioning") == 2
    assert text.count("sdy.sharding_rule") == 2
