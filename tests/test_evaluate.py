"""Scores: held-out means, embeddings in the cells' order, silhouettes, PCA and pictures."""

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

from sigjax.models.batches import BatchStream, fit_buckets
from sigjax.models.cells import Cells
from sigjax.models.config import DataConfig, InputError, ModelConfig, TrainConfig
from sigjax.models.evaluate import baseline_loss, embed, matrix_of, mean_loss, pca, silhouette
from sigjax.models.history import History
from sigjax.models.losses import gene_means
from sigjax.models.pictures import draw_cells, draw_loss, plane
from sigjax.models.train import StepRecord, build
from sigjax.models.vocabulary import RESERVED

GENES = 30
SIZE = GENES + RESERVED
DATA = DataConfig(buckets=3, multiple=8, tokens_per_batch=96, query_genes=4)


def made(count=23, seed=0) -> Cells:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, GENES, count)
    ids = [np.sort(rng.choice(GENES, n, replace=False)) + RESERVED for n in lengths]
    return Cells(
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate(ids).astype(np.int32),
        rng.uniform(0.5, 5, lengths.sum()).astype(np.float32),
    )


def stream_of(cells, data=DATA, **options) -> BatchStream:
    return BatchStream(cells, fit_buckets(cells, data), SIZE, data, 0, shuffled=False, **options)


def test_the_mean_loss_weighs_every_masked_value_alike():
    stream = stream_of(made())
    squares = np.concatenate([batch.values[batch.masked] ** 2 for batch in stream.epoch(0)])

    def error(batch):
        return np.sum(batch.values[batch.masked] ** 2), batch.masked.sum()

    assert mean_loss(error, stream) == pytest.approx(squares.mean(), rel=1e-6)


def test_the_baseline_predicts_each_genes_training_mean():
    means, stream = gene_means(made(seed=1), SIZE), stream_of(made())
    errors = [
        (means[batch.gene_ids] - batch.values)[batch.masked] ** 2 for batch in stream.epoch(0)
    ]
    assert baseline_loss(means, stream) == pytest.approx(np.concatenate(errors).mean(), rel=1e-5)


def test_embeddings_come_in_the_cells_order_whatever_the_batches():
    model, state = build(ModelConfig(layers=1, width=8, heads=2), SIZE, TrainConfig())
    cells = made()
    order = np.random.default_rng(0).permutation(len(cells))
    small = DataConfig(buckets=1, multiple=8, tokens_per_batch=64, query_genes=4)
    ours = embed(model, state.params, stream_of(cells))
    theirs = embed(model, state.params, stream_of(cells.take(order), small))
    assert ours.shape == (len(cells), 8)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours[order], theirs, rtol=1e-4, atol=1e-5)
    assert len(np.unique(ours, axis=0)) == len(cells)


def test_the_pca_is_that_of_the_dense_matrix():
    matrix = matrix_of(made(40), SIZE)
    ours = pca(matrix, 5)
    theirs = PCA(5, svd_solver="full").fit_transform(matrix.toarray())
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), rtol=1e-3, atol=1e-3)


def test_the_pca_has_fewer_components_where_there_are_fewer_cells():
    assert pca(matrix_of(made(6), SIZE)).shape == (6, 5)


def test_a_pca_of_two_cells_is_refused():
    with pytest.raises(InputError, match="at least 3 cells"):
        pca(sp.csr_matrix(np.eye(2, 5, dtype=np.float32)))


def test_the_silhouette_leaves_out_cells_without_a_label():
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(30, 3)), np.array(["a", "b", "c"] * 10, object)
    points[labels == "b"] += 4
    with_gaps = np.array([*labels, np.nan, None], object)
    ours = silhouette(np.concatenate([points, np.full((2, 3), 1e3)]), with_gaps)
    assert ours == pytest.approx(silhouette_score(points, labels.astype(str)))


def test_a_large_silhouette_is_sampled_by_seed(monkeypatch):
    monkeypatch.setattr("sigjax.models.evaluate.SILHOUETTE_CELLS", 50)
    points = np.random.default_rng(0).normal(size=(200, 2))
    labels = np.where(points[:, 0] > 0, "a", "b").astype(object)
    first, again, other = (silhouette(points, labels, seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("labels", [["a"] * 4, ["a", "b", "c", "d"], [None] * 4])
def test_labels_that_form_no_groups_are_refused(labels):
    with pytest.raises(InputError, match="needs 2 labels or more"):
        silhouette(np.eye(4), np.array(labels, object))


def test_the_pictures_are_written(tmp_path):
    history = History([StepRecord(1, 2.0, 1e-3, 1.0, 8, 0.5, 0.1)], [(0, 3.0), (1, 2.0)])
    draw_loss(tmp_path / "loss.png", history, baseline=2.5)
    draw_cells(
        tmp_path / "umap.png",
        {"one": np.zeros((3, 2)), "two": np.ones((3, 2))},
        np.array(["a", "b", "a"]),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "umap.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.iterdir())


# umap's own compiled code warns while it is compiled.
@pytest.mark.filterwarnings("ignore::numba.NumbaWarning")
def test_a_plane_keeps_two_far_groups_apart():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(40, 5))
    points[20:] += 30
    plane_points = plane(points.astype(np.float32))
    assert plane_points.shape == (40, 2)
    assert silhouette(plane_points, np.array(["a"] * 20 + ["b"] * 20, object)) > 0.5
