"""What is measured on several devices: compiled programs, their inputs and what they compute."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sigjax
from benchmarks.devices_model import Scaling, count_collectives, ring_bytes
from benchmarks.devices_sizes import Sizes

AXIS = "d"
BATCH, LENGTH, HEADS = P(AXIS), P(None, AXIS), P(None, None, AXIS)
FORWARD, BOTH = "forward", "forward+backward"
FLOPS_PER_PAIR = {FORWARD: 4.0, BOTH: 14.0}

type Build = Callable[[], "Cell"]
type Arrays = tuple[Array, ...]


@dataclass(frozen=True)
class Equality:
    """How far several devices' results are from one device's.

    Attributes:
        bitwise: whether all of them are the same bits.
        output: largest error of the output (of the loss, in train) over its largest value.
        gradients: the worst gradient's, likewise; None in a forward pass.
    """

    bitwise: bool
    output: float
    gradients: float | None = None


@dataclass(frozen=True)
class Sends:
    """A ring's communication alone.

    Attributes:
        call: sends all blocks and sums that the ring sends.
        bytes: that each device sends in a call.
    """

    call: Callable[[], Any]
    bytes: int


@dataclass(frozen=True)
class Work:
    """One contender of a cell, compiled and run once.

    Attributes:
        devices: it runs on.
        batch: B, of all its devices.
        call: runs it.
        collectives: in its compiled program, see count_collectives.
        equality: with one device; None on one device.
        sends: of a ring; None elsewhere.
    """

    devices: int
    batch: int
    call: Callable[[], Any]
    collectives: Mapping[str, int]
    equality: Equality | None = None
    sends: Sends | None = None


@dataclass(frozen=True)
class Cell:
    """The same work on several numbers of devices.

    Attributes:
        part: "op", "train" or "context".
        case: what is sharded.
        direction: FORWARD, BOTH, or "step".
        scaling: whether work grows with the devices.
        length: T.
        heads: N.
        head_size: H.
        dtype: of the computation.
        works: by number of devices, 1 first.
    """

    part: str
    case: str
    direction: str
    scaling: Scaling
    length: int
    heads: int
    head_size: int
    dtype: str
    works: tuple[Work, ...]


@dataclass(frozen=True)
class Program:
    """A compiled function."""

    call: Callable[..., Any]
    collectives: Mapping[str, int]


def compile_program(function: Callable[..., Any], *arguments: Any, **options: Any) -> Program:
    """Compiles for the arguments' shapes and devices; options as jax.jit's."""
    compiled = jax.jit(function, **options).lower(*arguments).compile()
    return Program(compiled, count_collectives(compiled.as_text() or ""))


def first_devices(count: int) -> Mesh:
    """A mesh of the first devices, along AXIS."""
    return jax.make_mesh(
        (count,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )


def placed(arrays: Any, count: int, spec: P) -> Any:
    """Arrays sharded over the first devices."""
    return jax.device_put(arrays, NamedSharding(first_devices(count), spec))


def normal(count: int, shape: tuple[int, ...]) -> Arrays:
    """Standard normal arrays in bfloat16, on the first device."""
    keys = jax.random.split(jax.random.key(0), count)
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys)


def with_gradients(attention: Callable[..., Array]) -> Callable[..., Arrays]:
    """Output and gradients of query, key and value, from these and the cotangent."""

    def both(query: Array, key: Array, value: Array, cotangent: Array) -> Arrays:
        output, pull = jax.vjp(attention, query, key, value)
        return (output, *pull(cotangent))

    return both


def equality(got: Arrays, expected: Arrays) -> Equality:
    """Compares an output and perhaps gradients, wherever they are."""
    device = jax.devices()[0]
    errors, same = [], []
    for one, other in zip(got, expected, strict=True):
        error, equal = _compared(jax.device_put(one, device), jax.device_put(other, device))
        errors.append(float(error))
        same.append(bool(equal))
    # numpy's max keeps a NaN, Python's does not.
    return Equality(all(same), errors[0], float(np.max(errors[1:])) if errors[1:] else None)


def worst(equalities: list[Equality]) -> Equality:
    """One of several parts of the same results."""
    gradients = [x.gradients for x in equalities if x.gradients is not None]
    return Equality(
        all(x.bitwise for x in equalities),
        float(np.max([x.output for x in equalities])),
        float(np.max(gradients)) if gradients else None,
    )


@jax.jit
def _compared(one: Array, other: Array) -> tuple[Array, Array]:
    wide, expected = one.astype(jnp.float32), other.astype(jnp.float32)
    largest = jnp.maximum(jnp.abs(expected).max(), jnp.finfo(jnp.float32).tiny)
    return jnp.abs(wide - expected).max() / largest, jnp.all(one == other)


@dataclass(frozen=True)
class Op:
    """sigmoid_attention with its batch, then its heads, over the devices."""

    sizes: Sizes
    counts: tuple[int, ...]
    _programs: dict[tuple[str, str, int], Program] = field(default_factory=dict)

    def cells(self) -> Iterator[tuple[str, Build]]:
        """Labels and what builds the cells."""
        for direction in (FORWARD, BOTH):
            for case in ("batch", "heads"):
                yield f"op, {case}, {direction}", partial(self._cell, case, direction)

    def _cell(self, case: str, direction: str) -> Cell:
        sizes = self.sizes
        return Cell(
            part="op",
            case=case,
            direction=direction,
            scaling="weak" if case == "batch" else "strong",
            length=sizes.length,
            heads=sizes.heads,
            head_size=sizes.head_size,
            dtype="bfloat16",
            works=tuple(self._work(case, direction, count) for count in self.counts),
        )

    def _work(self, case: str, direction: str, count: int) -> Work:
        batch = self.sizes.batch * (count if case == "batch" else 1)
        arrays = [x[:batch] for x in self._inputs[: 3 if direction == FORWARD else 4]]
        given = placed(arrays, count, BATCH if case == "batch" else HEADS)
        program = self._program(case, direction, count, given)
        got = program.call(*given)
        compared = None if count == 1 else self._equality(direction, arrays, got)
        call = partial(program.call, *given)
        return Work(count, batch, call, program.collectives, compared)

    def _equality(self, direction: str, arrays: list[Array], got: Arrays) -> Equality:
        """Sequence by sequence of one device's batch, by the program that is timed on one."""
        got = tuple(jax.device_put(x, jax.devices()[0]) for x in got)
        found = []
        for start in range(0, arrays[0].shape[0], self.sizes.batch):
            rows = slice(start, start + self.sizes.batch)
            given = placed([x[rows] for x in arrays], 1, BATCH)
            expected = self._program("batch", direction, 1, given).call(*given)
            found.append(equality(tuple(x[rows] for x in got), expected))
        return worst(found)

    def _program(self, case: str, direction: str, count: int, given: list[Array]) -> Program:
        # On one device both cases are the same.
        key = ("batch" if count == 1 else case, direction, count)
        if key not in self._programs:
            attention = partial(sigjax.sigmoid_attention, implementation=self.sizes.implementation)
            function = (
                with_gradients(attention)
                if direction == BOTH
                else lambda *operands: (attention(*operands),)
            )
            self._programs[key] = compile_program(function, *given)
        return self._programs[key]

    @cached_property
    def _inputs(self) -> Arrays:
        sizes = self.sizes
        batch = sizes.batch * max(self.counts)
        return normal(4, (batch, sizes.length, sizes.heads, sizes.head_size))


@dataclass(frozen=True)
class Context:
    """context_parallel_attention against sigmoid_attention of the whole on one device."""

    sizes: Sizes
    counts: tuple[int, ...]

    def cells(self) -> Iterator[tuple[str, Build]]:
        """Labels and what builds the cells."""
        for length, heads in self.sizes.contexts:
            yield f"context, {length:,} tokens, {BOTH}", partial(self._cell, length, heads)

    def _cell(self, length: int, heads: int) -> Cell:
        arrays = normal(4, (1, length, heads, self.sizes.head_size))
        whole = partial(sigjax.sigmoid_attention, implementation=self.sizes.implementation)
        given = placed(arrays, 1, LENGTH)
        one = compile_program(with_gradients(whole), *given)
        expected = one.call(*given)
        works = [Work(1, 1, partial(one.call, *given), one.collectives)]
        works += [self._ring(count, arrays, expected) for count in self.counts if count > 1]
        return Cell(
            part="context",
            case="sequence",
            direction=BOTH,
            scaling="strong",
            length=length,
            heads=heads,
            head_size=self.sizes.head_size,
            dtype="bfloat16",
            works=tuple(works),
        )

    def _ring(self, count: int, arrays: Arrays, expected: Arrays) -> Work:
        mesh = first_devices(count)
        attention = partial(
            sigjax.context_parallel_attention,
            mesh=mesh,
            axis_name=AXIS,
            implementation=self.sizes.implementation,
        )
        given = placed(arrays, count, LENGTH)
        program = compile_program(with_gradients(attention), *given)
        compared = equality(program.call(*given), expected)
        call = partial(program.call, *given)
        sends = ring_sends(mesh, given[1], given[2])
        return Work(count, 1, call, program.collectives, compared, sends)


def ring_sends(mesh: Mesh, key: Array, value: Array) -> Sends:
    """All that a ring's forward and backward pass send, each send after the one before."""
    count = mesh.size
    following = [(i, (i + 1) % count) for i in range(count)]

    def sent(blocks: Arrays, journeys: int) -> Arrays:
        for _ in range(journeys):
            blocks = tuple(jax.lax.ppermute(x, AXIS, following) for x in blocks)
        return blocks

    def local(*arrays: Array) -> Arrays:
        return (*sent(arrays[:2], 2 * (count - 1)), *sent(arrays[2:], count))

    # A device's sums are float32 whatever the dtype of keys.
    sums = tuple(x.astype(jnp.float32) for x in (key, value))
    given = (key, value, *sums)
    ring = jax.shard_map(local, mesh=mesh, in_specs=LENGTH, out_specs=LENGTH)
    program = compile_program(ring, *given)
    jax.block_until_ready(program.call(*given))
    size = ring_bytes(key.size // count, key.dtype.itemsize, sums[0].dtype.itemsize, count)
    return Sends(partial(program.call, *given), size)
