"""The masked-expression loss and the baseline it has to beat."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from sigjax.models.cells import Cells


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


def profile_loss(profile: ArrayLike, query_values: ArrayLike, lengths: ArrayLike) -> Array:
    """Mean squared error of the cells' profiles.

    Args:
        profile: [B, Q], predicted from the embedding alone.
        query_values: [B, Q], 0 where a gene is not expressed.
        lengths: int32 [B]; a row of length 0 does not count.

    Returns:
        float32 scalar; 0 where no row counts.
    """
    counts = jnp.broadcast_to((jnp.asarray(lengths) > 0)[:, None], jnp.shape(query_values))
    return masked_loss(profile, query_values, counts)


def gene_means(cells: Cells, vocabulary_size: int) -> np.ndarray:
    """Mean value of each gene over the cells that express it: the baseline's prediction.

    Args:
        cells: the training cells only.
        vocabulary_size: V, reserved ids included.

    Returns:
        float32 [V]; a gene that no cell expresses has the mean over all values.
    """
    sums = np.bincount(cells.gene_ids, cells.values.astype(np.float64), vocabulary_size)
    counts = np.bincount(cells.gene_ids, minlength=vocabulary_size)
    means = np.full(vocabulary_size, cells.values.mean(dtype=np.float64))
    return np.divide(sums, counts, out=means, where=counts > 0).astype(np.float32)


def profile_means(cells: Cells, vocabulary_size: int) -> np.ndarray:
    """Mean value of each gene over all cells, 0 where one does not express it: float32 [V]."""
    sums = np.bincount(cells.gene_ids, cells.values.astype(np.float64), vocabulary_size)
    return (sums / len(cells)).astype(np.float32)
