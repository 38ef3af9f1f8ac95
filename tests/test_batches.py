"""From cells to batches: every value of every cell once an epoch, in few shapes, by seed alone."""

import itertools
import json
from dataclasses import replace

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax.buckets import LengthBuckets
from sigjax.models.batches import BatchStream, fit_buckets, split
from sigjax.models.cells import Cells
from sigjax.models.collate import FILLER
from sigjax.models.config import DataConfig, InputError
from sigjax.models.plan import Shapes
from sigjax.models.vocabulary import CELL_TOKEN, PADDING, RESERVED

GENES = 60
CONFIG = DataConfig(buckets=3, multiple=8, tokens_per_batch=128, query_genes=20)


def made(lengths, seed=0) -> Cells:
    rng = np.random.default_rng(seed)
    ids = [np.sort(rng.choice(GENES, n, replace=False)) + RESERVED for n in lengths]
    return Cells(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate(ids).astype(np.int32),
        rng.uniform(0.5, 5, sum(lengths)).astype(np.float32),
    )


def stream_of(cells, config=CONFIG, seed=0, **options) -> BatchStream:
    buckets = fit_buckets(cells, config)
    return BatchStream(cells, buckets, GENES + RESERVED, config, seed, **options)


def of_process(index, count, devices) -> BatchStream:
    shard = grain.sharding.ShardOptions(shard_index=index, shard_count=count)
    return stream_of(CELLS, WIDE, devices=devices, shard=shard)


def bits(batch):
    return [b"" if field is None else field.tobytes() for field in batch]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


# Eight rows, one a device, of the longest cells.
WIDE = replace(CONFIG, tokens_per_batch=512)
CELLS = made([3, 50, 17, 1, 8, 22, 9, 31, 2, 12, 5, 28, 40])


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, GENES), min_size=1, max_size=30), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_value_of_every_cell_once(lengths, epoch):
    cells = made(lengths)
    seen = {}
    for batch in stream_of(cells).epoch(epoch):
        for i in np.flatnonzero(batch.rows != FILLER):
            length = batch.lengths[i]
            assert batch.gene_ids[i, 0] == CELL_TOKEN
            assert np.all(batch.gene_ids[i, length:] == PADDING)
            assert not np.any(batch.values[i, length:])
            assert batch.rows[i] not in seen
            seen[batch.rows[i]] = batch.gene_ids[i, 1:length], batch.values[i, 1:length]
    assert sorted(seen) == list(range(len(cells)))
    for row, (ids, values) in seen.items():
        part = slice(cells.indptr[row], cells.indptr[row + 1])
        np.testing.assert_array_equal(ids, cells.gene_ids[part])
        np.testing.assert_array_equal(values, cells.values[part])


def test_batches_have_the_announced_shapes_and_dtypes():
    stream = stream_of(CELLS)
    batches = list(stream.epoch(0))
    assert {b.gene_ids.shape for b in batches} == set(stream.shapes)
    assert len(stream.shapes) <= CONFIG.buckets
    assert all(rows * length <= CONFIG.tokens_per_batch for rows, length in stream.shapes)
    assert len(batches) == stream.batches_per_epoch
    dtypes = [np.int32, np.float32, np.bool_, np.int32, np.int32, np.int32, np.float32]
    assert [field.dtype for field in batches[0] if field is not None] == dtypes


def test_a_row_that_fills_up_is_empty():
    fillers = 0
    for batch in stream_of(CELLS).epoch(0):
        filler = batch.rows == FILLER
        assert not batch.lengths[filler].any()
        assert not batch.masked[filler].any()
        assert not batch.query_values[filler].any()
        fillers += filler.sum()
    assert fillers


@settings(deadline=None, max_examples=20)
@given(share=st.floats(0.01, 0.99))
def test_the_share_of_hidden_values_is_as_asked_and_at_least_one(share):
    for batch in stream_of(CELLS, replace(CONFIG, mask_share=share)).epoch(0):
        real = batch.rows != FILLER
        expressed = batch.lengths[real] - 1
        expected = np.maximum(1, np.round(share * expressed))
        np.testing.assert_array_equal(batch.masked[real].sum(1), expected)
        inside = np.arange(batch.masked.shape[1]) < batch.lengths[:, None]
        assert not batch.masked[~inside].any()
        assert not batch.masked[:, 0].any()


def test_a_query_has_its_cells_value_or_zero():
    for batch in stream_of(CELLS).epoch(0):
        assert len(np.unique(batch.queries)) == CONFIG.query_genes
        assert batch.queries.min() >= RESERVED
        for i in np.flatnonzero(batch.rows != FILLER):
            values = dict(zip(batch.gene_ids[i], batch.values[i], strict=True))
            expected = [values.get(gene, 0) for gene in batch.queries]
            np.testing.assert_array_equal(batch.query_values[i], expected)


def test_the_same_seed_gives_the_same_batches_and_another_gives_others():
    ours, again, others = (
        list(itertools.islice(stream_of(CELLS, seed=seed).dataset(), 12)) for seed in (1, 1, 2)
    )
    for a, b in zip(ours, again, strict=True):
        assert_equal(a, b)
    assert any(not np.array_equal(a.rows, b.rows) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_cell_comes_once_an_epoch_over_all_processes(count):
    streams = [of_process(i, count, devices=count) for i in range(count)]
    for number in (0, 3):
        shares = [list(stream.epoch(number)) for stream in streams]
        rows = np.concatenate([batch.rows for share in shares for batch in share])
        assert sorted(rows[rows != FILLER]) == list(range(len(CELLS)))


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (3, 6), (8, 8)])
def test_all_processes_run_the_same_shape_at_the_same_step(count, devices):
    streams = [of_process(i, count, devices) for i in range(count)]
    for batches in zip(*(stream.epoch(1) for stream in streams), strict=True):
        assert len({batch.gene_ids.shape for batch in batches}) == 1
        assert len(batches[0].gene_ids) * count % devices == 0
        assert len({batch.queries.tobytes() for batch in batches}) == 1


def test_a_batch_holds_the_same_cells_however_many_processes_share_it():
    whole = stream_of(CELLS, WIDE, devices=8).epoch(0)
    shares = [of_process(i, 4, devices=8).epoch(0) for i in range(4)]
    for batch, *parts in zip(whole, *shares, strict=True):
        rows = np.concatenate([part.rows for part in parts])
        assert sorted(rows) == sorted(batch.rows)


@settings(deadline=None, max_examples=60)
@given(
    edges=st.lists(st.integers(1, 400), min_size=1, max_size=6, unique=True),
    devices=st.integers(1, 8),
    spare=st.integers(0, 2000),
)
def test_a_batch_holds_a_budget_of_tokens_up_to_a_row_a_device(edges, devices, spare):
    buckets = LengthBuckets(tuple(sorted(edges)))
    tokens = devices * max(edges) + spare
    shapes = Shapes.of_budget(buckets, tokens, devices)
    for rows, edge in zip(shapes.rows, buckets.edges, strict=True):
        assert rows % devices == 0
        assert tokens - devices * edge < rows * edge <= tokens


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_stream_goes_on_bit_for_bit_from_50_cuts(count):
    cuts = np.random.default_rng(count).choice(150, 50, replace=False)
    for index in range(count):
        stream = of_process(index, count, devices=4)
        batches, states, whole = iter(stream.dataset()), {}, []
        for number in range(cuts.max() + 100):
            if number in cuts:
                states[number] = json.dumps(batches.get_state())
            whole.append(bits(next(batches)))
        for cut, state in states.items():
            resumed = iter(of_process(index, count, devices=4).dataset())
            resumed.set_state(json.loads(state))
            assert [bits(batch) for batch in itertools.islice(resumed, 100)] == whole[
                cut : cut + 100
            ]


def test_a_state_is_small_and_the_same_in_every_process():
    iterators = [iter(of_process(i, 4, devices=4).dataset()) for i in range(4)]
    for _ in range(7):
        states = [json.dumps(iterator.get_state()) for iterator in iterators]
        assert len(set(states)) == 1
        assert len(states[0]) < 400
        for iterator in iterators:
            next(iterator)


@pytest.mark.parametrize(
    "other",
    [
        lambda: stream_of(CELLS, seed=1),
        lambda: stream_of(CELLS, replace(CONFIG, tokens_per_batch=256)),
        lambda: stream_of(made([3, 50, 17, 1])),
    ],
    ids=["seed", "budget", "cells"],
)
def test_a_state_of_other_batches_is_refused(other):
    state = iter(stream_of(CELLS).dataset()).get_state()
    with pytest.raises(InputError, match="same files and options"):
        iter(other().dataset()).set_state(state)


def test_workers_of_grain_change_neither_batches_nor_their_order():
    dataset = stream_of(CELLS).dataset()
    shared = iter(grain.experimental.multithread_prefetch(dataset, 3, 2))
    for ours, theirs in zip(itertools.islice(shared, 40), dataset, strict=False):
        assert_equal(ours, theirs)
    shared.close()


def test_a_cells_mask_does_not_depend_on_its_neighbours():
    few = replace(CONFIG, tokens_per_batch=64)
    masks = []
    for config in (CONFIG, few):
        found = {}
        for batch in stream_of(CELLS, config).epoch(0):
            for i in np.flatnonzero(batch.rows != FILLER):
                found[int(batch.rows[i])] = batch.masked[i].nonzero()[0].tolist()
        masks.append(found)
    assert masks[0] == masks[1]


def test_epochs_differ_in_order_and_masks():
    first, second = (list(stream_of(CELLS).epoch(n)) for n in (0, 1))
    assert [b.rows.tolist() for b in first] != [b.rows.tolist() for b in second]


def test_an_unshuffled_stream_keeps_the_order_within_a_bucket():
    for batch in stream_of(CELLS, shuffled=False).epoch(3):
        real = batch.rows[batch.rows != FILLER]
        assert np.all(np.diff(real) > 0)


def test_an_empty_cell_is_refused():
    with pytest.raises(InputError, match="none that is empty"):
        stream_of(made([3, 0, 4]))


def test_a_batch_too_small_for_the_longest_cell_is_refused():
    with pytest.raises(InputError, match="tokens_per_batch must hold the longest length 56"):
        stream_of(CELLS, replace(CONFIG, tokens_per_batch=55))
    with pytest.raises(InputError, match="must hold 3 rows, one a device, of the longest length"):
        stream_of(CELLS, devices=3)


def test_devices_that_processes_cannot_share_are_refused():
    with pytest.raises(InputError, match="devices must be a multiple of the 2 processes, got 3"):
        of_process(0, 2, devices=3)


def test_a_batch_of_more_cells_than_can_be_drawn_from_is_refused():
    with pytest.raises(InputError, match="tokens_per_batch must give at most 65536 cells"):
        stream_of(made([3, 4]), replace(CONFIG, tokens_per_batch=8 * 65537))


def test_the_buckets_count_the_cell_token():
    assert fit_buckets(made([8, 8]), CONFIG) == LengthBuckets((16,))


@settings(deadline=None, max_examples=30)
@given(count=st.integers(2, 60), share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_a_split_holds_every_cell_once_and_leaves_no_side_empty(count, share, seed):
    train, held_out = split(made([1] * count), share, seed)
    assert sorted([*train, *held_out]) == list(range(count))
    assert len(train)
    assert len(held_out)


def test_a_single_cell_cannot_be_split():
    with pytest.raises(InputError, match="at least 2 cells, got 1"):
        split(made([4]), 0.5, 0)
