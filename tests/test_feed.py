"""The feed: the stream's own batches, on the device, ahead of the caller and resumable."""

import itertools
import json
import threading
from contextlib import closing
from dataclasses import replace

import jax
import numpy as np
import pytest

from sigjax.models.batches import BatchStream, fit_buckets
from sigjax.models.cells import Cells
from sigjax.models.config import DataConfig, InputError
from sigjax.models.feed import feed
from sigjax.models.vocabulary import CELL_TOKEN, RESERVED

GENES = 60
CONFIG = DataConfig(buckets=3, multiple=8, tokens_per_batch=128, query_genes=20, encoding="bins")
PACKED = replace(CONFIG, pack_window=5)
CONFIGS = pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["alone", "packed"])
LENGTHS = [3, 50, 17, 1, 8, 22, 9, 31, 2, 12, 5, 28, 40]


def stream_of(config=CONFIG, seed=0) -> BatchStream:
    rng = np.random.default_rng(0)
    ids = [np.sort(rng.choice(GENES, n, replace=False)) + RESERVED for n in LENGTHS]
    cells = Cells(
        np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64),
        np.concatenate(ids).astype(np.int32),
        rng.uniform(0.5, 5, sum(LENGTHS)).astype(np.float32),
    )
    return BatchStream(cells, fit_buckets(cells, config), GENES + RESERVED, config, seed)


def batches_of(stream: BatchStream):
    return stream.packed_dataset() if stream.config.pack_window else stream.dataset()


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


@CONFIGS
@pytest.mark.parametrize("workers", [0, 3])
def test_a_feed_gives_the_streams_batches_on_the_device(workers, config):
    expected = list(itertools.islice(batches_of(stream_of(config)), 25))
    with closing(feed(stream_of(config), workers=workers)) as fed:
        for theirs in expected:
            batch, cells = next(fed)
            assert_equal(batch, theirs)
            assert all(isinstance(field, jax.Array) for field in batch)
            assert cells == np.sum(np.asarray(batch.gene_ids) == CELL_TOKEN)


@CONFIGS
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("cut", [0, 1, 7])
def test_a_feed_goes_on_behind_the_batch_that_was_taken_not_the_one_fetched(cut, workers, config):
    with closing(feed(stream_of(config), workers=workers)) as fed:
        for _ in range(cut):
            next(fed)
        state = json.loads(json.dumps(fed.get_state()))
    expected = itertools.islice(batches_of(stream_of(config)), cut, cut + 20)
    with closing(feed(stream_of(config), state, workers=workers)) as resumed:
        for theirs in expected:
            assert_equal(next(resumed).batch, theirs)


def test_a_closed_feed_leaves_no_thread_behind():
    before = threading.active_count()
    fed = feed(stream_of())
    next(fed)
    assert threading.active_count() > before
    fed.close()
    assert threading.active_count() == before


def test_a_feed_refuses_a_state_of_other_batches():
    with closing(feed(stream_of())) as fed:
        state = fed.get_state()
    with pytest.raises(InputError, match="same files and options"):
        feed(stream_of(seed=1), state)
