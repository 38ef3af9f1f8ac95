"""Batches of real files, checked and timed: python -m benchmarks.batches DATA... --out CSV.

Reads .h5ad files uncut and prints, each checked against the cells themselves:

- that 1, 2, 3 and 8 processes together give every value of every cell once an epoch;
- the share of padding tokens with one length, 8, 16 and, packed, 4;
- cells a second of the whole feed, encoded, collated and moved to the device, of cells with a
  median of 1,200 genes, made for the purpose; one row of CSV a rate.

Other work on the machine slows it: the load is in every row.
"""

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import grain
import numpy as np

from benchmarks.provenance import git_commit, version
from sigjax.models.batches import BatchStream, fit_buckets
from sigjax.models.cells import Cells, without_empty
from sigjax.models.collate import FILLER, Batch
from sigjax.models.config import DataConfig, EncodingName
from sigjax.models.corpus import read_cells
from sigjax.models.feed import feed
from sigjax.models.padding import paddings
from sigjax.models.vocabulary import RESERVED

UNCUT = DataConfig(max_genes=100_000, multiple=128, buckets=8, tokens_per_batch=262_144)
PROCESSES = (1, 2, 3, 8)
GENES, MEDIAN, CELLS = 20_000, 1_200, 8_000
ENCODINGS: tuple[EncodingName, ...] = get_args(EncodingName.__value__)
COLUMNS = (
    "date", "cells_per_s", "cells_per_s_min", "cells_per_s_max", "rounds", "encoding", "workers",
    "median_genes", "tokens_per_batch", "cores", "load_1min", "device", "jax", "grain", "commit",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks on files and the timing; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="*", type=Path, help=".h5ad files or folders of them")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=40, help="batches of a round")
    parser.add_argument("--workers", type=int, default=0)
    asked = parser.parse_args(argv)
    exact = True
    if asked.data:
        cells, vocabulary = read_cells(asked.data, UNCUT, print)
        cells = without_empty(cells)
        checked = [is_exact(cells, vocabulary.size, count) for count in PROCESSES]
        exact = all(checked)
        print_padding(cells)
    rows = [measured(name, asked.rounds, asked.batches, asked.workers) for name in ENCODINGS]
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        with asked.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0 if exact else 1


def is_exact(cells: Cells, vocabulary_size: int, count: int) -> bool:
    """Whether count processes together give every value of every cell once an epoch."""
    config = replace(UNCUT, tokens_per_batch=UNCUT.tokens_per_batch * count)
    streams = [
        BatchStream(
            cells,
            fit_buckets(cells, config),
            vocabulary_size,
            config,
            0,
            devices=count,
            shard=grain.sharding.ShardOptions(shard_index=i, shard_count=count),
        )
        for i in range(count)
    ]
    seen, wrong, steps = np.zeros(len(cells), np.int64), 0, 0
    for parts in zip(*(stream.epoch(0) for stream in streams), strict=True):
        steps += 1
        wrong += len({part.gene_ids.shape for part in parts}) != 1
        for part in parts:
            seen[part.rows[part.rows != FILLER]] += 1
            wrong += _differing(cells, part)
    exact = not wrong and bool(np.all(seen == 1))
    print(
        f"{count} processes: {steps} steps of equal shapes, each of {len(cells):,} cells once and "
        f"all of its values: {'yes' if exact else 'NO'}"
    )
    return exact


def print_padding(cells: Cells) -> None:
    """Prints shares of padding tokens."""
    for count in (8, 16, 4):
        one, several, packed = paddings(cells.lengths + 1, replace(UNCUT, buckets=count))
        for choice in {8: (one, several), 16: (several,), 4: (packed,)}[count]:
            print(f"padding with {choice.name}: {choice.share:.2%}")


def measured(encoding: EncodingName, rounds: int, batches: int, workers: int) -> dict[str, object]:
    """A row of COLUMNS; rounds after one that is not counted."""
    import jax

    cells = made()
    config = replace(UNCUT, tokens_per_batch=65_536, encoding=encoding)
    stream = BatchStream(cells, fit_buckets(cells, config), GENES + RESERVED, config, 0)
    rates = []
    with closing(feed(stream, workers=workers)) as fed:
        for _ in range(rounds + 1):
            began, count = time.perf_counter(), 0
            for _ in range(batches):
                batch, real = next(fed)
                jax.block_until_ready(batch)
                count += real
            rates.append(count / (time.perf_counter() - began))
    rate, load = statistics.median(rates[1:]), os.getloadavg()[0]
    print(f"{encoding}: {rate:,.0f} cells/s ({min(rates[1:]):,.0f} to {max(rates[1:]):,.0f}), "
          f"load {load:.1f} on {os.cpu_count()} cores")  # fmt: skip
    values = (
        datetime.now(UTC).isoformat(timespec="seconds"), round(rate), round(min(rates[1:])),
        round(max(rates[1:])), rounds, encoding, workers, int(np.median(cells.lengths)),
        config.tokens_per_batch, os.cpu_count(), round(load, 2), jax.devices()[0].device_kind,
        version("jax"), version("grain"), git_commit(),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def made() -> Cells:
    """Random cells of log-normal length: the arithmetic of batches does not look at values."""
    rng = np.random.default_rng(0)
    spread = np.exp(rng.normal(np.log(MEDIAN), 0.5, CELLS))
    lengths = np.clip(spread, 200, 6_000).astype(np.int64)
    ids = [np.sort(rng.choice(GENES, n, replace=False)) + RESERVED for n in lengths]
    return Cells(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate(ids).astype(np.int32),
        np.log1p(rng.geometric(0.5, int(lengths.sum()))).astype(np.float32),
    )


def _differing(cells: Cells, batch: Batch) -> int:
    """Number of rows of a batch that are not their cell."""
    wrong = 0
    for i in np.flatnonzero(batch.rows != FILLER):
        start, end = cells.indptr[batch.rows[i]], cells.indptr[batch.rows[i] + 1]
        part = slice(1, batch.lengths[i])
        wrong += not (
            np.array_equal(batch.gene_ids[i, part], cells.gene_ids[start:end])
            and np.array_equal(batch.values[i, part], cells.values[start:end])
        )
    return wrong


if __name__ == "__main__":
    sys.exit(main())
