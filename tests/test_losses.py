"""The losses and the baseline, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax.models.cells import Cells
from sigjax.models.losses import (
    gene_means,
    masked_error,
    masked_loss,
    profile_loss,
    profile_means,
)


def drawn(seed, rows=3, length=7):
    rng = np.random.default_rng(seed)
    shape = (rows, length)
    return (
        rng.normal(size=shape).astype(np.float32),
        rng.uniform(0, 5, shape).astype(np.float32),
        rng.random(shape) < 0.4,
    )


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000))
def test_the_loss_is_the_mean_square_over_masked_values(seed):
    predictions, values, masked = drawn(seed)
    expected = np.mean((predictions - values)[masked] ** 2) if masked.any() else 0.0
    assert float(masked_loss(predictions, values, masked)) == pytest.approx(expected, rel=1e-5)


def test_what_is_not_masked_reaches_neither_loss_nor_gradient():
    predictions, values, masked = drawn(0)
    poisoned = jnp.where(masked, predictions, jnp.nan)
    loss, gradient = jax.value_and_grad(masked_loss)(poisoned, values, masked)
    assert float(loss) == pytest.approx(float(masked_loss(predictions, values, masked)))
    assert np.all(np.asarray(gradient)[~masked] == 0)
    assert np.all(np.isfinite(np.asarray(gradient)))


def test_a_batch_without_masked_values_has_loss_and_gradient_zero():
    predictions, values, _ = drawn(0)
    nothing = np.zeros_like(values, bool)
    loss, gradient = jax.value_and_grad(masked_loss)(jnp.asarray(predictions), values, nothing)
    assert float(loss) == 0.0
    assert not np.asarray(gradient).any()


def test_errors_of_unequal_batches_add_up_to_the_mean_over_all():
    parts = [drawn(seed, rows, 7) for seed, rows in ((1, 2), (2, 5))]
    sums = np.sum([[float(x) for x in masked_error(*part)] for part in parts], axis=0)
    whole = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    assert sums[0] / sums[1] == pytest.approx(float(masked_loss(*whole)), rel=1e-5)


def test_half_precision_predictions_are_compared_in_float32():
    predictions, values, masked = drawn(3)
    half = jnp.asarray(predictions, jnp.bfloat16)
    loss = masked_loss(half, values, masked)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(
        float(masked_loss(half.astype(jnp.float32), values, masked))
    )


def test_the_profiles_loss_leaves_out_rows_that_fill_up():
    profile, values, _ = drawn(4)
    real = np.array([True, False, True])
    expected = np.mean((profile - values)[real] ** 2)
    assert float(profile_loss(profile, values, real)) == pytest.approx(expected, rel=1e-5)


def test_the_profiles_loss_of_packed_rows_is_that_of_their_cells_one_a_row():
    profile, values, _ = drawn(4, 6)
    real = np.array([True, True, False, True, False, False])
    profile[~real] = np.nan
    packed = profile_loss(profile.reshape(2, 3, 7), values.reshape(2, 3, 7), real.reshape(2, 3))
    assert float(packed) == pytest.approx(float(profile_loss(profile, values, real)), rel=1e-6)
    assert float(profile_loss(profile, values, np.zeros(6, bool))) == 0


def test_means_are_over_the_cells_that_express_a_gene():
    cells = Cells(
        np.array([0, 2, 3]), np.array([2, 3, 2], np.int32), np.array([1, 4, 3], np.float32)
    )
    means = gene_means(cells, 5)
    assert means.tolist()[2:4] == [2.0, 4.0]
    # A gene that no training cell expresses: the mean over all values.
    assert means[4] == pytest.approx(8 / 3)
    assert means.dtype == np.float32


def test_profile_means_count_cells_that_do_not_express_a_gene_as_zero():
    cells = Cells(
        np.array([0, 2, 3]), np.array([2, 3, 2], np.int32), np.array([1, 4, 3], np.float32)
    )
    assert profile_means(cells, 5).tolist() == [0, 0, 2, 2, 0]


def test_means_do_not_depend_on_how_many_entries_are_summed_at_a_time(monkeypatch):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 20)
    cells = Cells(
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([np.sort(rng.choice(12, n, replace=False)) for n in lengths]).astype(
            np.int32
        ),
        rng.uniform(0.5, 5, lengths.sum()).astype(np.float32),
    )
    whole = gene_means(cells, 12), profile_means(cells, 12)
    monkeypatch.setattr("sigjax.models.losses.BLOCK", 7)
    np.testing.assert_allclose(gene_means(cells, 12), whole[0], rtol=1e-6)
    np.testing.assert_allclose(profile_means(cells, 12), whole[1], rtol=1e-6)
