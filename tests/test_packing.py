"""Packed rows: every token of every cell once, cells told apart, and a model that keeps them so."""

import itertools
import json
from dataclasses import replace

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax.buckets import LengthBuckets
from sigjax.models.batches import BatchStream, fit_buckets
from sigjax.models.cells import Cells
from sigjax.models.collate import FILLER, Batch, Collator, PackedBatch
from sigjax.models.config import DataConfig, InputError, ModelConfig, TrainConfig
from sigjax.models.packing import CELLS_A_ROW, first_fit, packed_buckets
from sigjax.models.plan import Planned
from sigjax.models.tokens import encoding_of
from sigjax.models.train import Model, TrainState, build
from sigjax.models.transformer import Outputs
from sigjax.models.vocabulary import CELL_TOKEN, RESERVED
from sigjax.numerics import tolerance

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
                # Ranks are those within the cell, wherever in the row it lies.
                assert batch.codes is not None
                np.testing.assert_array_equal(batch.codes[i, tokens], np.arange(len(tokens)))
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


# Lengths without the cell token, and which of these cells share a row.
TOGETHER = (10, 2, 19, 39, 6, 29)
ROWS = [[0, 1, 2], [3], [4, 5]]


def built(attention, encoding) -> tuple[Model, TrainState]:
    model = ModelConfig(layers=1, width=16, heads=2, attention=attention)
    data = replace(CONFIG, encoding=encoding)
    size = GENES + RESERVED
    return build(model, size, TrainConfig(), encoding=encoding_of(data))


def packed_and_alone(encoding) -> tuple[PackedBatch, list[tuple[Batch, list[int]]]]:
    """The same cells packed, and alone in several orders, with these; rows fill up in each."""
    collator = Collator(
        made(TOGETHER),
        ((4, 48), (7, 64)),
        encoding_of(replace(CONFIG, encoding=encoding)),
        GENES + RESERVED,
        CONFIG.mask_share,
        CONFIG.query_genes,
        0,
    )
    orders = [list(np.random.default_rng(seed).permutation(len(TOGETHER))) for seed in range(4)]
    alone = [
        (collator.single(Planned(0, 1, [[cell] for cell in order], 0)), order) for order in orders
    ]
    return collator.packed(Planned(0, 0, ROWS, 0)), alone


def assert_within_rounding(packed, alone):
    """The tolerance rule, where plain is the same cells one a row, whose order rounding depends on.

    Sums may cancel: the magnitude is that of the largest number of all.
    """
    plain = jax.tree.map(lambda *parts: np.stack(parts), *alone)
    exact = jax.tree.map(lambda parts: parts.astype(np.float64).mean(0), plain)
    magnitude = max(float(np.abs(x).max()) for x in jax.tree.leaves(exact))
    leaves = map(jax.tree.leaves, (packed, plain, exact))
    for got, parts, mean in zip(*leaves, strict=True):
        assert np.abs(np.asarray(got, np.float64) - mean).max() <= tolerance(mean, parts, magnitude)


@pytest.mark.parametrize(("attention", "encoding"), [("sigmoid", "log1p"), ("softmax", "rank")])
def test_loss_and_gradients_of_packed_cells_are_those_of_cells_alone(attention, encoding):
    model, state = built(attention, encoding)
    packed, alone = packed_and_alone(encoding)
    slope = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
    ours = slope(state.params, packed)
    assert all(np.any(gradient) for gradient in jax.tree.leaves(ours[1]))
    assert_within_rounding(ours, [slope(state.params, batch) for batch, _ in alone])


@pytest.mark.parametrize(("attention", "encoding"), [("sigmoid", "rank"), ("softmax", "bins")])
def test_a_packed_cell_gives_what_it_gives_alone_whatever_is_beside_it(attention, encoding):
    model, state = built(attention, encoding)
    packed, alone = packed_and_alone(encoding)
    apply = jax.jit(lambda params, batch: model.apply(params)(batch))
    ours = apply(state.params, packed)
    theirs = [(apply(state.params, batch), order) for batch, order in alone]
    for row, column in np.argwhere(packed.real):
        own = packed.segment_ids[row] == column + 1
        cell = packed.cells[row, column]
        got = ours.predictions[row, own], ours.embedding[row, column], ours.profile[row, column]
        parts = [part_of(outputs, order.index(cell), own.sum()) for outputs, order in theirs]
        assert_within_rounding(got, parts)
        other = apply(state.params, with_others(packed, ~own | (np.arange(4) != row)[:, None]))
        np.testing.assert_array_equal(other.predictions[row, own], got[0])
        np.testing.assert_array_equal(other.embedding[row, column], got[1])


def part_of(outputs: Outputs, row: int, length: int) -> tuple[jax.Array, ...]:
    return outputs.predictions[row, :length], outputs.embedding[row], outputs.profile[row]


def with_others(packed: PackedBatch, others: np.ndarray) -> PackedBatch:
    """Other genes and values where others [B, L] says so."""
    return packed._replace(
        gene_ids=np.where(others, RESERVED + 7, packed.gene_ids),
        values=np.where(others, np.float32(9), packed.values),
        masked=packed.masked ^ others,
        codes=None if packed.codes is None else np.where(others, 3, packed.codes),
    )


def test_packed_and_unpacked_batches_are_refused_where_the_other_is_configured():
    for batches in (stream_of(CELLS).dataset, lambda: stream_of(CELLS).epoch(0)):
        with pytest.raises(InputError, match=r"must be 0 for batches of one .* got 16"):
            batches()
    alone = stream_of(CELLS, DataConfig(tokens_per_batch=256, multiple=8))
    for batches in (alone.packed_dataset, lambda: alone.packed_epoch(0)):
        with pytest.raises(InputError, match="pack_window must be at least 1"):
            batches()


def test_a_batch_that_packs_more_cells_than_can_be_drawn_from_is_refused():
    with pytest.raises(InputError, match=r"at most 65536 cells a batch.* got 80000 cells"):
        stream_of(CELLS, replace(CONFIG, tokens_per_batch=5000 * stream_of(CELLS).buckets.edges[0]))
