"""The rule of sharding: under jit, batch and heads stay where the caller put them.

Every device runs the kernels on its own sequences and heads. Lengths follow the batch and
key heads follow the query heads; length and head size are gathered where they are sharded.
Nothing travels in the forward pass; in the backward pass only gradients of arrays that
several devices share are added up.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from sigjax import implementations
from sigjax.checks import compute_dtype
from sigjax.choice import Implementation, compile_for
from sigjax.operands import Gradients, Operands, Settings

# The axes of each operand: b batch, t and s lengths, n and k heads, h head size.
AXES = {
    "query": "btnh",
    "key": "bskh",
    "value": "bskh",
    "bias": "bnts",
    "mask": "bnts",
    "sigmoid_bias": "bn",
    "key_bias": "bs",
    "query_lengths": "b",
    "key_lengths": "b",
    "query_segments": "bt",
    "key_segments": "bs",
}
QUERY = AXES["query"]
# A broadcast axis of size 1: no letter of any other operand.
ONE = "1"

# The axes of each operand, or gradient, in the order of its fields; None where it is None.
type Layout = tuple[str | None, ...]


def forward(
    implementation: Implementation, settings: Settings, capability: int | None, operands: Operands
) -> Array:
    """The output [B, T, N, H], each device's part by the named implementation."""
    return _forward(implementation, settings, capability, _layout(operands))(operands)


def backward(
    implementation: Implementation,
    settings: Settings,
    capability: int | None,
    operands: Operands,
    cotangent: Array,
) -> Gradients:
    """The gradients, each device's part by the named implementation."""
    return _backward(implementation, settings, capability, _layout(operands))(operands, cotangent)


def automatic(function: Callable[..., Any], arguments: tuple[Any, ...], like: Any) -> Any:
    """Calls function where no mesh axis is explicit; the results are sharded as like is.

    On a mesh with explicit axes, where types carry shardings, the op decides for itself
    what is sharded, and gives the results the types that they must have.
    """
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arguments)]
    if not any(AxisType.Explicit in mesh.axis_types for mesh in meshes):
        return function(*arguments)
    out_sharding = jax.tree.map(lambda x: jax.typeof(x).sharding, like)
    return jax.sharding.auto_axes(function, out_sharding=out_sharding)(*arguments)


@functools.cache
def _forward(
    implementation: Implementation, settings: Settings, capability: int | None, layout: Layout
) -> Callable[[Operands], Array]:
    @custom_partitioning
    def call(operands: Operands) -> Array:
        return implementations.forward(implementation, settings, operands)

    def partition(mesh: Mesh, arguments: tuple[Operands], result: Any) -> tuple:
        del result
        plan = _plan(mesh, arguments[0])

        def local(operands: Operands) -> Array:
            with _on_one_device(capability):
                return implementations.forward(
                    implementation, settings, plan.own_key_heads(operands)
                )

        return mesh, local, plan.sharding(QUERY), (Operands(*plan.shardings(layout)),)

    call.def_partition(partition, **_rule(_given(layout), (QUERY,)))

    @jax.jit  # for calls outside of jit, under a name that profiles show
    def sigjax_forward(operands: Operands) -> Array:
        return call(operands)

    return sigjax_forward


@functools.cache
def _backward(
    implementation: Implementation, settings: Settings, capability: int | None, layout: Layout
) -> Callable[[Operands, Array], Gradients]:
    axes = tuple(layout[Operands._fields.index(name)] for name in Gradients._fields)

    @custom_partitioning
    def call(operands: Operands, cotangent: Array) -> Gradients:
        return implementations.backward(implementation, settings, operands, cotangent)

    def partition(mesh: Mesh, arguments: tuple[Operands, Any], result: Any) -> tuple:
        del result
        plan = _plan(mesh, arguments[0])

        def local(operands: Operands, cotangent: Array) -> Gradients:
            with _on_one_device(capability):
                gradients = implementations.backward(
                    implementation, settings, plan.own_key_heads(operands), cotangent
                )
            return plan.total(gradients, axes, operands)

        shardings = Operands(*plan.shardings(layout)), plan.sharding(QUERY)
        return mesh, local, Gradients(*plan.shardings(axes)), shardings

    call.def_partition(partition, **_rule((*_given(layout), QUERY), _given(axes)))

    @jax.jit
    def sigjax_backward(operands: Operands, cotangent: Array) -> Gradients:
        return call(operands, cotangent)

    return sigjax_backward


@dataclass(frozen=True)
class _Plan:
    """Which mesh axes shard the batch and the heads of one call.

    Attributes:
        mesh: of the call.
        batch: mesh axes of the batch.
        heads: mesh axes of the query heads.
        kv_heads: K of the whole arrays.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: int

    @property
    def shares_key_heads(self) -> bool:
        """Whether there are more devices than key heads, so that every device has them all."""
        return self.kv_heads % _size(self.mesh, self.heads) != 0

    def sharding(self, axes: str) -> NamedSharding:
        key_heads = () if self.shares_key_heads else self.heads
        names = {"b": self.batch, "n": self.heads, "k": key_heads}
        return NamedSharding(self.mesh, PartitionSpec(*(names.get(x) or None for x in axes)))

    def shardings(self, layout: Layout) -> tuple[Any, ...]:
        return tuple(None if axes is None else self.sharding(axes) for axes in layout)

    def own_key_heads(self, operands: Operands) -> Operands:
        """Of shared key heads, the one that this device's query heads read."""
        if not self.shares_key_heads:
            return operands
        key, value = (
            lax.dynamic_slice_in_dim(x, self._key_head(), 1, axis=2)
            for x in (operands.key, operands.value)
        )
        return operands._replace(key=key, value=value)

    def total(self, gradients: Gradients, layout: Layout, operands: Operands) -> Gradients:
        """Adds up the gradients of what devices share."""
        if self.shares_key_heads:
            key, value = (
                lax.dynamic_update_slice_in_dim(jnp.zeros_like(whole), x, self._key_head(), axis=2)
                for whole, x in ((operands.key, gradients.key), (operands.value, gradients.value))
            )
            gradients = gradients._replace(key=key, value=value)

        def total(x: Any, axes: str | None) -> Any:
            if x is None or axes is None:
                return x
            by_head = "n" in axes or ("k" in axes and not self.shares_key_heads)
            shared = (() if by_head else self.heads) + (() if "b" in axes else self.batch)
            return _sum_over(x, shared)

        return Gradients(*(total(x, axes) for x, axes in zip(gradients, layout, strict=True)))

    def _key_head(self) -> Array:
        return lax.axis_index(self.heads) // (_size(self.mesh, self.heads) // self.kv_heads)


def _plan(mesh: Mesh, operands: Any) -> _Plan:
    """Follows the query's sharding, as far as heads and batch can be divided."""
    batch, _, heads, _ = operands.query.shape
    kv_heads = operands.key.shape[2]
    spec = (*operands.query.sharding.spec, None, None, None)
    batch_axes, head_axes = _names(spec[0]), _names(spec[2])
    shards = _size(mesh, head_axes)
    if heads % shards or (kv_heads % shards and shards % kv_heads):
        head_axes = ()
    if batch % _size(mesh, batch_axes):
        batch_axes = ()
    return _Plan(mesh, batch_axes, head_axes, kv_heads)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _sum_over(x: Array, axes: tuple[str, ...]) -> Array:
    """The sum over devices, in float32 at least."""
    if not axes:
        return x
    return lax.psum(x.astype(compute_dtype(x.dtype)), axes).astype(x.dtype)


def _layout(operands: Operands) -> Layout:
    """The axes of each operand that is given, with ONE for what broadcasts."""
    batch, length, heads, _ = operands.query.shape
    sizes = {"b": batch, "t": length, "n": heads, "s": operands.key.shape[1]}

    def axes(name: str, x: Array | None) -> str | None:
        if x is None:
            return None
        letters = AXES[name]
        if operands.key.shape[2] == heads:
            # The same letter, so that a sharding of either reaches the other.
            letters = letters.replace("k", "n")
        pairs = zip(letters, x.shape, strict=True)
        return "".join(a if size == sizes.get(a, size) else ONE for a, size in pairs)

    return tuple(axes(name, x) for name, x in zip(Operands._fields, operands, strict=True))


def _given(layout: Layout) -> tuple[str, ...]:
    return tuple(letters for letters in layout if letters is not None)


def _rule(arguments: tuple[str, ...], results: tuple[str, ...]) -> dict[str, Any]:
    """The Shardy rule: letters are factors, each ONE a factor of its own."""
    ones = itertools.count()

    def factors(letters: str) -> str:
        return " ".join(f"one{next(ones)}" if x == ONE else x for x in letters)

    left, right = (", ".join(map(factors, side)) for side in (arguments, results))
    return {
        "sharding_rule": f"{left} -> {right}",
        "need_replication_factors": ("t", "h", "s"),  # in the order of their first use
    }


@contextlib.contextmanager
def _on_one_device(capability: int | None) -> Iterator[None]:
    """The context of one device's part, which is traced while XLA compiles.

    The caller's compile_for is over by then, and the mesh of a jax.set_mesh around the
    compilation does not apply within a part.
    """
    target = contextlib.nullcontext() if capability is None else compile_for(capability)
    with target, use_abstract_mesh(AbstractMesh((), ())):
        yield
