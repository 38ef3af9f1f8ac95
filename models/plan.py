"""Which cells form which batch: sampled, bucketed, sharded and resumable, as grain datasets.

Only numbers of cells flow here; every process plans the batches of all processes
and takes its own rows, so that all run the same shape at the same step.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, override

import grain
import numpy as np

from sigjax.buckets import LengthBuckets
from sigjax.models.config import InputError
from sigjax.models.packing import first_fit

WHOLE = grain.sharding.ShardOptions(shard_index=0, shard_count=1)


class Planned(NamedTuple):
    """One process's part of a batch.

    Attributes:
        epoch: in which each cell comes once.
        bucket: whose length its rows have.
        rows: the cells of each row; fewer rows than the batch has where the epoch runs out.
        first: the first cell of the whole batch, the same in all processes.
    """

    epoch: int
    bucket: int
    rows: list[list[int]]
    first: int


class CellOrder(grain.MapDataset[int]):
    """Numbers of cells, epoch after epoch without end.

    grain's own shuffle walks about 65,536 / C steps for each of C elements: 17 ms where
    C is 2. A permutation drawn an epoch is as reproducible and costs a look-up.

    Args:
        count: number of cells.
        seed: of the order.
        shuffled: whether the order is drawn.
    """

    def __init__(self, count: int, seed: int, *, shuffled: bool) -> None:
        super().__init__()
        self._count, self._seed, self._shuffled = count, seed, shuffled
        self._drawn: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return sys.maxsize

    @override
    def __getitem__(self, index: int) -> int:  # pyrefly: ignore[bad-override]
        epoch, place = divmod(index, self._count)
        return int(self._order(epoch)[place]) if self._shuffled else place

    def _order(self, epoch: int) -> np.ndarray:
        if self._drawn is None or self._drawn[0] != epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(self._count)
            self._drawn = epoch, order
        return self._drawn[1]


@dataclass(frozen=True)
class Shapes:
    """The static shapes of batches over all processes.

    Attributes:
        buckets: lengths of rows.
        rows: rows of a batch of each bucket.
    """

    buckets: LengthBuckets
    rows: tuple[int, ...]

    @classmethod
    def of_budget(cls, buckets: LengthBuckets, tokens: int, multiple: int = 1) -> "Shapes":
        """The most rows that a budget of tokens holds.

        Rows times length lies between the budget and the budget less multiple rows.

        Args:
            buckets: lengths of rows.
            tokens: of a batch, over all processes, at most.
            multiple: the rows divide by it: devices of all processes together.

        Raises:
            InputError: multiple rows of the longest length exceed the budget.
        """
        longest = buckets.edges[-1]
        if longest * multiple > tokens:
            rows = "" if multiple == 1 else f"{multiple} rows, one a device, of "
            msg = (
                f"tokens_per_batch must hold {rows}the longest length {longest}, got {tokens}; "
                "raise it or lower max_genes"
            )
            raise InputError(msg)
        return cls(buckets, tuple(tokens // (edge * multiple) * multiple for edge in buckets.edges))


class BatchPlan(grain.IterDataset[Planned]):
    """Gathers cells into batches of equal bucket: a batch is due as soon as it is full.

    What is left at the end of an epoch comes as batches with rows missing. Without
    packing a row is a cell; with it, first_fit puts the cells of a window together.

    Args:
        cells: numbers of cells, from CellOrder.
        lengths: int [C], tokens of each cell, the cell token included.
        shapes: of the batches.
        identity: of cells and settings; a state of another plan is refused.
        window: cells that are packed together; 0 packs none.
        shard: the process.
    """

    def __init__(
        self,
        cells: grain.IterDataset[int],
        lengths: np.ndarray,
        shapes: Shapes,
        *,
        identity: str,
        window: int = 0,
        shard: grain.sharding.ShardOptions = WHOLE,
    ) -> None:
        super().__init__(cells)
        self._planner = _Planner(lengths, shapes, identity, window)
        self._shard = shard
        self._worker = slice(0, None, 1)

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:  # noqa: FBT001, FBT002
        """Leaves the batches of one of grain's workers, sl.start of sl.step; grain calls this."""
        del sequential_slice  # Batches have no order on disk that it could keep.
        self._worker = sl

    def __iter__(self) -> "_BatchPlanIterator":
        return _BatchPlanIterator(iter(self._parent), self._planner, self._shard, self._worker)


class _Planner:
    """What cells become rows, and of which bucket: fixed for a plan."""

    def __init__(self, lengths: np.ndarray, shapes: Shapes, identity: str, window: int) -> None:
        self.count, self.rows, self.window = len(lengths), shapes.rows, max(1, window)
        self.identity = identity
        self._lengths, self._shapes, self._packs = lengths, shapes, window > 0
        self._buckets = shapes.buckets.assign(lengths)

    def rows_of(self, cells: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Bucket and cells of each row."""
        if not self._packs:
            return [(int(self._buckets[cell]), [cell]) for cell in cells]
        lengths = self._lengths[np.asarray(cells)].tolist()
        packed = first_fit(lengths, self._shapes.buckets)
        return [(row.bucket, [cells[i] for i in row.members]) for row in packed]


class _BatchPlanIterator(grain.DatasetIterator[Planned]):
    """Holds rows that wait for their batch; they and the place in the stream are its state."""

    def __init__(
        self,
        parent: grain.DatasetIterator[int],
        planner: _Planner,
        shard: grain.sharding.ShardOptions,
        worker: slice,
    ) -> None:
        super().__init__(parent)
        self._planner, self._shard, self._worker = planner, shard, worker
        self._taken = self._planned = 0
        self._waiting: list[list[list[int]]] = [[] for _ in planner.rows]

    def __next__(self) -> Planned:
        start, step = self._worker.start or 0, self._worker.step or 1
        while True:
            planned, number = self._plan_next(), self._planned
            self._planned += 1
            if number % step == start:
                return planned

    def get_state(self) -> dict[str, Any]:
        """Small and of plain lists and integers, so that json takes it; the same in any process."""
        waiting = [[list(row) for row in rows] for rows in self._waiting]
        return {
            "identity": self._planner.identity,
            "parent": self._parent.get_state(),
            "taken": self._taken,
            "planned": self._planned,
            "waiting": waiting,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on behind the batch after which get_state was called.

        Raises:
            InputError: the state is of other cells or settings.
        """
        if state.get("identity") != self._planner.identity:
            msg = (
                "the batches must be of the cells, seed and settings that the state was saved with "
                f"({state.get('identity')}), got others ({self._planner.identity}); go on with the "
                "same files and options, or start a new run"
            )
            raise InputError(msg)
        self._parent.set_state(state["parent"])
        self._taken, self._planned = state["taken"], state["planned"]
        self._waiting = [[list(row) for row in rows] for rows in state["waiting"]]

    def _plan_next(self) -> Planned:
        while True:
            for bucket, rows in enumerate(self._waiting):
                if len(rows) >= self._planner.rows[bucket]:
                    return self._release(bucket)
            if self._taken % self._planner.count == 0:
                for bucket, rows in enumerate(self._waiting):
                    if rows:
                        return self._release(bucket)
            self._take()

    def _take(self) -> None:
        """Adds a window of cells, none of the next epoch."""
        left = self._planner.count - self._taken % self._planner.count
        cells = [next(self._parent) for _ in range(min(self._planner.window, left))]
        self._taken += len(cells)
        for bucket, row in self._planner.rows_of(cells):
            self._waiting[bucket].append(row)

    def _release(self, bucket: int) -> Planned:
        size, waiting = self._planner.rows[bucket], self._waiting[bucket]
        rows, self._waiting[bucket] = waiting[:size], waiting[size:]
        epoch = (self._taken - 1) // self._planner.count
        # Every count-th row, so that no process has fillers alone where others have none.
        ours = rows[self._shard.shard_index :: self._shard.shard_count]
        return Planned(epoch, bucket, ours, rows[0][0])
