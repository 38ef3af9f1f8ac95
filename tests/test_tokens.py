"""Encodings: what the model sees of a cell depends on that cell alone, and suffices to learn."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax.models import cli
from sigjax.models.batches import BatchStream, fit_buckets
from sigjax.models.cells import Cells
from sigjax.models.collate import FILLER
from sigjax.models.config import DataConfig, EncodingName
from sigjax.models.demo import blood_cells
from sigjax.models.history import History
from sigjax.models.quiet import quiet
from sigjax.models.tokens import Log1p, QuantileBins, RankOrder, encoding_of
from sigjax.models.vocabulary import RESERVED

ENCODINGS = [Log1p(), QuantileBins(5), RankOrder()]
NAMES: list[EncodingName] = ["log1p", "bins", "rank"]
# Few values, so that many are equal.
VALUES = st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.25, 7.0]), min_size=1, max_size=20)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: type(e).__name__)
@settings(deadline=None, max_examples=60)
@given(cells=st.lists(VALUES, min_size=1, max_size=6))
def test_a_cells_tokens_are_the_same_alone_and_among_others(encoding, cells):
    lengths = np.array([len(cell) for cell in cells])
    order, codes = encoding.encode(np.concatenate(cells).astype(np.float32), lengths)
    for cell, end in zip(cells, np.cumsum(lengths), strict=True):
        part = slice(end - len(cell), end)
        alone = encoding.encode(np.array(cell, np.float32), np.array([len(cell)]))
        np.testing.assert_array_equal(order[part] - part.start, alone.order)
        if codes is not None:
            np.testing.assert_array_equal(codes[part], alone.codes)


@settings(deadline=None, max_examples=60)
@given(cell=VALUES, count=st.integers(1, 30))
def test_a_bin_is_the_share_of_the_cells_values_that_are_lower(cell, count):
    values = np.array(cell, np.float32)
    codes = QuantileBins(count).encode(values, np.array([len(cell)])).codes
    lower = (values[None] < values[:, None]).sum(1)
    np.testing.assert_array_equal(codes, 1 + lower * count // len(cell))


@settings(deadline=None, max_examples=60)
@given(cell=VALUES)
def test_ranks_go_down_the_values_and_ties_go_by_the_vocabulary(cell):
    order, codes = RankOrder().encode(np.array(cell, np.float32), np.array([len(cell)]))
    assert order.tolist() == sorted(range(len(cell)), key=lambda i: (-cell[i], i))
    assert codes is not None
    assert codes.tolist() == list(range(1, len(cell) + 1))


def cells_of(lengths, seed=0) -> Cells:
    rng = np.random.default_rng(seed)
    ids = [np.sort(rng.choice(60, n, replace=False)) + RESERVED for n in lengths]
    return Cells(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate(ids).astype(np.int32),
        rng.uniform(0.5, 5, sum(lengths)).astype(np.float32),
    )


def tokens_by_cell(cells: Cells, config: DataConfig) -> dict[int, list[Any]]:
    """What stands in the batches of an epoch of each cell: values, masks and codes by gene."""
    found = {}
    stream = BatchStream(cells, fit_buckets(cells, config), 60 + RESERVED, config, 0)
    for batch in stream.epoch(2):
        for i in np.flatnonzero(batch.rows != FILLER):
            fields = [batch.gene_ids, batch.values, batch.masked, batch.codes]
            length = batch.lengths[i]
            found[int(batch.rows[i])] = [None if f is None else f[i, :length] for f in fields]
    return found


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    tokens=st.sampled_from([64, 128, 500]),
    buckets=st.integers(1, 4),
)
def test_a_cells_tokens_in_a_batch_ignore_its_neighbours(name, lengths, tokens, buckets):
    config = DataConfig(encoding=name, bins=7, multiple=8, tokens_per_batch=64, buckets=1)
    cells = cells_of(lengths)
    ours = tokens_by_cell(cells, config)
    theirs = tokens_by_cell(cells, replace(config, tokens_per_batch=tokens, buckets=buckets))
    assert ours.keys() == theirs.keys()
    for row, fields in ours.items():
        for a, b in zip(fields, theirs[row], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_an_encoding_changes_neither_the_values_nor_which_are_hidden(name):
    cells, config = cells_of([30, 12, 50]), DataConfig(multiple=8, tokens_per_batch=256)
    plain, coded = (
        tokens_by_cell(cells, c) for c in (config, replace(config, encoding=name, bins=7))
    )
    for row, (ids, values, masked, codes) in coded.items():
        order = np.argsort(ids)
        for ours, theirs in zip((ids, values, masked), plain[row], strict=False):
            np.testing.assert_array_equal(ours[order], theirs)
        if codes is not None:
            assert codes[0] == 0
            assert codes[1:].min() >= 1


def test_a_configuration_names_its_encoding():
    config = DataConfig(bins=9)
    found = [encoding_of(replace(config, encoding=name)) for name in NAMES]
    assert found == [Log1p(), QuantileBins(9), RankOrder()]


@pytest.fixture(scope="module")
def blood(tmp_path_factory) -> Path:
    """The first 200 of scanpy's real blood cells."""
    path = tmp_path_factory.mktemp("blood") / "blood.h5ad"
    with quiet():
        blood_cells()[:200].copy().write_h5ad(path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_model_learns_real_cells_from_each_encoding(blood, tmp_path, capsys, name):
    options = (
        f"--encoding {name} --bins 16 --values raw --buckets 1 --layers 1 --width 16 --heads 2 "
        "--tokens-per-batch 4096 --steps 30 --learning-rate 1e-2 --evaluate-every 30"
    )
    out = tmp_path / "run"
    assert cli.main(["train", str(blood), "--out", str(out), *options.split()]) == 0
    losses = dict(History.read(out / "loss.csv", 30).held_out)
    assert losses[30] < 0.6 * losses[0]
    compiled = re.search(r"(\d+) training steps compiled", capsys.readouterr().out)
    assert compiled is not None
    assert int(compiled[1]) == 1
