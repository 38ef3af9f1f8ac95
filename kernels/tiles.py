"""Tile sizes of the portable kernels: a pure table, no tuning at run time.

A tile may depend on the head size, the dtype and the GPU, never on the batch or
the padded length: that is what makes a row's bits the same in any bucket. The
Hopper forward kernel's tiles for short arrays do: for so few keys (few, below)
those for longer ones compute exact weights too, of 64 rows a consumer and in
the same order of the same key blocks, so that a row has the same bits in both.
"""

from dataclasses import dataclass, replace
from typing import Literal

import triton

type Kernel = Literal["forward", "query_gradient", "key_value_gradient", "bias_gradient"]
# What concerns single pairs and asks for tiles of its own: a bias or mask with a number for each
# query and key, whose tiles are in shared memory too; or segments, which take a second loop.
type Pairs = Literal["bias", "mask", "segments"]
type Weights = Literal["pair", "adaptive", "tanh"]
type Output = Literal["rows", "tma", "registers"]
type MatrixPlace = Literal["logits", "scores"]
type KeyBiasPlace = Literal["logits", "scores"]
type Turns = Literal["never", "always", "exact"]
type Counts = Literal["never", "lengths", "dense", "causal"]


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts its work.

    Attributes:
        block_q: queries of a tile, a power of two of at least 16.
        block_k: keys of a tile, likewise.
        num_warps: warps of a program, a power of two.
        num_stages: depth of the software pipeline over the inner loop.
        max_registers: of a thread, so that the programs fit that shared memory has room for; None
            leaves it to ptxas.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("block_q", 16), ("block_k", 16), ("num_warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                msg = f"{name} must be a power of two of at least {least}, got {value}"
                raise ValueError(msg)
        if self.num_stages < 1:
            msg = f"num_stages must be at least 1, got {self.num_stages}"
            raise ValueError(msg)


@dataclass(frozen=True)
class ForwardTile:
    """How the Hopper forward kernel cuts its work.

    Attributes:
        block_q: queries of a consumer warpgroup, 64.
        block_k: keys of a block.
        consumers: warpgroups that compute, 2 or 3.
        stages: key and value blocks in flight.
        registers: of a consumer's thread.
        weights: how they are computed, see hopper_weights; "adaptive" in bfloat16 alone, and
            "tanh", which is not exact, where fast_sigmoid asks for it.
        early: whether weights are computed while the last ones are multiplied.
        few: keys of a sequence below which "adaptive" is "pair", as weights are large there.
        few_in_window: keys of a window, likewise.
        deviations: a tile is exact where a logit so many standard deviations from the mean is
            large, see hopper_weights.exceeds: a weight is then large once in a million.
        deviations_of_many: the same of a tile with hopper_weights.MANY_KEYS or more.
        counts: when programs take the next tile that nobody has, by a counter, and not every so
            many-th, see hopper_queue: where there are "lengths", in "dense" calls too, or in
            "causal" ones as well; else, and with windows or packed rows without lengths, never.
        max_registers: of a thread at the launch; registers move from the producer to the
            consumers, and a sum over what an SM has hangs.
        output: how outputs are stored, see hopper_outputs; "registers" in another dtype.
        query_stages: tiles whose queries are in shared memory or on their way.
        matrix_stages: tiles of a bias or mask in flight, of each consumer; 0 without one.
        turns: when consumers take turns at the tensor cores; "exact": in the tiles of "adaptive"
            whose weights are exact for all of them, and these weights are not early.
        turns_from: keys below which "exact" is "never": most tiles are exact there, and early
            weights better.
        matrix: where a bias or mask of pairs comes in, see hopper_matrix: a bias may be in the
            "scores"; all else is in the "logits".
        key_bias: where a bias per key comes in: the "scores" begin with it, over the scale, or it
            is added to the "logits"; there where the scale is not above 0, see hopper_matrices.
    """

    block_q: int
    block_k: int
    consumers: int
    stages: int
    registers: int
    max_registers: int
    weights: Weights = "pair"
    early: bool = False
    few: int = 0
    few_in_window: int = 1536
    deviations: float = 4.7
    deviations_of_many: float = 4.7
    counts: Counts = "lengths"
    output: Output = "rows"
    query_stages: int = 2
    matrix_stages: int = 0
    turns: Turns = "always"
    turns_from: int = 0
    matrix: MatrixPlace = "logits"
    key_bias: KeyBiasPlace = "scores"

    def for_keys(self, keys: int, *, window: int | None = None) -> "ForwardTile":
        """The same for so many keys and a window of so many: exact if that is all there is."""
        # The window alone decides, not what fits in an array: bits do not depend on the bucket.
        narrow = window is not None and window < self.few_in_window
        if self.weights == "adaptive" and (narrow or keys < self.few):
            # At 64 and 1,024 keys 425 TFLOPS without a counter, 421 with one.
            return replace(self.exact(), counts="lengths")
        if self.turns == "exact" and keys < self.turns_from:
            return replace(self, turns="never")
        return self

    def exact(self) -> "ForwardTile":
        """The same with exact weights alone."""
        return replace(self, weights="pair", early=False, turns="always")


@dataclass(frozen=True)
class BackwardTile:
    """How the Hopper backward kernel cuts its work.

    Attributes:
        block_q: queries of a step, 64.
        stages: query and output gradient blocks in flight.
        helper: whether a warpgroup of its own computes the query gradients.
        max_registers: of a thread at the launch.
    """

    block_q: int
    stages: int
    helper: bool
    max_registers: int


@dataclass(frozen=True)
class BiasTile:
    """How the Hopper kernel for the gradient of a bias cuts its work.

    Attributes:
        query_stages: blocks of queries and output gradients in flight, of each warpgroup.
        key_stages: blocks of 64 keys and values in flight.
        max_registers: of a thread at the launch.
        held: whether a tile's bias is held in registers over all that share it.
    """

    query_stages: int
    key_stages: int
    max_registers: int
    held: bool = False


def hopper_forward_tile(
    head_size: int, *, fast_sigmoid: bool = False, pairs: Pairs | None = None, short: bool = False
) -> ForwardTile:
    """The tile of the Hopper forward kernel, head size 64 or 128, by what concerns single pairs.

    How adaptive weights are computed is decided for several rows at once: the bits of a packed
    sequence would depend on what lies beside it. short says that there are fewer than SHORT queries
    and keys, and no window.
    """
    if short and not fast_sigmoid and pairs is None and head_size in _HOPPER_FORWARD_SHORT:
        return _HOPPER_FORWARD_SHORT[head_size]
    tile = _HOPPER_FORWARD_PAIRS.get((pairs, head_size), _HOPPER_FORWARD[head_size])
    if pairs == "segments":
        # Their producer also clears padding: at 128, 24 registers are not enough for it.
        tile = replace(tile, registers=min(tile.registers, 232))
    if fast_sigmoid:
        return replace(tile, weights="tanh", counts="lengths")
    if pairs == "segments" and tile.weights == "adaptive":
        return tile.exact()
    return tile


def hopper_backward_tile(head_size: int) -> BackwardTile:
    """The tile of the Hopper backward kernel, head size 64 or 128."""
    return _HOPPER_BACKWARD[head_size]


def hopper_bias_tile(head_size: int) -> BiasTile:
    """The tile of the Hopper kernel for the gradient of a bias, head size 64 or 128."""
    return _HOPPER_BIAS[head_size]


def head_block(head_size: int) -> int:
    """Columns of a tile: the power of two, at least 16, that holds a head."""
    return max(16, triton.next_power_of_2(head_size))


def choose_tile(
    kernel: Kernel, head_size: int, itemsize: int, capability: int, pairs: Pairs | None = None
) -> Tile:
    """The tile of one kernel.

    Args:
        kernel: which kernel.
        head_size: H, 16 to 256.
        itemsize: bytes of an element, 2 or 4.
        capability: compute capability, 90 for an H100.
        pairs: what asks for tiles of its own.
    """
    columns = head_block(head_size)
    kind = "matrix" if pairs in ("bias", "mask") or kernel == "bias_gradient" else pairs
    # The gradient of a bias computes what the query gradient does.
    table: Kernel = "query_gradient" if kernel == "bias_gradient" else kernel
    if itemsize == 4:
        return _FLOAT32[table][columns]
    if capability in _LARGE_SHARED_MEMORY:
        return _HOPPER_PAIRS.get((kind, kernel, columns), _HOPPER[table][columns])
    tile = _AMPERE[table][columns]
    return replace(tile, num_stages=min(tile.num_stages, 2)) if kind == "matrix" else tile


# 228 KB of shared memory a multiprocessor, wgmma or tcgen05.
_LARGE_SHARED_MEMORY = (90, 100, 103)

# TFLOPS on an H100 (bf16, 16,384 tokens, N * H = 2,048; T = 4,096 / 16,384), the chosen tile
# beside a rival; all in benchmarks/results/*/tiles.csv. Head sizes 16, 32 and 256 are compiled,
# not timed.
_HOPPER: dict[Kernel, dict[int, Tile]] = {
    "forward": {
        16: Tile(64, 64, 4, 3),
        32: Tile(64, 64, 4, 3),
        64: Tile(64, 64, 4, 3),  # 436 / 442; (128, 64, 4, 3) 407 / 414
        128: Tile(64, 64, 4, 3),  # 528 / 547; (128, 64, 8, 3) 476 / 497
        256: Tile(128, 64, 8, 2),
    },
    "query_gradient": {
        16: Tile(64, 64, 4, 3),
        32: Tile(64, 64, 4, 3),
        64: Tile(64, 64, 4, 3),  # 492 / 499; (64, 64, 4, 2) 467 / 485
        128: Tile(128, 64, 8, 3),  # 536 / 566; (64, 64, 4, 2) 541 / 531
        256: Tile(64, 64, 8, 1),
    },
    "key_value_gradient": {
        16: Tile(64, 64, 4, 3),
        32: Tile(64, 64, 4, 3),
        64: Tile(64, 64, 4, 3),  # 489 / 495; (64, 64, 4, 2) 432 / 467
        128: Tile(64, 64, 4, 2),  # 584 / 592; (64, 128, 8, 3) 552 / 584
        256: Tile(32, 64, 8, 1),
    },
}

# Where another tile is better with what concerns pairs. TFLOPS are those of the plain kernels at
# T = 4,096, beside the best tile's. Registers are what ptxas 13.0 needs, not timed. A "matrix" is a
# bias or a mask.
_HOPPER_PAIRS: dict[tuple[str | None, Kernel, int], Tile] = {
    # The bias's tiles leave room for one program: one of 8 warps, 476 of 528; of 4 warps 367.
    ("matrix", "forward", 128): Tile(128, 64, 8, 3),
    # Three programs as without a bias, 467 of 492; three stages leave room for two.
    ("matrix", "query_gradient", 64): Tile(64, 64, 4, 2),
    # Both sides are loaded anew for each sequence.
    ("matrix", "bias_gradient", 64): Tile(64, 64, 4, 2, max_registers=168),  # 24 bytes spill
    ("matrix", "bias_gradient", 128): Tile(128, 64, 8, 2),
    # Three programs instead of two; without a spill.
    ("segments", "query_gradient", 64): Tile(64, 64, 4, 3, max_registers=168),
}

# At most 99 KB of shared memory, so that sm_86, sm_89 and sm_120 run them too.
_AMPERE: dict[Kernel, dict[int, Tile]] = {
    "forward": {
        16: Tile(128, 64, 4, 3),
        32: Tile(128, 64, 4, 3),
        64: Tile(128, 64, 4, 3),
        128: Tile(128, 32, 8, 2),
        256: Tile(64, 32, 8, 1),
    },
    "query_gradient": {
        16: Tile(128, 64, 4, 2),
        32: Tile(128, 64, 4, 2),
        64: Tile(128, 32, 8, 2),
        128: Tile(64, 32, 4, 2),
        256: Tile(32, 32, 4, 1),
    },
    "key_value_gradient": {
        16: Tile(64, 128, 4, 2),
        32: Tile(64, 128, 4, 2),
        64: Tile(32, 128, 8, 2),
        128: Tile(32, 64, 4, 2),
        256: Tile(16, 32, 4, 1),
    },
}

# Exact float32 products run on the CUDA cores, fully unrolled: registers bound the tile. ptxas
# shows no spill for these but 296 bytes for the last. Not timed.
_FLOAT32: dict[Kernel, dict[int, Tile]] = {
    "forward": {
        16: Tile(64, 32, 4, 2),
        32: Tile(64, 32, 4, 2),
        64: Tile(32, 32, 8, 2),
        128: Tile(32, 16, 8, 1),
        256: Tile(16, 16, 8, 1),
    },
    "query_gradient": {
        16: Tile(64, 32, 4, 2),
        32: Tile(64, 32, 4, 2),
        64: Tile(32, 32, 8, 2),
        128: Tile(32, 16, 8, 1),
        256: Tile(16, 16, 8, 1),
    },
    "key_value_gradient": {
        16: Tile(32, 32, 4, 2),
        32: Tile(32, 32, 4, 2),
        64: Tile(32, 32, 8, 2),
        128: Tile(16, 16, 8, 1),
        256: Tile(16, 16, 8, 1),
    },
}

# TFLOPS on H100s (bf16, 16,384 tokens, N * H = 2,048; T = 1,024 / 4,096 / 16,384), all of it in
# benchmarks/results/*/hopper_versions.csv and benchmarks/HOPPER.md. Three consumers at 64, whose
# tiles leave room: two reach 355 / 421 / 372.
_HOPPER_FORWARD: dict[int, ForwardTile] = {
    # 418 / 549 / 575; output by rows 414 / 517 / 550, where it spills. On an H200 by a counter
    # 421 / 545 / 576, without 425 / 538 / 570, causal at 4,096 0.631 and 0.618 ms; of deviations of
    # 4.5 and 4.7 512 and 502 at 4,096 x 1.25, 350 and 437 at 8,192 x 1.5.
    64: ForwardTile(
        64, 128, consumers=3, stages=4, registers=160, max_registers=128, weights="adaptive",
        few=1536, output="tma", counts="dense",
    ),
    # Without turns 614 / 736 / 758, with all of them 605 / 722 / 739. On an H200 with those of
    # exact tiles alone 600 / 734 / 753 for 617 / 735 / 750 without, and of logits x 8 - / 650 /
    # 675 for - / 628 / 661. There at T = 256, 512 and 1,024 exact weights reach 434, 529 and 606
    # for 431, 527 and 607, and of logits x 1.25 to x 3 at 1,024 604 for 589. Deviations of 4.65,
    # and of 4.7 and 4.5 of many keys: 606 and 627 at 2,048 x 1.25, 687 and 704 at 4,096 x 1.25, 576
    # and 614 at 8,192 x 1.5; by a counter 622, 710, 609, with both 616, 708, 643. Causal at 4,096
    # 0.453 ms by a counter, 0.504 without.
    128: ForwardTile(
        64, 128, consumers=2, stages=2, registers=240, max_registers=168,
        weights="adaptive", early=True, few=1152, deviations_of_many=4.5, counts="causal",
        turns="exact", turns_from=3072,
    ),
}  # fmt: skip
# For fewer queries and keys than SHORT: two consumers, whose tiles have fewer idle rows. TFLOPS on
# an H200, T = 256 / 512 / 1,024, beside those of the tile above.
SHORT = 768
_HOPPER_FORWARD_SHORT: dict[int, ForwardTile] = {
    64: ForwardTile(  # 295 / 372 / 378; 176 / 345 / 420; held, so that it is early, 296 / 350
        64, 128, consumers=2, stages=4, registers=240, max_registers=168, early=True,
        turns="never", output="tma",
    ),
}  # fmt: skip
# With a bias or mask, whose tiles take the place of keys and values, and of outputs. TFLOPS on an
# H200 at T = 4,096, where the plain calls reach 540 and 710 to 727, with a bias [1, N, T, S], or a
# mask [B, 1, T, S]. In the logits: with exact weights at 64, adaptive and early at 128. Of two
# stages and queries not early a bias reaches 412 and 562, a mask 382 and 537.
_HOPPER_FORWARD_PAIRS: dict[tuple[Pairs | None, int], ForwardTile] = {
    # 8 segments in rows of 4,096 take 0.217 to 0.230 ms, and 0.357 with three consumers. The
    # portable kernel takes 0.219 to 0.221, see hopper_choice.
    ("segments", 64): ForwardTile(
        64, 128, consumers=2, stages=4, registers=232, max_registers=168, output="tma",
    ),
    # 421, by a counter 1 % less. Of two stages adaptive 368, without turns 390, in the logits 386
    # for 417.
    ("bias", 64): ForwardTile(
        64, 128, consumers=3, stages=3, registers=160, max_registers=128, query_stages=2,
        matrix_stages=1, output="tma", matrix="scores",
    ),
    # 574 and 557 in two calls, by a counter 0.5 % less. Of two stages, in an earlier call, exact,
    # adaptive, or early without turns 546, with turns 520, in the logits 535.
    ("bias", 128): ForwardTile(
        64, 128, consumers=2, stages=2, registers=240, max_registers=168, query_stages=2,
        matrix_stages=1, output="registers", matrix="scores",
    ),
    # 393, without the counter 388. Of two stages adaptive in the weights, without turns, 407 and of
    # logits x 1.5 157, for 385 and 389.
    ("mask", 64): ForwardTile(
        64, 128, consumers=3, stages=3, registers=160, max_registers=128, query_stages=2,
        matrix_stages=1, counts="dense", output="tma",
    ),
    # 545 and 532 in two calls. Of two stages, by another choice, exact 504, in the weights 524, not
    # early 511, without turns 530, for 535.
    ("mask", 128): ForwardTile(
        64, 128, consumers=2, stages=2, registers=240, max_registers=168, query_stages=2,
        matrix_stages=1, output="registers", weights="adaptive", early=True,
    ),
}  # fmt: skip
_HOPPER_BACKWARD: dict[int, BackwardTile] = {
    64: BackwardTile(64, stages=4, helper=True, max_registers=128),  # 411 / 529 / 562
    128: BackwardTile(64, stages=2, helper=False, max_registers=168),  # 463 / 599 / 636
}
# Every operand of a tile is read anew for each head that shares it. TFLOPS on an H200 at T = 4,096
# with a bias [1, N, T, S]. A tile of 256 queries, which spills, one of 192 with three consumers,
# 197, and products that begin before the last block's weights are gone.
_HOPPER_BIAS: dict[int, BiasTile] = {
    64: BiasTile(query_stages=3, key_stages=4, max_registers=168, held=True),  # 287; not held 263
    128: BiasTile(query_stages=2, key_stages=2, max_registers=168),  # 368
}
