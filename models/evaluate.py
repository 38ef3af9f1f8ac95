"""What a trained model is worth: held-out loss, cell embeddings, silhouette of cell types."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import scipy.sparse as sp

from sigjax.models.batches import BatchStream
from sigjax.models.cells import Cells
from sigjax.models.collate import Batch
from sigjax.models.config import InputError
from sigjax.models.losses import masked_error
from sigjax.models.train import Model

# scanpy's default, and that of most published pipelines.
PCA_COMPONENTS = 50
# Silhouette needs all pairwise distances: more cells are sampled.
SILHOUETTE_CELLS = 10_000


def mean_loss(error: Callable[[Batch], tuple[Any, Any]], stream: BatchStream) -> float:
    """Mean squared error over all masked values of a stream's first epoch.

    Args:
        error: sum of squared errors of a batch and its number of masked values.
        stream: the cells and, by its seed, their fixed masks.
    """
    parts = [error(batch) for batch in stream.epoch(0)]
    total, count = np.sum(np.asarray(jax.device_get(parts), np.float64), axis=0)
    return float(total / count)


def baseline_loss(means: np.ndarray, stream: BatchStream) -> float:
    """mean_loss of predicting each gene's mean value [V], whatever the cell."""
    return mean_loss(
        lambda batch: masked_error(means[batch.gene_ids], batch.values, batch.masked), stream
    )


def embed(model: Model, params: dict[str, Any], stream: BatchStream) -> np.ndarray:
    """Embeds all cells of a stream with nothing masked.

    Args:
        model: W features wide.
        params: its parameters.
        stream: C cells.

    Returns:
        float32 [C, W] in the order of stream.cells.
    """
    apply = jax.jit(lambda params, batch: model.apply(params)(batch).embedding)
    embedding = None
    for batch in stream.epoch(0):
        seen = batch._replace(masked=np.zeros_like(batch.masked))
        rows = np.asarray(apply(params, seen))
        if embedding is None:
            embedding = np.zeros((len(stream.cells), rows.shape[1]), np.float32)
        embedding[batch.rows[batch.real]] = rows[batch.real]
    if embedding is None:
        msg = "stream must hold at least one cell"
        raise InputError(msg)
    return embedding


def matrix_of(cells: Cells, vocabulary_size: int) -> sp.csr_matrix:
    """The cells' values as CSR float32 [C, V]."""
    shape = (len(cells), vocabulary_size)
    return sp.csr_matrix((cells.values, cells.gene_ids, cells.indptr), shape=shape)


def pca(matrix: sp.csr_matrix, components: int = PCA_COMPONENTS, seed: int = 0) -> np.ndarray:
    """Principal components of the log-normalised values, centred, never densified.

    Args:
        matrix: [C, V].
        components: at most; fewer where the matrix has fewer rows or columns.
        seed: of the start vector.

    Returns:
        float32 [C, components].

    Raises:
        InputError: fewer than three cells.
    """
    from sklearn.decomposition import PCA

    used = sp.csr_matrix(matrix[:, np.unique(matrix.indices)])
    count = min(components, min(used.shape) - 1)
    if count < 1 or matrix.shape[0] < 3:
        msg = f"a PCA needs at least 3 cells and 2 expressed genes, got {used.shape}"
        raise InputError(msg)
    fitted = PCA(count, svd_solver="arpack", random_state=seed)
    return fitted.fit_transform(used).astype(np.float32)


def silhouette(embedding: np.ndarray, labels: np.ndarray, seed: int = 0) -> float:
    """Mean silhouette of the labels by Euclidean distance, -1 to 1, higher is better.

    Args:
        embedding: [C, W].
        labels: [C]; cells whose label is missing are left out.
        seed: of the sample where there are more than SILHOUETTE_CELLS cells.

    Raises:
        InputError: fewer than two labels, or as many as cells.
    """
    from sklearn.metrics import silhouette_score

    known = np.array([isinstance(label, str) for label in labels])
    embedding, labels = embedding[known], labels[known]
    if len(labels) > SILHOUETTE_CELLS:
        sample = np.random.default_rng(seed).choice(len(labels), SILHOUETTE_CELLS, replace=False)
        embedding, labels = embedding[sample], labels[sample]
    groups = len(np.unique(labels.astype(str)))
    if not 2 <= groups < len(labels):
        msg = f"a silhouette needs 2 labels or more, each of several cells, got {groups} labels"
        raise InputError(msg)
    return float(silhouette_score(embedding, labels.astype(str)))
