"""Static length buckets: few padded shapes, so that jit compiles few programs."""

import itertools
import operator
from collections import deque
from dataclasses import dataclass
from typing import SupportsIndex, overload

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class LengthBuckets:
    """The padded lengths that sequences are brought to; hashable, so a static argument of jit.

    Attributes:
        edges: padded lengths in tokens, at least 1 and increasing.

    Raises:
        ValueError: edges are empty, not increasing or below 1.
        TypeError: an edge is no integer.

    Example:
        >>> from sigjax import LengthBuckets
        >>> buckets = LengthBuckets.fit([90, 100, 700, 760], count=2, multiple=128)
        >>> buckets.edges
        (128, 768)
        >>> buckets.assign([100, 129]).tolist()
        [0, 1]
    """

    edges: tuple[int, ...]

    def __post_init__(self) -> None:
        edges = tuple(_as_int("edges", edge) for edge in self.edges)
        if not edges or edges[0] < 1 or any(a >= b for a, b in itertools.pairwise(edges)):
            msg = f"edges must be at least one length, at least 1 and increasing, got {edges}"
            raise ValueError(msg)
        object.__setattr__(self, "edges", edges)

    @classmethod
    def fit(cls, lengths: ArrayLike, *, count: int, multiple: int = 128) -> "LengthBuckets":
        """The buckets that pad the given lengths least.

        Of all sets of at most `count` positive multiples of `multiple` whose last
        reaches the longest length, one with the least sum of edge - length.

        Args:
            lengths: observed lengths in tokens, integers of any shape; 0 is allowed.
            count: the most edges.
            multiple: every edge is a multiple of it.

        Returns:
            Buckets whose last edge is the longest length, rounded up.

        Raises:
            ValueError: lengths are empty or negative, or count or multiple is below 1.
            TypeError: lengths, count or multiple are no integers.
        """
        count, multiple = _at_least_one("count", count), _at_least_one("multiple", multiple)
        observed = _as_lengths(lengths)
        if observed.size == 0:
            msg = "lengths must hold at least one length, got none"
            raise ValueError(msg)
        rounded = np.maximum(-(-observed // multiple), 1) * multiple
        candidates, repeats = np.unique(rounded, return_counts=True)
        return cls(_least_padding(candidates.tolist(), np.cumsum(repeats).tolist(), count))

    def assign(self, lengths: ArrayLike) -> np.ndarray:
        """The bucket of each length: the index of the smallest edge that holds it.

        Args:
            lengths: in tokens, integers of any shape.

        Returns:
            int array of the shape of lengths.

        Raises:
            ValueError: a length is negative or exceeds the last edge.
            TypeError: lengths are no integers.
        """
        checked = _as_lengths(lengths)
        if checked.size and checked.max() > self.edges[-1]:
            msg = f"lengths must not exceed the last edge {self.edges[-1]}, got {checked.max()}"
            raise ValueError(msg)
        return np.searchsorted(np.asarray(self.edges), checked)

    def padded_length(self, length: int) -> int:
        """The edge of the bucket of one length.

        Raises:
            ValueError: the length is negative or exceeds the last edge.
            TypeError: the length is no integer.
        """
        return self.edges[int(self.assign(_as_int("length", length)))]

    @overload
    def pad(self, array: jax.Array, *, axis: int, fill_value: float = 0) -> jax.Array: ...
    @overload
    def pad(self, array: np.ndarray, *, axis: int, fill_value: float = 0) -> np.ndarray: ...
    def pad(
        self, array: jax.Array | np.ndarray, *, axis: int, fill_value: float = 0
    ) -> jax.Array | np.ndarray:
        """Pads the end of one axis to the edge of its bucket.

        Args:
            array: NumPy or JAX array; under jit its shape is static, and so is the result's.
            axis: the axis to pad, counted from the end where negative.
            fill_value: what the padding holds.

        Returns:
            Array of the same kind and dtype.

        Raises:
            ValueError: array has no such axis, the axis is longer than the last edge, or
                the array's integer dtype cannot hold fill_value.
            TypeError: array is no array.
        """
        if not isinstance(array, jax.Array | np.ndarray):
            msg = f"array must be a NumPy or JAX array, got {type(array).__name__}"
            raise TypeError(msg)
        if not -array.ndim <= axis < array.ndim:
            msg = f"axis must be an axis of array with shape {array.shape}, got {axis}"
            raise ValueError(msg)
        _check_fill_value(fill_value, array.dtype)
        length = array.shape[axis]
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, self.padded_length(length) - length)
        pad = jnp.pad if isinstance(array, jax.Array) else np.pad
        return pad(array, widths, constant_values=fill_value)

    def waste(self, lengths: ArrayLike) -> float:
        """The share of padding among the tokens of the padded sequences, from 0 to 1.

        Raises:
            ValueError: lengths are empty or negative, or one exceeds the last edge.
            TypeError: lengths are no integers.
        """
        checked = _as_lengths(lengths)
        if checked.size == 0:
            msg = "lengths must hold at least one length, got none"
            raise ValueError(msg)
        tokens = int(np.asarray(self.edges)[self.assign(checked)].sum())
        return 1.0 - int(checked.sum()) / tokens


def _least_padding(candidates: list[int], cumulative: list[int], count: int) -> tuple[int, ...]:
    """The at most `count` of the candidate edges that pad least, the last always among them.

    Dynamic programming over prefixes of the candidates: with one more bucket, whose edge
    is the last of the prefix and which begins after the first i candidates,

        cost[p] = min over i < p of cost_before[i] + edge[p] · (lengths[p] - lengths[i])

    where lengths[p] counts the lengths in the prefix. Python integers keep it exact.
    """
    edges, lengths = [0, *candidates], [0, *cumulative]
    cost = [edge * n for edge, n in zip(edges, lengths, strict=True)]
    begins = []
    for _ in range(min(count, len(candidates)) - 1):
        cost, begin = _one_more_bucket(cost, edges, lengths)
        begins.append(begin)
    chosen, prefix = [], len(candidates)
    for begin in reversed(begins):
        chosen.append(edges[prefix])
        prefix = begin[prefix]
    chosen.append(edges[prefix])
    return tuple(reversed(chosen))


def _one_more_bucket(
    cost: list[int], edges: list[int], lengths: list[int]
) -> tuple[list[int], list[int]]:
    """The costs of every prefix with one more bucket, and where that bucket begins.

    In edge[p], each i is a line of slope -lengths[i]. Slopes fall and edges grow, so the
    lines that are ever lowest form a queue: linear time (the convex hull trick).
    """
    queue: deque[int] = deque()
    better, begin = [0], [0]
    for p in range(1, len(edges)):
        _append_line(queue, p - 1, cost, lengths)
        edge = edges[p]
        while len(queue) > 1 and (
            cost[queue[1]] - edge * lengths[queue[1]] <= cost[queue[0]] - edge * lengths[queue[0]]
        ):
            queue.popleft()
        best = queue[0]
        better.append(cost[best] + edge * (lengths[p] - lengths[best]))
        begin.append(best)
    return better, begin


def _append_line(queue: deque[int], new: int, cost: list[int], lengths: list[int]) -> None:
    """Appends a line and drops the ones that it leaves nowhere lowest."""
    while len(queue) > 1:
        first, middle = queue[-2], queue[-1]
        to_new = (cost[new] - cost[first]) * (lengths[middle] - lengths[first])
        to_middle = (cost[middle] - cost[first]) * (lengths[new] - lengths[first])
        if to_new > to_middle:
            break
        queue.pop()
    queue.append(new)


def _as_lengths(lengths: ArrayLike) -> np.ndarray:
    array = np.asarray(lengths)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        msg = f"lengths must be integers, got {array.dtype}"
        raise TypeError(msg)
    array = array.astype(np.int64)
    if array.size and array.min() < 0:
        msg = f"lengths must not be negative, got {array.min()}"
        raise ValueError(msg)
    return array


def _check_fill_value(fill_value: float, dtype: np.dtype) -> None:
    if jnp.issubdtype(dtype, jnp.inexact):
        return
    low, high = (0, 1) if dtype == np.bool_ else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if not low <= fill_value <= high or fill_value != int(fill_value):
        msg = f"fill_value must be a value of dtype {dtype}, got {fill_value}"
        raise ValueError(msg)


def _as_int(name: str, value: SupportsIndex) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        msg = f"{name} must be an integer, got {value!r}"
        raise TypeError(msg)
    return operator.index(value)


def _at_least_one(name: str, value: int) -> int:
    value = _as_int(name, value)
    if value < 1:
        msg = f"{name} must be at least 1, got {value}"
        raise ValueError(msg)
    return value
