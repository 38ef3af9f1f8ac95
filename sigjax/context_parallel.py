"""Sigmoid attention of sequences that are sharded over devices.

Blocks of keys travel around a ring; every device adds what its queries get from each block.
Nothing is normalised, so partial sums are all there is to it. The next block is sent before
the current one is computed with, so that the transfer hides behind the computation. In the
backward pass the gradients of a block travel with it, so memory stays that of one block.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from sigjax import reference, ring
from sigjax.checks import check, check_implementation, compute_dtype
from sigjax.choice import choose
from sigjax.operands import Gradients, Operands
from sigjax.ring import Ring
from sigjax.vjp import OUTPUT_NAME


def context_parallel_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    mesh: Mesh,
    axis_name: str,
    batch_axis_name: str | None = None,
    head_axis_name: str | None = None,
    scale: float | None = None,
    sigmoid_bias: ArrayLike | None = None,
    key_bias: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    fast_sigmoid: bool = False,
    implementation: Literal["triton", "xla"] | None = None,
) -> Array:
    """``sigmoid_attention`` for sequences sharded over a mesh axis, as a ring.

    Takes and gives whole arrays, in their natural order, and equals ``sigmoid_attention``
    on one device, gradients included. T and S are sharded over axis_name by the call where
    they are not yet; within jit, arrays that already are so do not move.

    With is_causal, the second half of the sequence has more work than the first: the call
    itself deals the halves of each device's block out anew (device i computes parts i and
    2P - 1 - i of 2P), in one exchange of query, key and value before the ring and one of the
    output after it, so that all of P devices work alike at every step.

    B batch, T query length, S key length, N query heads, K key heads, H head size, P devices
    along axis_name.

    Args:
        query: [B, T, N, H]; bfloat16, float16 or float32. T is a multiple of P, of 2P with
            is_causal.
        key: [B, S, K, H], dtype of query; S as T, and equal to it with is_causal.
        value: shape and dtype of key.
        mesh: the devices.
        axis_name: mesh axis of the sequence.
        batch_axis_name: mesh axis of the batch; None where no axis shards it.
        head_axis_name: mesh axis of the heads, N and K; None where no axis shards them.
        scale: see ``sigmoid_attention``, as all that follow.
        sigmoid_bias: None is -log(number of valid keys) of the whole sequence.
        key_bias: [B, S].
        is_causal: query i sees key j only where j <= i.
        query_seq_lengths: [B] int32, of the whole sequences.
        key_value_seq_lengths: [B] int32, of the whole sequences.
        fast_sigmoid: of each block.
        implementation: what computes each block; partial sums are in float32.

    Returns:
        Shape and dtype of query, sharded over axis_name.

    Raises:
        ValueError: a shape or value is wrong, does not divide, or a mesh axis does not exist.
        TypeError: an argument's dtype or kind is wrong.
        NotImplementedError: the named implementation cannot serve the call, or is_causal
            with T unequal to S.

    Example:
        >>> import jax, jax.numpy as jnp, sigjax
        >>> mesh = jax.make_mesh((1,), ("sequence",))
        >>> x = jax.random.normal(jax.random.key(0), (1, 64, 2, 16))
        >>> y = sigjax.context_parallel_attention(x, x, x, mesh=mesh, axis_name="sequence")
        >>> y.shape
        (1, 64, 2, 16)
    """
    check_implementation(implementation)
    if getattr(query, "ndim", 4) != 4:
        msg = f"query must have shape [B, T, N, H], got {jnp.shape(query)}"
        raise ValueError(msg)
    operands, settings = check(
        query,
        key,
        value,
        None,
        None,
        scale=scale,
        sigmoid_bias=sigmoid_bias,
        key_bias=key_bias,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=None,
        fast_sigmoid=fast_sigmoid,
    )
    axes = (batch_axis_name, axis_name, head_axis_name)
    _check_mesh(mesh, axes, operands, is_causal=settings.is_causal)
    wide = compute_dtype(operands.query.dtype)
    # Of the whole sequence: a block does not know how many keys there are.
    bias = reference.row_bias(operands, wide)[:, :, 0]
    specs = _specs(operands._replace(sigmoid_bias=bias), *axes)
    operands = _placed(mesh, specs, operands._replace(sigmoid_bias=bias))
    configuration = Ring(
        implementation=choose(implementation, operands, settings),
        settings=replace(
            settings,
            result_dtype=wide,
            # The default bias is a matter of lengths alone.
            bias_gradients=sigmoid_bias is not None or key_bias is not None,
        ),
        axis_name=axis_name,
        head_axis_name=head_axis_name,
        devices=mesh.shape[axis_name],
    )
    return checkpoint_name(_attention(configuration, mesh, specs, operands), OUTPUT_NAME)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(configuration: Ring, mesh: Mesh, specs: Operands, operands: Operands) -> Array:
    return _on_mesh(mesh, partial(ring.forward, configuration), (specs,), specs.query)(operands)


def _forward_rule(
    configuration: Ring, mesh: Mesh, specs: Operands, operands: Operands
) -> tuple[Array, Operands]:
    return _attention(configuration, mesh, specs, operands), operands


def _backward_rule(
    configuration: Ring, mesh: Mesh, specs: Operands, operands: Operands, cotangent: Array
) -> tuple[Operands]:
    results = Gradients(*(getattr(specs, name) for name in Gradients._fields))
    backward = partial(ring.backward, configuration)
    cotangent = _placed(mesh, specs.query, cotangent)
    gradients = _on_mesh(mesh, backward, (specs, specs.query), results)(operands, cotangent)
    return (Operands(**gradients._asdict()),)


_attention.defvjp(_forward_rule, _backward_rule)


def _on_mesh(mesh: Mesh, function: Any, in_specs: Any, out_specs: Any) -> Any:
    # The rules above say what is replicated; shard_map need not prove it.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _specs(operands: Operands, batch: str | None, length: str, heads: str | None) -> Operands:
    spec = PartitionSpec
    rows = spec(batch, length, heads, None)
    specs = {
        **dict.fromkeys(("query", "key", "value"), rows),
        "sigmoid_bias": spec(batch, heads),
        "key_bias": spec(batch, length),
        **dict.fromkeys(("query_lengths", "key_lengths"), spec(batch)),
    }
    return Operands._make(
        None if x is None else specs[name] for name, x in operands._asdict().items()
    )


def _placed(mesh: Mesh, specs: Any, arrays: Any) -> Any:
    """On explicit axes shard_map takes arrays only where they already are."""
    if AxisType.Explicit not in mesh.axis_types:
        return arrays
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.tree.map(jax.sharding.reshard, arrays, shardings)


def _check_mesh(
    mesh: Mesh, axes: tuple[str | None, str, str | None], operands: Operands, *, is_causal: bool
) -> None:
    arguments = ("batch_axis_name", "axis_name", "head_axis_name")
    for name, axis in zip(arguments, axes, strict=True):
        if axis is not None and axis not in mesh.shape:
            msg = f"{name} must be an axis of mesh, {tuple(mesh.shape)}, got {axis!r}"
            raise ValueError(msg)
    given = [axis for axis in axes if axis is not None]
    if len(set(given)) != len(given):
        msg = f"axis_name, batch_axis_name and head_axis_name must differ, got {axes}"
        raise ValueError(msg)
    batch, length, heads, _ = operands.query.shape
    keys, kv_heads = operands.key.shape[1:3]
    if is_causal and length != keys:
        msg = f"is_causal is served where T equals S, got T = {length} and S = {keys}"
        raise NotImplementedError(msg)
    parts = 2 if is_causal else 1
    sizes = [("query", "T", length, axes[1], parts), ("key", "S", keys, axes[1], parts)]
    sizes += [("query", "B", batch, axes[0], 1), ("query", "N", heads, axes[2], 1)]
    sizes += [("key", "K", kv_heads, axes[2], 1)]
    for name, letter, size, axis, factor in sizes:
        devices = 1 if axis is None else mesh.shape[axis]
        if size % (factor * devices):
            msg = (
                f"{name} must have {letter} divisible by {factor * devices} "
                f"({factor} · {devices} devices along {axis!r}), got {letter} = {size}"
            )
            raise ValueError(msg)
