"""What benchmarks.variants measures: cells, their variants, and each as a compiled program."""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.jax_contenders import make_inputs
from benchmarks.measure import Plan
from benchmarks.variants_tiles import Sparsity
from sigjax.attention import sigmoid_attention
from sigjax.testing import DIRECTIONS, Direction, Workload, workload

type Implementation = Literal["triton", "xla"]
type Basis = Literal["tile", "time"]
type Kernels = Literal["portable", "hopper"]

PLAIN = "plain"
AXES = "BNTS"
SEGMENTS = 8  # of a row
# A launch of one of our kernels in an optimised program; XLA may rename the call's target.
KERNEL_CALL = re.compile(r'custom_call_target="[^"]*triton[^"]*"')


@dataclass(frozen=True)
class Claim:
    """A ratio to the plain call of the same round, above 1 is faster, that is claimed.

    Attributes:
        basis: "tile", time per visited tile, or "time" of a call.
        least: the ratio.
    """

    basis: Basis
    least: float


@dataclass(frozen=True)
class Variant:
    """A call that differs from the plain one in one argument, or in its operands alone.

    Attributes:
        name: what it is called in the results.
        claim: what is claimed of it; or None.
        bias: axes of [B, N, T, S] that its bias has, "NS" is [1, N, 1, S]; or None.
        bias_gradient: whether the backward pass asks for the gradient of the bias.
        mask: axes of its mask, likewise.
        window: local_window_size.
        segments: equal segments of a row.
        own_bias: whether sigmoid_bias is given, so that nobody counts the segments' keys.
        mapped: size of the axis that jax.vmap maps; the batch is split.
        rows: rows that each row of the operands is cut into.
        logits: by what queries, and so logits, are multiplied.
        peer: the variant without its argument that has as many keys a query, or logits as spread;
            what it is slower than that one by is its own doing.
    """

    name: str
    claim: Claim | None = None
    bias: str | None = None
    bias_gradient: bool = False
    mask: str | None = None
    window: int | None = None
    segments: int | None = None
    own_bias: bool = False
    mapped: int | None = None
    rows: int = 1
    logits: float = 1.0
    peer: str | None = None


@dataclass(frozen=True)
class Cell:
    """Variants that are measured against one another, the plain call first.

    Attributes:
        workload: the shape.
        direction: the pass.
        variants: the calls.
        kernels: which serve them all.
    """

    workload: Workload
    direction: Direction
    variants: tuple[Variant, ...]
    kernels: Kernels = "portable"

    @property
    def directions(self) -> str:
        """What hopper_choice.VARIABLE has to be, that its kernels serve them."""
        return "forward,backward,narrow" if self.kernels == "hopper" else ""

    @property
    def label(self) -> str:
        """Short text that tells cells apart."""
        return f"{self.workload.label} {self.direction}"


@dataclass(frozen=True)
class Suite:
    """All that one run measures.

    Attributes:
        shapes: of the variants.
        window: of the variant with a window, at their length.
        long: shapes of the long rows, full against a window.
        long_window: their window.
        hopper: of the variants that the Hopper kernels serve, by these.
        memory: the row whose memory is measured.
        plan: how long and how often.
        implementation: of every call.
        claims: whether ratios are judged.
    """

    shapes: tuple[Workload, ...]
    window: int
    long: tuple[Workload, ...]
    long_window: int
    memory: Workload
    plan: Plan
    implementation: Implementation
    hopper: tuple[Workload, ...] = ()
    claims: bool = True

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells in the order in which they are measured."""
        pair = (Variant(PLAIN), Variant("window", Claim("time", 12.0), window=self.long_window))
        return (
            tuple(
                Cell(shape, direction, self._judged(variants_of(direction, self.window)))
                for shape in self.shapes
                for direction in DIRECTIONS
            )
            + tuple(
                Cell(shape, direction, self._judged(pair))
                for shape in self.long
                for direction in DIRECTIONS
            )
            + tuple(
                Cell(
                    shape,
                    direction,
                    self._judged(hopper_variants(direction, self.window, shape.length)),
                    "hopper",
                )
                for shape in self.hopper
                for direction in DIRECTIONS
            )
        )

    def _judged(self, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        if self.claims:
            return variants
        return tuple(replace(variant, claim=None) for variant in variants)


def variants_of(direction: Direction, window: int) -> tuple[Variant, ...]:
    """The variants of one direction: the backward pass has its biases with and without gradient."""
    claim = Claim("tile", 0.8)
    biases = (Variant("bias", claim, bias="NTS"), Variant("bias per key", claim, bias="NS"))
    if direction == "backward":
        biases = tuple(
            one
            for bias in biases
            for one in (
                replace(bias, bias_gradient=True),
                replace(bias, name=f"{bias.name}, no gradient"),
            )
        )
    return (
        Variant(PLAIN),
        *biases,
        Variant("mask", claim, mask="BTS"),
        Variant("window", claim, window=window),
        Variant("segments", claim, segments=SEGMENTS),
        # Not claimed: beside "segments" it tells the kernels' time from the count's.
        Variant("segments, own bias", segments=SEGMENTS, own_bias=True),
        Variant("vmap", Claim("time", 0.97), mapped=4),
    )


def hopper_variants(direction: Direction, window: int, length: int) -> tuple[Variant, ...]:
    """The variants of one direction that the Hopper kernels serve, all but vmap, and their peers.

    A bias of variance 1 makes logits of variance 2, whose weights forward are computed in another
    way than small ones.
    """
    peers = {
        "segments": Variant("rows of a segment", rows=SEGMENTS),
        # A query sees window keys before it and behind.
        "window": Variant("rows of a window", rows=max(length // (2 * window), 1)),
    }
    if direction == "forward":
        peers["bias"] = Variant("logits as spread", logits=math.sqrt(2))
    served = (one for one in variants_of(direction, window) if one.mapped is None)
    return (
        *(replace(one, peer=peers[one.name].name) if one.name in peers else one for one in served),
        *peers.values(),
    )


def _named(name: str, shape: Workload) -> Workload:
    return replace(shape, name=name)


# Five rounds of 20 ms with 0.2 s of rest: all cells end within about two minutes.
FULL = Suite(
    shapes=tuple(_named("variants", workload("dense", 4096, h)) for h in (64, 128)),
    window=512,
    long=tuple(_named("long", workload("dense", 16384, h)) for h in (64, 128)),
    long_window=256,
    memory=Workload("memory", 1, 65536, 16, 64),
    plan=Plan(rounds=5, burst_ms=20, rest_s=0.2, retries=3, cool_s=3),
    implementation="triton",
    hopper=tuple(_named("hopper", workload("dense", 4096, h)) for h in (64, 128)),
)
SMALL = Suite(
    shapes=(Workload("variants", 4, 64, 2, 16),),
    window=8,
    long=(Workload("long", 1, 128, 2, 16),),
    long_window=4,
    memory=Workload("memory", 1, 256, 2, 16),
    plan=Plan(rounds=2, burst_ms=1, rest_s=0),
    implementation="xla",
    claims=False,
)


def shape_of(variant: Variant, shape: Workload) -> Workload:
    """The shape of a variant's operands, where the plain call's is so."""
    return replace(shape, batch=shape.batch * variant.rows, length=shape.length // variant.rows)


def sparsity(variant: Variant, shape: Workload) -> Sparsity:
    """What the variant's kernels may skip, and the bias whose gradient they compute."""
    return Sparsity(
        window=None if variant.window is None else (variant.window, variant.window),
        segments=None if variant.segments is None else segment_ids(shape, variant.segments),
        bias_shape=pair_shape(variant.bias, shape) if variant.bias_gradient else None,
        matrix=_matrix(variant),
    )


def _matrix(variant: Variant) -> Literal["bias", "mask"] | None:
    """What has a number for each query and key, as features.pairs_of finds it."""
    if (variant.bias or "").endswith("TS"):
        return "bias"
    return "mask" if (variant.mask or "").endswith("TS") else None


def segment_ids(shape: Workload, count: int) -> np.ndarray:
    """Equal segments in every row, [B, T] int32, numbered from 1 on.

    Raises:
        ValueError: count does not divide the length.
    """
    if shape.length % count:
        msg = f"segments must divide the length {shape.length}, got {count}"
        raise ValueError(msg)
    row = np.repeat(np.arange(1, count + 1, dtype=np.int32), shape.length // count)
    return np.tile(row, (shape.batch, 1))


def extras(variants: Sequence[Variant], shape: Workload) -> dict[str, Array]:
    """The arrays that variants take beside query, key and value, each made once."""
    keys = jax.random.split(jax.random.key(shape.seed + 1))
    made: dict[str, Array] = {}
    for variant in variants:
        if variant.bias is not None and f"bias {variant.bias}" not in made:
            size = pair_shape(variant.bias, shape)
            made[f"bias {variant.bias}"] = jax.random.normal(keys[0], size, shape.dtype)
        if variant.mask is not None and f"mask {variant.mask}" not in made:
            size = pair_shape(variant.mask, shape)
            made[f"mask {variant.mask}"] = jax.random.bernoulli(keys[1], 0.9, size)
        if variant.segments is not None and f"segments {variant.segments}" not in made:
            made[f"segments {variant.segments}"] = jnp.asarray(segment_ids(shape, variant.segments))
    return made


def arguments(variant: Variant, inputs: tuple[Array, ...], made: dict[str, Array]) -> Any:
    """(query, key, value, cotangent, the variant's own arrays) as function takes them."""
    if variant.mapped is not None:
        size = variant.mapped
        inputs = tuple(x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in inputs)
    if variant.rows > 1:
        inputs = tuple(x.reshape(-1, x.shape[1] // variant.rows, *x.shape[2:]) for x in inputs)
    if variant.logits != 1:
        inputs = (inputs[0] * jnp.asarray(variant.logits, inputs[0].dtype), *inputs[1:])
    own = {
        name: made[f"{name} {value}"]
        for name in ("bias", "mask", "segments")
        if (value := getattr(variant, name)) is not None
    }
    return (*inputs, own)


def function(
    variant: Variant, direction: Direction, implementation: Implementation
) -> Callable[..., Any]:
    """The call to time: the output, or the gradients alone, of arguments.

    The backward pass keeps nothing but its operands, so its output is never computed here.
    """

    def attention(query: Array, key: Array, value: Array, own: dict[str, Array]) -> Array:
        segments = own.get("segments")
        sigmoid_bias = None
        if variant.own_bias and variant.segments is not None:
            sigmoid_bias = -math.log(query.shape[-3] / variant.segments)
        return sigmoid_attention(
            query,
            key,
            value,
            own.get("bias"),
            own.get("mask"),
            sigmoid_bias=sigmoid_bias,
            local_window_size=variant.window,
            query_segment_ids=segments,
            key_value_segment_ids=segments,
            implementation=implementation,
        )

    mapped = attention
    if variant.mapped is not None:
        mapped = jax.vmap(attention, in_axes=(0, 0, 0, None))

    def forward(query: Array, key: Array, value: Array, _: Array, own: dict[str, Array]) -> Array:
        return mapped(query, key, value, own)

    def backward(
        query: Array, key: Array, value: Array, cotangent: Array, own: dict[str, Array]
    ) -> tuple[Any, ...]:
        if variant.bias_gradient:
            _, pullback = jax.vjp(mapped, query, key, value, own)
        else:
            _, pullback = jax.vjp(lambda q, k, v: mapped(q, k, v, own), query, key, value)
        return pullback(cotangent)

    return forward if direction == "forward" else backward


class Program:
    """One variant of a cell, compiled; `burst` times it.

    Args:
        variant: which.
        cell: where.
        implementation: of the call.
        given: its arguments, on the device.
    """

    def __init__(
        self, variant: Variant, cell: Cell, implementation: Implementation, given: Any
    ) -> None:
        self.name, self.variant, self._given = variant.name, variant, given
        call = function(variant, cell.direction, implementation)
        self._run = jax.jit(call).lower(*given).compile()
        self.kernels = len(KERNEL_CALL.findall(self._run.as_text() or ""))

    def burst(self, calls: int) -> float:
        """Enqueues calls back to back after one that is not timed; milliseconds per call."""
        # Only a GPU is certain to finish calls in their order: elsewhere wait for each.
        in_order = jax.default_backend() == "gpu"
        result = jax.block_until_ready(self._run(*self._given))
        start = time.perf_counter()
        for _ in range(calls):
            result = self._run(*self._given)
            if not in_order:
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls * 1e3


def operands(shape: Workload) -> tuple[Array, ...]:
    """Query, key, value and cotangent of a workload."""
    made = make_inputs(shape)
    return (made.query, made.key, made.value, made.cotangent)


def pair_shape(axes: str | None, shape: Workload) -> tuple[int, ...]:
    """The shape of an array with these axes of [B, N, T, S]."""
    sizes = (shape.batch, shape.heads, shape.length, shape.length)
    return tuple(
        size if letter in (axes or "") else 1 for letter, size in zip(AXES, sizes, strict=True)
    )
