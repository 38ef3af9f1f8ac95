"""The Hopper kernels in NumPy: their source runs with stand-ins for Gluon, on the CPU.

Each warpgroup of a program is a thread, and barriers are counted as the hardware counts them: a
warpgroup that waits for what never comes raises an error. Products are computed where they are
started, in float32; what the hardware does asynchronously is not emulated. One warpgroup may be
made slow, so that the others meet it where it rarely is.
"""

import builtins
import math
import threading
import time
from functools import cache
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import triton.language as tl

from sigjax import kernels, reference
from sigjax.choice import compile_for
from sigjax.kernels import (
    hopper_backward_launch,
    hopper_bias_launch,
    hopper_launch,
    hopper_math,
    hopper_operands,
    hopper_weights,
    launch,
)
from sigjax.kernels.bias_gradient import bias_gradient_kernel
from sigjax.kernels.hopper_backward import hopper_backward_kernel
from sigjax.kernels.segments import segment_kernel, tile_ranges
from sigjax.kernels.tiles import BiasTile, ForwardTile
from sigjax.operands import Gradients, Operands, Settings

PLAIN = ("pairs", "tile_math")  # modules of plain Triton that the Hopper kernels take functions of
SECONDS = 20  # after which a wait is one without end
PAUSE = 0.001  # seconds that a slow warpgroup takes before it waits or arrives
KERNELS = Path(kernels.__file__).parent
FLOAT32 = np.dtype("float32")


class Tile(np.ndarray):
    """A tensor of registers."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype: Any) -> "Tile":
        return self.astype(dtype).view(Tile)

    def permute(self, order: tuple[int, ...]) -> "Tile":
        return self.transpose(order).view(Tile)


class Scalar(int):
    """A scalar of a program; C's division is that of Python where nothing is negative."""

    def to(self, dtype: Any) -> Any:
        return np.float32(self) if dtype == FLOAT32 else self


def _closed(method: Any) -> Any:
    def closed(self: Scalar, other: Any) -> Any:
        result = method(self, other)
        return result if result is NotImplemented else Scalar(result)

    return closed


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(Scalar, f"__{_name}__", _closed(getattr(int, f"__{_name}__")))


class Pointer:
    """Elements of a flat array, at one offset or at a tile of them."""

    def __init__(self, array: np.ndarray, offset: Any = 0) -> None:
        self.array, self.offset = array, offset
        self.dtype = SimpleNamespace(element_ty=array.dtype)

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.array, self.offset + np.asarray(other))


class Buffer:
    """Shared memory: a view of an array, or of barriers."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def index(self, i: int) -> Any:
        inside = self.array[i]
        return inside[0] if self.dtype == object else Buffer(inside)

    def slice(self, start: int, length: int, dim: int = 0) -> "Buffer":
        cut = (slice(None),) * dim + (slice(start, start + length),)
        return Buffer(self.array[cut])

    def permute(self, order: tuple[int, ...]) -> "Buffer":
        return Buffer(self.array.transpose(order))

    def reshape(self, shape: list[int]) -> "Buffer":
        return Buffer(self.array.reshape(shape))

    def load(self, layout: Any) -> Tile:
        del layout
        return self.array.copy().view(Tile)

    def store(self, values: np.ndarray) -> None:
        assert values.shape == self.array.shape
        self.array[...] = values


class Barrier:
    """An mbarrier: phases that end once all arrived and all announced bytes are there."""

    lock = threading.RLock()  # of all: a program's warpgroups take turns

    def __init__(self) -> None:
        self.changed = threading.Condition(self.lock)
        self.count, self.phases, self.pending, self.bytes = 0, 0, 0, 0

    def update(self, arrivals: int, announced: int) -> None:
        with self.lock:
            self.pending -= arrivals
            self.bytes += announced
            assert self.pending >= 0, "more arrivals than a phase has"
            assert self.bytes >= 0, "more bytes than were announced"
            if not self.pending and not self.bytes:
                self.phases += 1
                self.pending = self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.lock:
            ended = self.changed.wait_for(lambda: self.phases & 1 != parity, SECONDS)
        assert ended, "a warpgroup waits without end"


class Descriptor:
    """A TMA view of an array, as hopper_operands and hopper_matrices make it."""

    def __init__(self, given: Any) -> None:
        rows = np.array(given.base)
        self.dtype = rows.dtype if rows.dtype.kind == "i" else FLOAT32
        self.rows = rows.astype(self.dtype).reshape(*rows.shape[:2], -1)
        self.is_ragged = len(given.shape) == 4
        self.copies = 0  # tiles that were read
        self.nbytes_per_cta = 4 * math.prod(given.block_shape)

    def tile(self, coordinates: list[int], rows: int, columns: int) -> np.ndarray:
        """A tile, zeros where there is nothing."""
        self.copies += 1
        if self.is_ragged:
            outer, end, row, column = coordinates
            flat = self.rows.reshape(-1, self.rows.shape[2])
            row = row - outer + end
            assert outer == hopper_math.RAGGED.value
        else:
            batch, row, column = coordinates
            flat, end = self.rows[batch], self.rows.shape[1]
        found = flat[row : min(row + rows, end), column : column + columns]
        missing = [size - there for size, there in zip((rows, columns), found.shape, strict=True)]
        return np.pad(found, [(0, size) for size in missing])


def _load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Any:
    mask = np.broadcast_to(mask, np.shape(pointer.offset))
    inside = pointer.array[np.where(mask, pointer.offset, 0)]
    if not np.shape(inside):
        return Scalar(inside) if pointer.array.dtype.kind == "i" else inside
    return np.where(mask, inside, other).astype(inside.dtype).view(Tile)


def _store(pointer: Pointer, values: Any, mask: Any = True) -> None:
    mask = np.broadcast_to(mask, values.shape)
    pointer.array[np.broadcast_to(pointer.offset, values.shape)[mask]] = values[mask]


def _atomic_add(pointer: Pointer, value: int, sem: str) -> Scalar:
    assert sem == "relaxed"
    with Barrier.lock:
        before = Scalar(pointer.array[pointer.offset])
        pointer.array[pointer.offset] += value
    return before


def _async_load(desc: Descriptor, coordinates: list[int], barrier: Barrier, to: Buffer) -> None:
    to.array[...] = desc.tile(coordinates, *to.shape[-2:]).reshape(to.shape)
    barrier.update(0, -desc.nbytes_per_cta)


def _async_add(desc: Descriptor, coordinates: list[int], part: Buffer) -> None:
    batch, row, column = coordinates
    with Barrier.lock:
        into = desc.rows[batch, row : row + part.shape[1], column : column + part.shape[2]]
        into += part.array[0, : len(into)]


def _async_store(desc: Descriptor, coordinates: list[int], tile: Buffer) -> None:
    batch, row, column = coordinates
    into = desc.rows[batch, row : row + tile.shape[1], column : column + tile.shape[2]]
    into[...] = tile.array[0, : len(into)]


def _product(a: Any, b: Buffer, total: np.ndarray, *, use_acc: Any = True, is_async: bool) -> Tile:
    assert is_async
    left = a.array if isinstance(a, Buffer) else np.asarray(a)
    return (left @ b.array + (total if use_acc else 0)).view(Tile)


def _done(num_outstanding: int, deps: tuple[Tile, ...]) -> Any:
    del num_outstanding
    return deps if len(deps) > 1 else deps[0]


_warpgroup = threading.local()


def _pause() -> None:
    if _warpgroup.is_slow:
        time.sleep(PAUSE)


def _arrive(barrier: Barrier, count: int, pred: Any = True) -> None:
    if pred:
        _pause()
        barrier.update(count, 0)


def _wait(barrier: Barrier, phase: int, pred: Any = True) -> None:
    if pred:
        _pause()
        barrier.wait(int(phase))


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def _shared(dtype: Any, shape: list[int], layout: Any) -> Buffer:
    del layout
    if dtype == np.int64:
        return Buffer(np.array([[Barrier()] for _ in range(shape[0])], object))
    return Buffer(np.full(shape, -1 if np.dtype(dtype).kind == "i" else np.nan, dtype))


def _tile(make: Any) -> Any:
    return lambda *arguments, layout=None, **options: np.asarray(make(*arguments, **options)).view(
        Tile
    )


@cache
def code_of(name: str) -> CodeType:
    """A module of the kernels: every launch runs it anew."""
    return compile((KERNELS / f"{name}.py").read_text(), name, "exec")


class Emulator:
    """Namespaces of the kernel's modules, and the programs of a launch."""

    def __init__(self, slow: int | None = None) -> None:
        self.slow = slow  # a warpgroup of every program, in the order of warp_specialize
        self.program, self.programs = 0, 1
        self.output_gradient_copies = 0
        self.modules: dict[str, dict[str, Any]] = {}
        layout = SimpleNamespace(get_default_for=lambda *_, **__: None)
        self.gl = SimpleNamespace(
            constexpr=lambda x: x, shared_memory_descriptor=Buffer,
            NVMMASharedLayout=type("Layout", (), {
                "__init__": lambda self, **_: None, "get_default_for": layout.get_default_for,
            }),
            NVMMADistributedLayout=lambda **_: None, BlockedLayout=lambda *_: None,
            SliceLayout=lambda *_: None, DotOperandLayout=lambda *_: None,
            SwizzledSharedLayout=lambda *_: None,
            float32=FLOAT32, float16=np.dtype("float16"), bfloat16=None, int32=np.dtype("int32"),
            int16=np.dtype("int16"), int64=np.int64, num_programs=lambda _: Scalar(self.programs),
            allocate_shared_memory=_shared, static_range=range,
            program_id=lambda _: Scalar(self.program),
            to_tensor=lambda x: Scalar(x) if isinstance(x, int) else x,
            atomic_add=_atomic_add, cdiv=lambda a, b: Scalar(-(-a // b)), load=_load, store=_store,
            maximum=lambda a, b: _of(np.maximum, a, b), minimum=lambda a, b: _of(np.minimum, a, b),
            where=lambda c, a, b: _of(np.where, c, a, b), arange=_tile(np.arange),
            zeros=_tile(np.zeros), zeros_like=_tile(np.zeros_like), log2=np.log2,
            sum=_tile(np.sum), min=lambda x, axis: Scalar(np.min(x, axis)),
            fma=lambda a, b, c: (a * b + c).astype(FLOAT32), convert_layout=lambda x, _: x,
            warp_specialize=self.specialize,
        )  # fmt: skip
        gluon = SimpleNamespace(
            jit=lambda f: f, constexpr_function=lambda f: f, aggregate=_aggregate, language=self.gl
        )  # fmt: skip
        hopper = SimpleNamespace(
            mbarrier=SimpleNamespace(
                init=_init, wait=_wait, arrive=_arrive, allocate_mbarrier=Barrier,
                expect=lambda barrier, size: barrier.update(1, size), MBarrierLayout=lambda: None,
            ),
            tma=SimpleNamespace(
                async_load=_async_load, async_store=_async_store, async_atomic_add=_async_add,
                store_wait=lambda _: None,
            ),
            warpgroup_mma=_product, warpgroup_mma_wait=_done, fence_async_shared=lambda: None,
        )  # fmt: skip
        self.stand_ins = {
            "triton.experimental": SimpleNamespace(gluon=gluon),
            "triton.experimental.gluon": gluon,
            "triton.experimental.gluon.language.nvidia.hopper": hopper,
            # "import triton.language as tl" asks for the package.
            **dict.fromkeys(("triton", "triton.language"), SimpleNamespace(
                jit=lambda f: f, language=self.gl
            )),
        }  # fmt: skip

    def module(self, name: str) -> SimpleNamespace:
        """One of the kernel's modules, its device functions as functions of Python."""
        if name not in self.modules:
            space: dict[str, Any] = {
                "__builtins__": {
                    **vars(builtins),
                    "__import__": self.find,
                    "range": lambda *bounds: map(Scalar, range(*bounds)),
                },
                "__name__": name,
            }
            self.modules[name] = space
            exec(code_of(name), space)
            as_it_is = {"uniform", "computed_here"} & space.keys()
            space |= dict.fromkeys(as_it_is, lambda x: x)
            if name == "hopper_weights":
                space |= {"weights_float32": _weights, "weights_as_operand": _pair_weights}
                space["sigmoid_slopes"] = _slopes
                space["tanh_weights"] = lambda half, _: (0.5 + 0.5 * np.tanh(half)).view(Tile)
                as_they_are = ("declare_adaptive", "declare_kept", "begin_adaptive")
                space |= {name: lambda x, _: x for name in as_they_are}
                kept: dict[int, Tile] = {}  # by thread: a warpgroup
                space["keep"] = lambda x, _: kept.update({threading.get_ident(): x})
                space["kept"] = lambda *_: kept[threading.get_ident()]
                space["exceeds"] = _exceeds
                space["adaptive_weights_of"] = _adaptive_weights
                space["adaptive_weights"] = lambda x, factor, offset, consumer: _adaptive_weights(
                    _to_t(x, factor, offset), consumer
                )
            if name == "hopper_math":
                space["load_quads"] = _load_quads
            if name == "hopper_matrix":
                space["exclude"] = _exclude
            if name == "hopper_backward_pairs":
                space |= {
                    "zero_unless_negative": lambda x, numbers, flip: _where(
                        (numbers ^ flip) < 0, x, np.float32(0)
                    ),
                    "zero_where_zero": lambda x, weights: _where(weights == 0, np.float32(0), x),
                }
            if name == "hopper_backward_matrix":
                space |= {
                    "as_float32": lambda x: x,
                    "where_bit": lambda x, other, words, bit: _where(words & bit, x, other),
                    "zero_unless_high": _zero_unless_high,
                }
        return SimpleNamespace(**self.modules[name])

    def find(self, name: str, *arguments: Any) -> Any:
        """What a module of the kernel imports."""
        if name in self.stand_ins:
            return self.stand_ins[name]
        package, _, own = name.rpartition(".")
        if package == "sigjax.kernels" and (own.startswith("hopper") or own in PLAIN):
            return self.module(own)
        found = builtins.__import__(name, *arguments)
        constants = {
            x: value.value for x, value in vars(found).items() if isinstance(value, tl.constexpr)
        }
        return SimpleNamespace(**(vars(found) | constants)) if constants else found

    def specialize(self, parts: list[Any], warps: list[int], registers: list[int]) -> None:
        """Runs the warpgroups of a program side by side."""
        assert len(parts) == len(warps) + 1 == len(registers) + 1
        errors: list[Exception] = []

        def run(index: int, function: Any, arguments: tuple[Any, ...]) -> None:
            _warpgroup.is_slow = index == self.slow
            try:
                with np.errstate(all="ignore"):  # NaN and inf are handed on
                    function(*arguments)
            except Exception as error:  # noqa: BLE001 - handed on below
                errors.append(error)

        threads = [
            threading.Thread(target=run, args=(index, *part)) for index, part in enumerate(parts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def call(
        self, kernel: Any, inputs: tuple[Any, ...], out_type: Any, grid: tuple[int],
        options: dict[str, Any], aliases: dict[int, int] | None = None,
    ) -> Any:  # fmt: skip
        """launch.call, for the Hopper kernels and the one of segments.

        The portable kernel, which has the gradient of a float32 bias of pairs, gives 0.
        """
        if kernel is segment_kernel:
            return _segments(inputs, options)
        if kernel is bias_gradient_kernel:
            return jnp.zeros(out_type.shape, out_type.dtype)
        arguments: list[Any] = [
            Descriptor(x) if hasattr(x, "block_shape")
            else Pointer(np.array(x).ravel()) if isinstance(x, jax.Array)
            else Scalar(x) if isinstance(x, int) else x
            for x in inputs
        ]  # fmt: skip
        types = jax.tree.leaves(out_type)
        arrays = [x for x in arguments if isinstance(x, Descriptor | Pointer)]
        given = [arrays[i] for i in aliases or ()]  # the last outputs, see launch.call
        own_types = types[: len(types) - len(given)]
        outputs = [np.full(math.prod(out.shape), np.nan, out.dtype) for out in own_types]
        name = kernel.__name__
        device = vars(self.module(name.removesuffix("_kernel")))[name]
        # jax_triton's and the compiler's own.
        constants = {
            name: x for name, x in options.items()
            if name not in ("num_warps", "compute_capability", "backend_options")
        }  # fmt: skip
        self.programs = grid[0]
        for self.program in range(grid[0]):
            device(*arguments, *map(Pointer, outputs), **constants)
        if kernel is hopper_backward_kernel:
            self.output_gradient_copies = arguments[3].copies
        results = [*outputs, *(x.rows if isinstance(x, Descriptor) else x.array for x in given)]
        arrays = [jnp.asarray(x.reshape(out.shape)) for x, out in zip(results, types, strict=True)]
        return arrays if isinstance(out_type, list) else arrays[0]


def forward(
    operands: Operands,
    settings: Settings,
    tile: ForwardTile | None = None,
    programs: int = 3,
    slow: int | None = None,
) -> jax.Array:
    """hopper_launch.forward, emulated, on so many multiprocessors; a warpgroup may be slow."""
    emulator = Emulator(slow)
    with (
        mock.patch.object(launch, "call", emulator.call),
        mock.patch.object(hopper_launch, "multiprocessors", return_value=programs),
        compile_for(90),
    ):
        return hopper_launch.forward(operands, settings, tile)


def backward(
    operands: Operands, settings: Settings, output_gradient: jax.Array, slow: int | None = None
) -> tuple[Gradients, int]:
    """hopper_backward_launch.backward, emulated, and how many tiles of output gradients it read."""
    emulator = Emulator(slow)
    with mock.patch.object(launch, "call", emulator.call), compile_for(90):
        gradients = hopper_backward_launch.backward(operands, settings, output_gradient)
    return gradients, emulator.output_gradient_copies


def bias_gradient(
    operands: Operands,
    settings: Settings,
    output_gradient: jax.Array,
    tile: BiasTile,
    programs: int,
) -> jax.Array:
    """hopper_bias_launch.bias_gradient, emulated on a GPU that runs so many programs at once."""
    emulator = Emulator()
    with (
        mock.patch.object(launch, "call", emulator.call),
        mock.patch.object(hopper_operands, "multiprocessors", return_value=programs),
        compile_for(90),
    ):
        return hopper_bias_launch.bias_gradient(operands, settings, output_gradient, tile)


def _of(function: Any, *arguments: Any) -> Any:
    result = function(*arguments)
    if np.shape(result):
        return result.view(Tile)
    return Scalar(result) if np.asarray(result).dtype.kind in "biu" else np.float32(result)


def _aggregate(cls: Any) -> Any:
    def create(self: Any, *values: Any) -> None:
        vars(self).update(zip(cls.__annotations__, values, strict=True))

    cls.__init__ = create
    return cls


def _weights(t: Tile) -> Any:
    """hopper_weights.weights_float32: never exactly 0, a NaN of row r reaches row r + 8 too."""
    weights = (1 / (1 + np.exp2(np.minimum(t, 62.9)))).astype(FLOAT32)
    return np.where(np.isnan(weights[np.arange(len(t)) ^ 8]), np.nan, weights).view(Tile)


def _slopes(t: Tile) -> Any:
    """hopper_weights.sigmoid_slopes: a NaN of a column reaches its neighbour too."""
    weights = (1 / (1 + np.exp2(np.minimum(t, 62.9)))).astype(FLOAT32)
    slopes = weights - weights * weights
    return np.where(np.isnan(slopes[:, np.arange(t.shape[1]) ^ 1]), np.nan, slopes).view(Tile)


def _pair_weights(t: Tile, dtype: Any) -> Any:
    """hopper_weights.weights_as_operand: a NaN reaches the neighbouring column."""
    del dtype
    weights = np.maximum(1 / (1 + np.exp2(np.minimum(t, 62.9))) - 2.0**-62, 0).astype(FLOAT32)
    columns = np.arange(t.shape[1]) ^ 1
    return np.where(np.isnan(weights[:, columns]), np.nan, weights).view(Tile)


def _adaptive_weights(t: Tile, consumer: int) -> Any:
    """hopper_weights.adaptive_weights_of, without the polynomial's error."""
    del consumer
    exact = (t + FLOAT32.type(hopper_weights.LOG2_STRETCH.value)).view(Tile)
    return _pair_weights(exact, FLOAT32) / FLOAT32.type(hopper_weights.SHRINK.value)


def elements_of_threads(x: np.ndarray) -> np.ndarray:
    """[64, 128 threads] of an accumulator [64, 128]: each has 16 times two columns of two rows."""
    # [4 warps, 2 rows, 8 lanes, 16, 4 lanes, 2 columns]
    return np.reshape(x, (4, 2, 8, 16, 4, 2)).transpose(3, 1, 5, 0, 2, 4).reshape(64, 128)


def _exceeds(x: np.ndarray, limit: Any, deviations: float, consumer: int) -> bool:
    """hopper_weights.exceeds: a thread has two rows and a quarter of the columns."""
    del consumer
    of_threads = elements_of_threads(x)
    most = np.fmax.reduce(of_threads[list(hopper_weights.GREATEST_OF)])
    least = np.fmin.reduce(of_threads[list(hopper_weights.LEAST_OF)])
    greatest_is, least_is = hopper_weights.GREATEST.value, hopper_weights.LEAST.value
    least = np.where(least == -np.inf, np.float32(-least_is / greatest_is) * most, least)
    above = 1 + (deviations - greatest_is) / (greatest_is + least_is)
    votes = above * most + (1 - above) * least > limit
    return bool(np.any(most > limit)) or int(votes.sum()) > 64


def _to_t(x: Tile, factor: Any, offset: Any) -> Tile:
    return np.asarray(x * factor + offset, FLOAT32).view(Tile)


def _exclude(t: Tile, codes: Tile, IS_TANH: bool) -> Tile:
    """hopper_matrix.exclude: prmt in even columns, the greater number in odd ones."""
    assert not IS_TANH
    word = codes[:, ::2].view(np.uint16) | codes[:, 1::2].astype(np.uint32) << 16
    even = np.ascontiguousarray(t[:, ::2]).view(np.uint32).astype(np.uint64) | 0x7F800000 << 32
    chosen = np.zeros_like(word)
    for byte in range(4):
        source = word >> 4 * byte & 7
        chosen |= (even >> 8 * source & 0xFF).astype(np.uint32) << 8 * byte
    result = t.copy()
    result[:, ::2] = chosen.view(FLOAT32)
    result[:, 1::2] = np.fmax(t[:, 1::2], word.view(FLOAT32))
    return result.view(Tile)


def _load_quads(pointers: Pointer) -> Any:
    """hopper_math.load_quads: two numbers of a row, and two of 8 rows below."""
    rows, columns = np.indices(pointers.offset.shape)
    assert not (pointers.offset % 4).any()
    return _load(pointers + columns % 2 + rows // 8 % 2 * 2)


def _where(condition: Any, x: Any, other: Any) -> Any:
    return np.where(condition, x, other).view(Tile)


def _zero_unless_high(x: Tile, words: Tile, chosen: Tile) -> Any:
    """hopper_backward_matrix.zero_unless_high: prmt on a pair, of which an element is a half.

    A nibble of 8 and more stands for the highest bit of a byte, eight times.
    """
    first = np.arange(x.shape[1]) & ~1  # of a pair
    nibbles = chosen[:, first] >> (np.arange(x.shape[1]) & 1) * 8
    low, high = nibbles & 15, nibbles >> 4 & 15
    assert (low == high).all()
    assert (low >= 8).all()
    return _where(words[:, first] >> ((low & 3) * 8 + 7) & 1, x, np.float32(0))


def _segments(inputs: tuple[Any, ...], options: dict[str, Any]) -> list[jax.Array]:
    """segments.segment_kernel, by tile_ranges and by counting."""
    own, others, lengths, other_lengths = inputs[:4]
    results = [tile_ranges(own, others, options["BLOCK"], lengths, other_lengths)]
    if "row_bias_ptr" not in options:
        x, y = (jnp.zeros((*ids.shape, 1, 1)) for ids in (own, others))
        operands = Operands(
            x, y, y, query_lengths=lengths, key_lengths=other_lengths, query_segments=own,
            key_segments=others,
        )  # fmt: skip
        counts = jnp.maximum(reference.key_counts(operands), 1)
        results.append(-jnp.log(counts.astype(jnp.float32)).reshape(own.shape))
    return results
