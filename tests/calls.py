"""Small calls of the op with every kind of operand, shared by the tests of transformations."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sigjax

type Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call; small by default."""

    batch: int = 2
    length: int = 5
    keys: int = 7
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 8

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every operand by name."""
        batch, length, keys, heads = self.batch, self.length, self.keys, self.heads
        return {
            "query": (batch, length, heads, self.head_size),
            "key": (batch, keys, self.kv_heads, self.head_size),
            "value": (batch, keys, self.kv_heads, self.head_size),
            "bias": (batch, heads, length, keys),
            "shared_bias": (1, 1, length, keys),
            "row_bias": (length, 1),
            "mask": (batch, 1, length, keys),
            "shared_mask": (length, keys),
            "sigmoid_bias": (heads,),
            "batch_sigmoid_bias": (batch, 1),
            "key_bias": (batch, keys),
            "query_seq_lengths": (batch,),
            "key_value_seq_lengths": (batch,),
            "query_segment_ids": (batch, length),
            "key_value_segment_ids": (batch, keys),
        }


SMALL = Sizes()
SHAPES = SMALL.shapes()
# Which argument of the op a named operand above is.
ARGUMENTS = {
    "shared_bias": "bias",
    "row_bias": "bias",
    "shared_mask": "mask",
    "batch_sigmoid_bias": "sigmoid_bias",
}
INTEGER = ("mask", "shared_mask", *(name for name in SHAPES if name.endswith(("lengths", "ids"))))


@dataclass(frozen=True)
class Call:
    """One call: operands beside query, key and value, and static options."""

    extras: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Every array of the call."""
        return ("query", "key", "value", *self.extras)

    @property
    def floats(self) -> tuple[str, ...]:
        """The differentiable arrays of the call."""
        return tuple(name for name in self.names if name not in INTEGER)

    def arrays(self, leading: tuple[int, ...] = (), seed: int = 0, sizes: Sizes = SMALL) -> Arrays:
        """Operands by name, with more axes in front."""
        rng = np.random.default_rng(seed)
        shapes = sizes.shapes()
        return {name: _draw(rng, name, (*leading, *shapes[name]), sizes) for name in self.names}

    def __call__(self, arrays: Arrays, implementation: str | None = None) -> jax.Array:
        """The op's output."""
        given = {ARGUMENTS.get(name, name): x for name, x in arrays.items()}
        arguments: dict[str, Any] = {**given, **self.options, "implementation": implementation}
        return sigjax.sigmoid_attention(**arguments)

    def loss(self, arrays: Arrays) -> jax.Array:
        """A scalar in which every element of the output has its own weight."""
        output = self(arrays)
        weights = jnp.cos(jnp.arange(output.size, dtype=output.dtype)).reshape(output.shape)
        return (weights * output).sum()

    def gradients(self, arrays: Arrays) -> Arrays:
        """The loss's gradients by the operands' names."""

        def loss(floats: Arrays) -> jax.Array:
            return self.loss({**arrays, **floats})

        return jax.grad(loss)({name: arrays[name] for name in self.floats})

    def both(self, arrays: Arrays) -> Arrays:
        """The output and the gradients."""
        return {"output": self(arrays), **self.gradients(arrays)}


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], sizes: Sizes) -> jax.Array:
    if "mask" in name:
        return jnp.asarray(rng.random(shape) < 0.7)
    if name.endswith("ids"):
        return jnp.asarray(np.sort(rng.integers(0, 3, shape)), jnp.int32)
    if name.endswith("lengths"):
        longest = sizes.length if name.startswith("query") else sizes.keys
        return jnp.asarray(rng.integers(0, longest + 1, shape), jnp.int32)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


CALLS: dict[str, Call] = {
    "plain": Call(),
    "causal": Call(options={"is_causal": True}),
    "lengths": Call(("query_seq_lengths", "key_value_seq_lengths")),
    "head bias": Call(("sigmoid_bias", "key_bias")),
    "batch bias": Call(("batch_sigmoid_bias", "key_value_seq_lengths")),
    "bias and mask": Call(("bias", "mask")),
    "shared bias and mask": Call(("shared_bias", "shared_mask"), {"local_window_size": (2, 3)}),
    "row bias": Call(("row_bias", "key_bias"), {"scale": 0.7}),
    "segments": Call(("query_segment_ids", "key_value_segment_ids")),
    "everything": Call(
        (
            "bias", "mask", "sigmoid_bias", "key_bias", "query_seq_lengths",
            "key_value_seq_lengths", "query_segment_ids", "key_value_segment_ids",
        ),
        {"is_causal": True},
    ),
}  # fmt: skip


def assert_equal(got: Any, want: Any) -> None:
    """Equal up to float32 rounding, leaf by leaf."""
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5, err_msg=jax.tree_util.keystr(path))
