"""Checkpoints: bit for bit, whole or not at all, and refused where they are of something else."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax.models import checkpoints
from sigjax.models.config import DataConfig, InputError, ModelConfig, TrainConfig
from sigjax.models.outputs import written
from sigjax.models.train import TrainState, build
from sigjax.models.vocabulary import Vocabulary

GENES = ("A", "B", "C")
MODEL = ModelConfig(layers=2, width=8, heads=2)


def about(**changes) -> checkpoints.About:
    vocabulary = Vocabulary(GENES)
    whole = checkpoints.About(
        MODEL, DataConfig(), TrainConfig(), vocabulary, np.arange(5, dtype=np.float32)
    )
    return replace(whole, **changes)


def state_of(about: checkpoints.About, step: int = 7) -> TrainState:
    _, state = build(about.model, about.vocabulary.size, about.training)
    # Every leaf with values of its own, so that no two could be swapped unseen.
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(state))))
    state = jax.tree.map(
        lambda x: jax.random.normal(next(keys), x.shape, x.dtype) if x.dtype == jnp.float32 else x,
        state,
    )
    return state._replace(step=jnp.int32(step))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoints.save(tmp_path / "checkpoint", about(), state_of(about()))
    return tmp_path / "checkpoint"


def edit(path: Path, **changes) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def test_a_checkpoint_comes_back_bit_for_bit(saved: Path):
    restored = checkpoints.load(saved)
    ours, theirs = jax.tree.leaves_with_path(state_of(about())), jax.tree.leaves(restored.state)
    for (path, a), b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    assert int(restored.state.step) == 7
    for name in ("model", "data", "training", "vocabulary"):
        assert getattr(restored.about, name) == getattr(about(), name)
    np.testing.assert_array_equal(restored.about.gene_means, about().gene_means)


def test_the_folder_of_a_run_stands_for_its_checkpoint(saved: Path):
    assert checkpoints.load(saved.parent).about.model == MODEL


def test_a_newer_checkpoint_replaces_an_older_one_and_leaves_nothing_else(saved: Path):
    checkpoints.save(saved, about(), state_of(about(), step=9))
    assert int(checkpoints.load(saved).state.step) == 9
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


def test_the_manifest_names_versions_and_step(saved: Path):
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert manifest["versions"]["jax"] == jax.__version__


def test_a_write_that_fails_leaves_the_older_file_and_nothing_half_written(tmp_path: Path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with written(path) as temporary:
            temporary.write_text("half")
            msg = "disk full"
            raise OSError(msg)

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="nowhere: no such checkpoint"):
        checkpoints.load(tmp_path / "nowhere")


@pytest.mark.parametrize("text", [None, "not json", "[1]", '{"format": "else"}'])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="not a sigjax checkpoint"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "Other"}, "of another model: 'Other'"),
        ({"format_version": 99}, "format_version must be 1, got 99"),
        ({"vocabulary": "0"}, "not the vocabulary of this checkpoint"),
        ({"config": {"layers": 2}}, "damaged: InputError: a model's settings"),
        ({"data": {"colour": 1}}, "damaged: TypeError"),
    ],
    ids=["model", "version", "vocabulary", "config", "data"],
)
def test_a_manifest_of_something_else_is_refused(saved: Path, change: dict, message: str):
    edit(saved, **change)
    with pytest.raises(InputError, match=message):
        checkpoints.load(saved)


def test_a_state_of_another_shape_is_refused(saved: Path):
    edit(saved, config=replace(MODEL, width=16).to_dict())
    with pytest.raises(InputError, match="damaged or of another model"):
        checkpoints.load(saved)


@pytest.mark.parametrize("name", ["vocabulary.json", "gene_means.npy"])
def test_a_checkpoint_with_a_missing_file_is_refused(saved: Path, name: str):
    (saved / name).unlink()
    with pytest.raises(InputError, match="damaged: FileNotFoundError"):
        checkpoints.load(saved)


def test_a_checkpoint_with_a_missing_state_is_refused(saved: Path):
    (saved / "state").rename(saved / "elsewhere")
    with pytest.raises(InputError, match="state is damaged"):
        checkpoints.load(saved)


def test_means_of_another_vocabulary_are_refused(saved: Path):
    np.save(saved / "gene_means.npy", np.zeros(4, np.float32))
    with pytest.raises(InputError, match=r"gene_means\.npy does not fit"):
        checkpoints.load(saved)


def test_going_on_with_another_model_or_vocabulary_is_refused():
    path = Path("run")
    checkpoints.require_same(path, about(), MODEL, Vocabulary(GENES))
    with pytest.raises(InputError, match="another model: it has layers 2, not 3"):
        checkpoints.require_same(path, about(), replace(MODEL, layers=3), Vocabulary(GENES))
    with pytest.raises(InputError, match=r"another vocabulary \(3 genes, not 2"):
        checkpoints.require_same(path, about(), MODEL, Vocabulary(GENES[:2]))
