"""A run in its folder: cut and resumed it is the run that was never cut."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sigjax.models import checkpoints
from sigjax.models.cells import Cells
from sigjax.models.config import DataConfig, InputError, ModelConfig, TrainConfig
from sigjax.models.runs import Settings, fit, share_waited
from sigjax.models.train import StepRecord
from sigjax.models.vocabulary import RESERVED, Vocabulary

GENES = 24
SETTINGS = Settings(
    ModelConfig(layers=1, width=16, heads=2),
    DataConfig(buckets=1, multiple=8, tokens_per_batch=256, query_genes=16),
    TrainConfig(steps=12, evaluate_every=4, checkpoint_every=5, seed=3),
)

PACKED = replace(SETTINGS, data=replace(SETTINGS.data, pack_window=16))


def made(count: int) -> Cells:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, GENES, count)
    ids = [np.sort(rng.choice(GENES, n, replace=False)) for n in lengths]
    return Cells(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        (np.concatenate(ids) + RESERVED).astype(np.int32),
        rng.uniform(0.5, 5, int(lengths.sum())).astype(np.float32),
    )


def run(out: Path, settings: Settings = SETTINGS, *, count: int = 60, resume: bool = False):
    lines: list[str] = []
    genes = Vocabulary(tuple(f"G{i}" for i in range(GENES)))
    fit(made(count), genes, settings, out, lines.append, resume=resume)
    return lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a run, and in "cut" what it held when the checkpoint of step 5 was written."""
    folder = tmp_path_factory.mktemp("runs")
    save = checkpoints.save

    def save_and_copy(path, about, state, batches):
        save(path, about, state, batches)
        if int(state.step) == 5:
            shutil.copytree(path.parent, folder / "cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", save_and_copy)
        lines = run(folder / "run")
    assert any(line.startswith("waited for batches") for line in lines)
    return folder


@pytest.fixture
def cut(whole, tmp_path) -> Path:
    """A run that can go on from step 5, in mid-epoch."""
    shutil.copytree(whole / "cut", tmp_path / "run")
    return tmp_path / "run"


def curve(out: Path) -> list[tuple[str, ...]]:
    with (out / "loss.csv").open(newline="", encoding="utf-8") as file:
        return [(r["step"], r["loss"], r["held_out_loss"]) for r in csv.DictReader(file)]


def test_a_run_cut_in_mid_epoch_gives_the_curve_of_one_that_was_not(whole, cut):
    run(cut, resume=True)
    expected, got = curve(whole / "run"), curve(cut)
    assert [row[:2] for row in got] == [row[:2] for row in expected]
    # It evaluates where it begins again, too.
    assert {row for row in expected if row[2]} <= set(got)


@pytest.mark.parametrize(
    ("settings", "count", "message"),
    [
        (replace(SETTINGS, data=replace(SETTINGS.data, buckets=2)), 60, "buckets 1, not 2"),
        (replace(SETTINGS, data=replace(SETTINGS.data, encoding="rank")), 60, "encoding 'log1p'"),
        (PACKED, 60, "pack_window 0, not 16"),
        (replace(SETTINGS, training=replace(SETTINGS.training, seed=4)), 60, "cells, seed"),
        (SETTINGS, 61, "cells, seed"),
    ],
    ids=["buckets", "encoding", "packing", "seed", "cells"],
)
def test_a_run_is_not_resumed_on_other_batches(cut, settings, count, message):
    before = (cut / "settings.json").read_bytes()
    with pytest.raises(InputError, match=message):
        run(cut, settings, count=count, resume=True)
    assert (cut / "settings.json").read_bytes() == before


def test_a_checkpoint_that_does_not_say_where_its_batches_were_is_refused(cut):
    restored = checkpoints.load(cut)
    checkpoints.save(cut / "checkpoint", restored.about, restored.state)
    with pytest.raises(InputError, match="says not where its batches were"):
        run(cut, resume=True)


@pytest.mark.parametrize(
    ("seconds", "waited", "share"),
    [
        ((100.0, 101.0, 102.0, 104.0), (9.0, 9.0, 9.1, 9.3), 0.1),  # 100 s of compilation
        ((50.0, 60.0, 2.0, 4.0), (0.0, 0.0, 1.0, 1.5), 0.25),  # resumed behind the second step
        ((4.0,), (1.0,), 0.25),
    ],
    ids=["compiled", "resumed", "one step"],
)
def test_the_share_waited_leaves_compilation_out(
    seconds: tuple[float, ...], waited: tuple[float, ...], share: float
):
    steps = [
        StepRecord(i + 1, 1.0, 1.0, 1.0, 1, *times)
        for i, times in enumerate(zip(seconds, waited, strict=True))
    ]
    assert share_waited(steps) == pytest.approx(share)
