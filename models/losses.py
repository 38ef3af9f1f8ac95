"""The masked-expression loss and the baseline it has to beat."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from sigjax.models.cells import Cells

# Entries summed at a time: bincount makes copies of 16 bytes each, of cells that may lie on disk.
BLOCK = 2**22


def masked_error(
    predictions: ArrayLike, values: ArrayLike, masked: ArrayLike
) -> tuple[Array, Array]:
    """Sum of squared errors at masked positions, and their number.

    Sums of several batches add up to the exact mean over all masked values,
    however unequal the batches are.

    Args:
        predictions: [B, L]; anything, NaN included, where not masked.
        values: [B, L], log1p of counts per 10,000.
        masked: bool [B, L].

    Returns:
        Two float32 scalars.
    """
    error = jnp.asarray(predictions, jnp.float32) - jnp.asarray(values)
    # Before the square: 0 times the NaN of a position that is not asked would be NaN.
    error = jnp.where(jnp.asarray(masked), error, 0.0)
    return jnp.sum(error**2), jnp.sum(jnp.asarray(masked), dtype=jnp.float32)


def masked_loss(predictions: ArrayLike, values: ArrayLike, masked: ArrayLike) -> Array:
    """Mean squared error over the masked values of a batch; 0 where nothing is masked.

    Args as in masked_error; returns a float32 scalar.

    Example:
        >>> import jax.numpy as jnp
        >>> masked = jnp.array([[False, True, True]])
        >>> float(masked_loss(jnp.zeros((1, 3)), jnp.array([[9.0, 1.0, 2.0]]), masked))
        2.5
    """
    error, count = masked_error(predictions, values, masked)
    return error / jnp.maximum(count, 1.0)


def profile_loss(profile: ArrayLike, query_values: ArrayLike, real: ArrayLike) -> Array:
    """Mean squared error of the cells' profiles.

    Args:
        profile: [B, Q], of packed rows [B, M, Q]; predicted from the embedding alone.
        query_values: shape of profile, 0 where a gene is not expressed.
        real: bool [B] or [B, M]; what is not True is no cell and does not count.

    Returns:
        float32 scalar; 0 where no cell counts.
    """
    counts = jnp.broadcast_to(jnp.asarray(real)[..., None], jnp.shape(query_values))
    return masked_loss(profile, query_values, counts)


def gene_means(cells: Cells, vocabulary_size: int) -> np.ndarray:
    """Mean value of each gene over the cells that express it: the baseline's prediction.

    Args:
        cells: the training cells only.
        vocabulary_size: V, reserved ids included.

    Returns:
        float32 [V]; a gene that no cell expresses has the mean over all values.
    """
    sums, counts = _sums(cells, vocabulary_size)
    means = np.full(vocabulary_size, sums.sum() / counts.sum())
    return np.divide(sums, counts, out=means, where=counts > 0).astype(np.float32)


def profile_means(cells: Cells, vocabulary_size: int) -> np.ndarray:
    """Mean value of each gene over all cells, 0 where one does not express it: float32 [V]."""
    sums, _ = _sums(cells, vocabulary_size)
    return (sums / len(cells)).astype(np.float32)


def _sums(cells: Cells, vocabulary_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum of each gene's values, float64 [V], and number of cells that express it, int64 [V]."""
    sums, counts = np.zeros(vocabulary_size), np.zeros(vocabulary_size, np.int64)
    for start in range(0, len(cells.values), BLOCK):
        ids = cells.gene_ids[start : start + BLOCK]
        values = cells.values[start : start + BLOCK].astype(np.float64)
        sums += np.bincount(ids, values, vocabulary_size)
        counts += np.bincount(ids, minlength=vocabulary_size)
    return sums, counts
