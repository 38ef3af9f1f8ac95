"""Draws that depend on counters alone: the hidden values of a cell, whatever is beside it."""

import numpy as np

# Bits of a sort key, from the top: cell of a batch, draw, entry of a cell.
CELL_BITS, ENTRY_BITS = 16, 20
MOST_CELLS, MOST_ENTRIES = 2**CELL_BITS, 2**ENTRY_BITS


def hidden_entries(
    lengths: np.ndarray, numbers: np.ndarray, share: float, seeds: tuple[int, ...]
) -> np.ndarray:
    """Draws which entries of cells are hidden, without replacement.

    Every entry gets a hash of seeds, its cell's number and its own; a cell's lowest
    ones are hidden. One sort serves all cells of a batch.

    Args:
        lengths: int64 [C], entries of each cell, at least 1 and less than MOST_ENTRIES.
        numbers: int64 [C], the cells' numbers; C at most MOST_CELLS.
        share: share of a cell's entries that is hidden, rounded, at least one.
        seeds: integers.

    Returns:
        bool [E], one an entry, one cell after the other.

    Example:
        >>> import numpy as np
        >>> hidden = hidden_entries(np.array([10, 4]), np.array([7, 3]), 0.5, (0, 0))
        >>> int(hidden[:10].sum()), int(hidden[10:].sum())
        (5, 2)
    """
    seed = np.uint64(0)
    for part in seeds:
        seed = _mixed(np.array([seed ^ np.uint64(part % 2**64)], np.uint64))[0]
    of_cell = _mixed(numbers.astype(np.uint64) ^ seed)
    starts = np.cumsum(lengths) - lengths
    entry = (np.arange(int(lengths.sum())) - np.repeat(starts, lengths)).astype(np.uint64)
    draw = _mixed(np.repeat(of_cell, lengths) + entry)
    # The entry's own number makes each key unlike all others: a cell hides exactly its count.
    keys = (draw >> np.uint64(CELL_BITS + ENTRY_BITS) << np.uint64(ENTRY_BITS)) | entry
    keys |= np.repeat(np.arange(len(lengths), dtype=np.uint64), lengths) << np.uint64(
        64 - CELL_BITS
    )
    counts = np.maximum(1, np.round(share * lengths)).astype(np.int64)
    last = np.sort(keys)[starts + counts - 1]
    return keys <= np.repeat(last, lengths)


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood, OOPSLA 2014) of uint64 counters, wrapping."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
