"""Which gene has which token id."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from sigjax.models.config import InputError

PADDING = 0
CELL_TOKEN = 1
RESERVED = 2


@dataclass(frozen=True)
class Vocabulary:
    """Genes in order; gene i has token id RESERVED + i, below lie padding and the cell token.

    Attributes:
        genes: unique names.

    Raises:
        InputError: no gene, or a name that occurs twice.

    Example:
        >>> Vocabulary(("CD3D", "MS4A1")).ids(["MS4A1", "unknown"]).tolist()
        [3, -1]
    """

    genes: tuple[str, ...]

    def __post_init__(self) -> None:
        check_unique("vocabulary", self.genes)
        if not self.genes:
            msg = "a vocabulary must hold at least one gene, got none"
            raise InputError(msg)

    @classmethod
    def union(cls, files: Iterable[Sequence[str]]) -> Self:
        """All names of all files, each once, in the order of their first appearance."""
        return cls(tuple(dict.fromkeys(name for names in files for name in names)))

    @property
    def size(self) -> int:
        """Number of token ids, the reserved ones included."""
        return RESERVED + len(self.genes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the names in order: equal where two vocabularies are."""
        return hashlib.sha256("\n".join(self.genes).encode()).hexdigest()

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {gene: RESERVED + i for i, gene in enumerate(self.genes)}

    def ids(self, names: Sequence[str]) -> np.ndarray:
        """Token ids of names: int32 [len(names)], -1 where a name is unknown."""
        return np.fromiter((self._ids.get(name, -1) for name in names), np.int32, len(names))


def check_unique(where: str, names: Sequence[str]) -> None:
    """Raises InputError that shows the first names that occur twice."""
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    twice = [name for name in names if name in seen or seen.add(name)]
    msg = (
        f"{where}: gene names must be unique, got {len(twice)} repeated, first "
        f"{', '.join(map(repr, twice[:3]))}; make them unique, for instance by "
        "anndata's var_names_make_unique, or use ids"
    )
    raise InputError(msg)
