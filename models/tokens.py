"""From a cell's values to what the model sees of them: three encodings behind one interface.

A cell is a set of tokens, one an expressed gene, behind a cell token. Cells longer than
max_genes were cut to their highest values when they were read (see models.cells), the
same for every encoding.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from sigjax.models.config import DataConfig


class Encoded(NamedTuple):
    """Cells' entries as tokens, one cell after the other.

    Attributes:
        order: int64 [E]; which entry each token is. A cell's tokens stay in its own place.
        codes: int32 [E], from 1, one a token; None where the model sees the values themselves.
    """

    order: np.ndarray
    codes: np.ndarray | None


class Encoding(Protocol):
    """What the model sees of a value; the loss is on the log1p value with every encoding."""

    def encode(self, values: np.ndarray, lengths: np.ndarray) -> Encoded:
        """Encodes cells, each by itself.

        Args:
            values: float32 [E], positive, one cell's entries after the other's.
            lengths: int64 [C], entries of each cell; they sum to E.
        """
        ...


@dataclass(frozen=True)
class Log1p:
    """The log1p value itself, tokens in the order of the vocabulary."""

    def encode(self, values: np.ndarray, lengths: np.ndarray) -> Encoded:
        """Leaves everything as it is; see Encoding."""
        return Encoded(np.arange(len(values)), None)


LOG1P = Log1p()


@dataclass(frozen=True)
class QuantileBins:
    """The quantile of a value among its cell's, in equal bins: 1 the lowest, count the highest.

    Equal values share the bin of the lowest of them, so that a bin says nothing
    about the order of genes.

    Attributes:
        count: number of bins.

    Example:
        >>> import numpy as np
        >>> values = np.array([5, 1, 2, 2, 9], np.float32)
        >>> QuantileBins(4).encode(values, np.array([4, 1])).codes.tolist()
        [4, 1, 2, 2, 1]
    """

    count: int

    def encode(self, values: np.ndarray, lengths: np.ndarray) -> Encoded:
        """Bins cells, tokens in the order of the vocabulary; see Encoding."""
        cells = np.repeat(np.arange(len(lengths)), lengths)
        order = np.lexsort((values, cells))
        rank = _places(lengths)
        sorted_values, sorted_cells = values[order], cells[order]
        new = np.ones(len(values), bool)
        new[1:] = (sorted_values[1:] != sorted_values[:-1]) | (
            sorted_cells[1:] != sorted_cells[:-1]
        )
        # The rank of the first of its equals: the last new one up to each entry.
        first = np.maximum.accumulate(np.where(new, np.arange(len(values)), 0))
        codes = np.empty(len(values), np.int32)
        codes[order] = 1 + rank[first] * self.count // lengths[sorted_cells]
        return Encoded(np.arange(len(values)), codes)


@dataclass(frozen=True)
class RankOrder:
    """The place of a value in its cell, 1 the highest; tokens in that order.

    Equal values go by the order of the vocabulary.

    Example:
        >>> import numpy as np
        >>> encoded = RankOrder().encode(np.array([1, 5, 2], np.float32), np.array([3]))
        >>> encoded.order.tolist(), encoded.codes.tolist()
        ([1, 2, 0], [1, 2, 3])
    """

    def encode(self, values: np.ndarray, lengths: np.ndarray) -> Encoded:
        """Sorts cells; see Encoding."""
        cells = np.repeat(np.arange(len(lengths)), lengths)
        # lexsort is stable: equal values stay in the order of the vocabulary.
        return Encoded(np.lexsort((-values, cells)), (_places(lengths) + 1).astype(np.int32))


def encoding_of(config: DataConfig) -> Encoding:
    """The encoding that a configuration names."""
    if config.encoding == "bins":
        return QuantileBins(config.bins)
    return RankOrder() if config.encoding == "rank" else LOG1P


def _places(lengths: np.ndarray) -> np.ndarray:
    """Number of each entry within its cell, from 0: int64 [E]."""
    ends = np.cumsum(lengths)
    return np.arange(int(lengths.sum())) - np.repeat(ends - lengths, lengths)
