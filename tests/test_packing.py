"""Packed rows: every token of every cell once, cells told apart, less padding."""

import itertools
import json

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax.buckets import LengthBuckets
from sigjax.models.batches import BatchStream, fit_buckets, require_unpacked
from sigjax.models.cells import Cells
from sigjax.models.collate import FILLER
from sigjax.models.config import DataConfig, InputError
from sigjax.models.packing import CELLS_A_ROW, first_fit, packed_buckets
from sigjax.models.vocabulary import CELL_TOKEN, RESERVED

GENES = 60
CONFIG = DataConfig(
    buckets=3, multiple=8, tokens_per_batch=256, query_genes=20, pack_window=16, encoding="rank"
)


def made(lengths, seed=0) -> Cells:
    rng = np.random.default_rng(seed)
    ids = [np.sort(rng.choice(GENES, n, replace=False)) + RESERVED for n in lengths]
    return Cells(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate(ids).astype(np.int32),
        rng.uniform(0.5, 5, sum(lengths)).astype(np.float32),
    )


def stream_of(cells, config=CONFIG, **options) -> BatchStream:
    return BatchStream(cells, fit_buckets(cells, config), GENES + RESERVED, config, 0, **options)


CELLS = made(np.random.default_rng(1).integers(1, 50, 70))


@settings(deadline=None, max_examples=80)
@given(lengths=st.lists(st.integers(1, 128), min_size=1, max_size=60))
def test_first_fit_puts_every_cell_in_one_row_that_holds_it(lengths):
    buckets = LengthBuckets((32, 64, 128))
    rows = first_fit(lengths, buckets)
    assert sorted(i for row in rows for i in row.members) == list(range(len(lengths)))
    for row in rows:
        assert row.length == sum(lengths[i] for i in row.members)
        assert row.bucket == buckets.assign([row.length])[0]
        assert len(row.members) <= CELLS_A_ROW


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 128), min_size=1, max_size=60))
def test_packed_rows_are_never_longer_in_all_than_cells_one_a_row(lengths):
    buckets = LengthBuckets((32, 64, 128))
    packed = sum(buckets.edges[row.bucket] for row in first_fit(lengths, buckets))
    assert packed <= sum(buckets.edges[i] for i in buckets.assign(lengths))


def test_lengths_of_rows_halve_from_the_longest_cell():
    assert packed_buckets(17_055, 4, 128).edges == (2176, 4352, 8576, 17_152)
    assert packed_buckets(20, 4, 8).edges == (8, 16, 24)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_packed_batches_hold_every_token_of_every_cell_once(count):
    seen = {}
    for index in range(count):
        shard = grain.sharding.ShardOptions(shard_index=index, shard_count=count)
        for batch in stream_of(CELLS, devices=count, shard=shard).packed_epoch(1):
            for i, j in np.argwhere(batch.cells != FILLER):
                tokens = np.flatnonzero(batch.segment_ids[i] == j + 1)
                assert tokens[0] == batch.starts[i, j]
                assert np.all(np.diff(tokens) == 1)
                assert batch.gene_ids[i, tokens[0]] == CELL_TOKEN
                assert batch.cells[i, j] not in seen
                ids, values = (x[i, tokens[1:]] for x in (batch.gene_ids, batch.values))
                order = np.argsort(ids)
                seen[batch.cells[i, j]] = ids[order], values[order]
    assert sorted(seen) == list(range(len(CELLS)))
    for cell, (ids, values) in seen.items():
        part = slice(CELLS.indptr[cell], CELLS.indptr[cell + 1])
        np.testing.assert_array_equal(ids, CELLS.gene_ids[part])
        np.testing.assert_array_equal(values, CELLS.values[part])


def test_segments_number_a_rows_cells_and_padding_is_zero():
    for batch in stream_of(CELLS).packed_epoch(0):
        inside = np.arange(batch.segment_ids.shape[1]) < batch.lengths[:, None]
        np.testing.assert_array_equal(batch.segment_ids > 0, inside)
        np.testing.assert_array_equal(batch.segment_ids.max(1), (batch.cells != FILLER).sum(1))
        assert batch.segment_ids.dtype == np.int32
        assert not batch.masked[~inside].any()


def test_a_cells_hidden_values_and_queries_are_those_of_a_row_of_its_own():
    hidden, values = {}, {}
    for batch in stream_of(CELLS).packed_epoch(0):
        for i, j in np.argwhere(batch.cells != FILLER):
            inside = batch.segment_ids[i] == j + 1
            cell = int(batch.cells[i, j])
            hidden[cell] = sorted(batch.gene_ids[i, inside & batch.masked[i]])
            known = dict(zip(batch.gene_ids[i, inside], batch.values[i, inside], strict=True))
            values[cell] = [known.get(gene, 0) for gene in batch.queries]
            np.testing.assert_array_equal(batch.query_values[i, j], values[cell])
    plain = DataConfig(buckets=2, multiple=8, tokens_per_batch=256, query_genes=20)
    for batch in stream_of(CELLS, plain).epoch(0):
        for i in np.flatnonzero(batch.rows != FILLER):
            assert hidden[int(batch.rows[i])] == sorted(batch.gene_ids[i, batch.masked[i]])


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_packed_stream_goes_on_bit_for_bit(cut):
    batches = iter(stream_of(CELLS).packed_dataset())
    for _ in range(cut):
        next(batches)
    resumed = iter(stream_of(CELLS).packed_dataset())
    resumed.set_state(json.loads(json.dumps(batches.get_state())))
    for ours, theirs in zip(itertools.islice(batches, 30), resumed, strict=False):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_packing_pads_less_with_fewer_shapes():
    lengths = CELLS.lengths + 1
    stream = stream_of(CELLS)
    tokens = sum(batch.segment_ids.size for batch in stream.packed_epoch(0))
    rows = sum(
        int((batch.lengths > 0).sum()) * batch.segment_ids.shape[1]
        for batch in stream.packed_epoch(0)
    )
    alone = LengthBuckets.fit(lengths, count=3, multiple=8).waste(lengths)
    assert 1 - lengths.sum() / rows < alone
    assert rows <= tokens
    assert {batch.segment_ids.shape for batch in stream.packed_epoch(0)} <= set(stream.shapes)
    assert len(list(stream.packed_epoch(0))) == stream.batches_per_epoch


def test_a_model_refuses_packed_cells_and_says_why():
    with pytest.raises(NotImplementedError, match="pack_window must be 0 for a model, got 16"):
        require_unpacked(CONFIG)
    with pytest.raises(NotImplementedError, match="segment ids"):
        stream_of(CELLS).dataset()


def test_packing_without_a_window_is_refused():
    with pytest.raises(InputError, match="pack_window must be at least 1"):
        stream_of(CELLS, DataConfig(tokens_per_batch=256, multiple=8)).packed_dataset()
