"""The contenders that run in this process, through JAX."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import sigjax
from sigjax.testing import Direction, Workload

type Attention = Callable[[Array, Array, Array, Array | None], Array]

# jax.nn's "xla" forms every logit in float32 and keeps weights for the backward pass.
JAX_XLA_LONGEST = 4096


class Inputs(NamedTuple):
    """The operands of a workload, [B, T, N, H] each, and its lengths, [B] int32 or None."""

    query: Array
    key: Array
    value: Array
    cotangent: Array
    lengths: Array | None

    def map_arrays(self, change: Callable[[Array], Array]) -> "Inputs":
        """The same with all but the lengths changed."""
        query, key, value, cotangent = (change(x) for x in self[:4])
        return Inputs(query, key, value, cotangent, self.lengths)


def make_inputs(workload: Workload) -> Inputs:
    """Standard normal operands, padding included: zeros would run faster than data does."""
    shape = (workload.batch, workload.length, workload.heads, workload.head_size)
    keys = jax.random.split(jax.random.key(workload.seed), 4)
    query, key, value, cotangent = (
        jax.random.normal(key, shape, jnp.dtype(workload.dtype)) for key in keys
    )
    lengths = None if workload.lengths is None else jnp.array(workload.lengths, jnp.int32)
    return Inputs(query, key, value, cotangent, lengths)


def _sigjax(implementation: Any, *, fast_sigmoid: bool = False) -> Attention:
    def attention(query: Array, key: Array, value: Array, lengths: Array | None) -> Array:
        return sigjax.sigmoid_attention(
            query,
            key,
            value,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            fast_sigmoid=fast_sigmoid,
            implementation=implementation,
        )

    return attention


def _softmax(implementation: Any) -> Attention:
    def attention(query: Array, key: Array, value: Array, lengths: Array | None) -> Array:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation=implementation,
        )

    return attention


ATTENTIONS: dict[str, Attention] = {
    "sigjax": _sigjax("triton"),
    "sigjax_fast": _sigjax("triton", fast_sigmoid=True),  # by the hardware's tanh where served
    "sigjax_xla": _sigjax("xla"),
    "jax_cudnn": _softmax("cudnn"),
    "jax_xla": _softmax("xla"),
}
OWN = ("sigjax", "sigjax_fast", "sigjax_xla")
FAST = ("sigjax_fast",)  # whose output, not its gradients, is off by what fast_sigmoid documents


class JaxContender:
    """One attention function, its forward pass or its backward pass alone.

    The backward pass is the vjp function that one jitted call returns and another
    one takes as an argument, as its leaves: residuals are made beforehand and no
    Python code of the pytree runs between two timed calls.

    Args:
        name: a key of ATTENTIONS.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        attention = ATTENTIONS[name]

        def with_pullback(query: Array, key: Array, value: Array, lengths: Array | None) -> Any:
            return jax.vjp(lambda q, k, v: attention(q, k, v, lengths), query, key, value)

        self._forward = jax.jit(attention)
        self._with_pullback = jax.jit(with_pullback)
        self._pulls: dict[Any, Callable[..., Any]] = {}
        self._call: Callable[[], Any] | None = None

    def refusal(self, workload: Workload) -> str | None:
        """Why this contender is not tried on a workload; None where it is."""
        if self.name == "jax_xla" and workload.length > JAX_XLA_LONGEST:
            return f"its T x S logits are kept to T <= {JAX_XLA_LONGEST}"
        return None

    def forward(self, inputs: Inputs) -> Array:
        """The output, [B, T, N, H]."""
        return self._forward(*inputs[:3], inputs.lengths)

    def gradients(self, inputs: Inputs) -> tuple[Array, Array, Array]:
        """The gradients of query, key and value for the inputs' cotangent."""
        return self._backward_call(inputs)()

    def prepare(self, workload: Workload, inputs: Inputs, direction: Direction) -> None:
        """Makes what the direction needs and runs it once, so that it is compiled."""
        del workload
        if direction == "forward":
            self._call = partial(self._forward, *inputs[:3], inputs.lengths)
        else:
            self._call = self._backward_call(inputs)
        jax.block_until_ready(self._call())

    def burst(self, calls: int) -> float:
        """Enqueues calls back to back after one that is not timed; milliseconds per call.

        Raises:
            RuntimeError: prepare was not called.
        """
        if self._call is None:
            msg = f"{self.name} must be prepared before a burst"
            raise RuntimeError(msg)
        call = self._call
        # Only a GPU is certain to finish calls in their order: elsewhere wait for each.
        in_order = jax.default_backend() == "gpu"
        result = jax.block_until_ready(call())
        start = time.perf_counter()
        for _ in range(calls):
            result = call() if in_order else jax.block_until_ready(call())
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls * 1e3

    def release(self) -> None:
        """Lets go of inputs and residuals; what was compiled stays."""
        self._call = None

    def _backward_call(self, inputs: Inputs) -> Callable[[], Any]:
        _, pullback = self._with_pullback(*inputs[:3], inputs.lengths)
        leaves, structure = jax.tree.flatten(pullback)
        if structure not in self._pulls:
            self._pulls[structure] = jax.jit(partial(_pull, structure))
        return partial(self._pulls[structure], leaves, inputs.cotangent)


def _pull(structure: Any, leaves: list[Array], cotangent: Array) -> tuple[Array, Array, Array]:
    return jax.tree.unflatten(structure, leaves)(cotangent)
