"""Counts from log-normalised values, exactly, where they are still in them.

A value is log1p(c s) or log2(c s + 1), with a scale s that one cell's values
share and whole numbers c. The smallest value of a cell is that of a count of 1,
or of 2, 3, ..., which gives s; the counts are exact where every value of the
cell is that of one whole number and of no other, as far as float32 can tell. Of
counts with a common divisor nothing tells the divisor: they come back without it,
which is the same cell once it is normalised.
"""

from dataclasses import dataclass

import numpy as np

# Smallest counts of a cell that are tried.
SMALLEST_COUNTS = range(1, 9)
# How far a count may be off, at most, so that no other whole number fits.
MOST_DOUBT = 0.3
REFINEMENTS = 6


@dataclass(frozen=True)
class Recovered:
    """What became of some cells' values.

    Attributes:
        counts: float64 [E], whole where the cell was recovered, else 0.
        exact: bool [C], which cells were recovered; a cell without values is one.
    """

    counts: np.ndarray
    exact: np.ndarray


def recover_counts(indptr: np.ndarray, values: np.ndarray) -> Recovered:
    """Recovers the counts of each cell whose values allow it, under the base that suits most cells.

    Args:
        indptr: int64 [C + 1], entries of each cell.
        values: [E], log-normalised and positive, all to the same base.

    Example:
        >>> counts = np.array([1.0, 5.0, 2.0])
        >>> recover_counts(np.array([0, 3]), np.log1p(counts * 1.7)).counts.tolist()
        [1.0, 5.0, 2.0]
    """
    natural = _under(indptr, values, np.e)
    if natural.exact.all():
        # Where cells are few and small, both bases may fit; then it is the usual one.
        return natural
    binary = _under(indptr, values, 2.0)
    return natural if natural.exact.sum() >= binary.exact.sum() else binary


def _under(indptr: np.ndarray, values: np.ndarray, base: float) -> Recovered:
    """What recover_counts gives where all values are logarithms to that base."""
    lengths = np.diff(indptr)
    counts, exact = np.zeros(len(values)), lengths == 0
    for smallest in SMALLEST_COUNTS:
        if exact.all():
            break
        rows, entries = np.flatnonzero(~exact), np.repeat(~exact, lengths)
        starts = np.concatenate([[0], np.cumsum(lengths[rows])[:-1]])
        found, fits = _fit(starts, lengths[rows], values[entries], base, smallest)
        exact[rows[fits]] = True
        counts[entries] = np.where(np.repeat(fits, lengths[rows]), found, 0)
    return Recovered(counts, exact)


def _fit(
    starts: np.ndarray, lengths: np.ndarray, values: np.ndarray, base: float, smallest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts [E] under one assumption, and which cells [C] bear it out."""
    # No logarithm is that large: whatever it is, it overflows nothing and fits nothing.
    logs = np.minimum(values.astype(np.float64), 100.0) * np.log(base)
    scaled = np.expm1(logs)
    # What float32 arithmetic leaves open: half a unit in a logarithm's last place on either side,
    # the sum x + 1 where it was rounded, and two roundings of the normalised value before it.
    doubt = 2 * np.spacing(np.abs(values).astype(np.float32)).astype(np.float64) * np.log(base)
    doubt += 6e-8
    relative = (doubt + 3e-7 * scaled / (1 + scaled)) * (1 + scaled) / scaled

    least = np.minimum.reduceat(scaled, starts)
    scale = least / smallest
    at_least = np.repeat(least, lengths) == scaled
    off = np.maximum.reduceat(np.where(at_least, relative, 0), starts)
    for _ in range(REFINEMENTS):
        ratio = scaled / np.repeat(scale, lengths)
        sure = ratio * (relative + np.repeat(off, lengths)) < MOST_DOUBT
        # The scale again, of all counts that are sure by now.
        total = np.add.reduceat(np.where(sure, np.rint(ratio), 0), starts)
        weight = np.add.reduceat(np.where(sure, scaled, 0), starts)
        error = np.add.reduceat(np.where(sure, scaled * relative, 0), starts)
        scale = np.where(total > 0, weight / np.maximum(total, 1), scale)
        off = np.where(total > 0, np.minimum(off, error / np.maximum(weight, 1e-300)), off)
    ratio = scaled / np.repeat(scale, lengths)
    counts = np.rint(ratio)
    allowed = ratio * (relative + np.repeat(off, lengths))
    good = (allowed < MOST_DOUBT) & (np.abs(ratio - counts) <= allowed) & (counts > 0)
    return counts, np.logical_and.reduceat(good, starts)
