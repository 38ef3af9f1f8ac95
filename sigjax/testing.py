"""Named shapes, inputs and rules that the tests and the benchmarks share."""

import math
import random
from dataclasses import dataclass
from typing import Literal

type Direction = Literal["forward", "backward"]

WORKLOAD_NAMES = ("dense", "padded25", "padded50", "ragged")
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")

# The shapes of https://arxiv.org/abs/2604.27124: batch · length and heads · head size are fixed.
PAPER_LENGTHS = (1024, 2048, 4096, 8192, 16384)
PAPER_HEAD_SIZES = (64, 128)
PAPER_TOKENS = 16384
PAPER_WIDTH = 2048

RAGGED_ROWS = 16
RAGGED_SHORTEST = 200

# Two FLOP per multiply-add and matrix product: two products forward (logits, output), five
# backward (logits again, dP, dV, dQ, dK).
_MATRIX_FLOPS = {"forward": 4.0, "backward": 10.0}
_SHORTEST_SHARE = {"padded25": 0.75, "padded50": 0.5}


@dataclass(frozen=True)
class Workload:
    """One self-attention problem: [B, T, N, H] operands, not causal, lengths fixed.

    Attributes:
        name: what kind of batch it is, one of WORKLOAD_NAMES.
        batch: B, sequences.
        length: T, the length that every sequence is padded to.
        heads: N, query heads and as many key and value heads.
        head_size: H.
        lengths: the tokens of each sequence, [B]; None where all have T.
        dtype: of query, key and value.
        seed: of the operands' values.

    Raises:
        ValueError: a size below 1, or lengths that are not B numbers from 0 to T.
    """

    name: str
    batch: int
    length: int
    heads: int
    head_size: int
    lengths: tuple[int, ...] | None = None
    dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        for size in ("batch", "length", "heads", "head_size"):
            if getattr(self, size) < 1:
                msg = f"{size} must be at least 1, got {getattr(self, size)}"
                raise ValueError(msg)
        if self.lengths is None:
            return
        if len(self.lengths) != self.batch:
            msg = f"lengths must hold batch = {self.batch} numbers, got {len(self.lengths)}"
            raise ValueError(msg)
        if not all(0 <= length <= self.length for length in self.lengths):
            msg = f"lengths must lie between 0 and length = {self.length}, got {self.lengths}"
            raise ValueError(msg)

    @property
    def label(self) -> str:
        """Short text that tells workloads apart, "padded25 T=4096 H=64"."""
        return f"{self.name} T={self.length} H={self.head_size}"

    @property
    def pairs(self) -> int:
        """(Query, key) pairs of one head that are not padding."""
        if self.lengths is None:
            return self.batch * self.length**2
        return sum(length**2 for length in self.lengths)

    def flops(self, direction: Direction) -> float:
        """Useful floating-point operations: 4 · N · H per pair forward, 2.5 times that backward."""
        return _MATRIX_FLOPS[direction] * self.heads * self.head_size * self.pairs


def workload(
    name: str,
    length: int,
    head_size: int,
    *,
    tokens: int = PAPER_TOKENS,
    width: int = PAPER_WIDTH,
) -> Workload:
    """A named workload: tokens = batch · length and width = heads · head size.

    "dense" has no lengths; those of "padded25" are uniform in [0.75 T, T] and of
    "padded50" in [0.5 T, T]; "ragged" is 16 sequences, log-uniform from 200 to T,
    whatever tokens says. Lengths depend on the name and T alone.

    Raises:
        ValueError: name is unknown, or a size does not divide its product.

    Example:
        >>> from sigjax.testing import workload
        >>> shape = workload("padded25", 4096, 64)
        >>> shape.batch, shape.heads, min(shape.lengths) >= 3072
        (4, 32, True)
    """
    if name not in WORKLOAD_NAMES:
        msg = f"name must be one of {', '.join(WORKLOAD_NAMES)}, got {name!r}"
        raise ValueError(msg)
    for what, whole, part in (("tokens", tokens, length), ("width", width, head_size)):
        if part < 1 or (whole % part and not (what == "tokens" and name == "ragged")):
            of = "length" if what == "tokens" else "head_size"
            msg = f"{of} must divide {what} = {whole}, got {part}"
            raise ValueError(msg)
    batch = RAGGED_ROWS if name == "ragged" else tokens // length
    heads = width // head_size
    lengths = _lengths(name, batch, length)
    return Workload(name, batch, length, heads, head_size, lengths)


def _lengths(name: str, batch: int, length: int) -> tuple[int, ...] | None:
    if name == "dense":
        return None
    # Python's generator, not NumPy's: its random() is the same in every version.
    draw = random.Random(f"{name} {length}").random
    if name == "ragged":
        shortest = min(RAGGED_SHORTEST, length)
        return tuple(
            min(length, int(shortest * math.exp(draw() * math.log((length + 1) / shortest))))
            for _ in range(batch)
        )
    shortest = math.ceil(_SHORTEST_SHARE[name] * length)
    return tuple(shortest + int(draw() * (length + 1 - shortest)) for _ in range(batch))
