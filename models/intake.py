"""Taking a file in: its rows become cells of known genes, and what became of it is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sigjax.models.config import InputError
from sigjax.models.recovery import recover_counts
from sigjax.models.rows import Rows, by_token, cut, known, sums
from sigjax.models.sources import (
    COUNTS_PER_CELL,
    LARGEST_LOGARITHM,
    Kind,
    Source,
    checked_rows,
)
from sigjax.models.spool import Spool
from sigjax.models.store_limits import Limits
from sigjax.models.vocabulary import Vocabulary

# Cells that are tried before --counts recover is offered.
OFFER_CELLS = 200

type Counts = Literal["as-is", "recover"]


@dataclass(frozen=True)
class IntakeConfig:
    """How files are opened, apart from which of their values are read.

    Attributes:
        aliases: table of two columns parted by a tab, another name of a gene and the gene.
        gene_column: column of var with the names of genes; None takes the index.
        counts: "as-is", or "recover" to turn log-normalised values back into the counts they
            were made of, and to refuse a file where that is not exact.
        manifest: table of SHA-256 digests as sha256sum writes it; files must be in it and agree.
        budget_gib: memory for what a file has to hold at once.
        guard_seconds: time for the checks of a file, and for each block of its rows.

    Raises:
        InputError: counts is something else.
    """

    aliases: Path | None = None
    gene_column: str | None = None
    counts: Counts = "as-is"
    manifest: Path | None = None
    budget_gib: float = Limits.whole_gib
    guard_seconds: float = Limits.seconds

    def __post_init__(self) -> None:
        if self.counts not in ("as-is", "recover"):
            msg = f"counts must be 'as-is' or 'recover', got {self.counts!r}"
            raise InputError(msg)

    @property
    def limits(self) -> Limits:
        """The budgets of the reader."""
        return Limits(whole_gib=self.budget_gib, seconds=self.guard_seconds)


@dataclass(frozen=True)
class Intake:
    """What became of one file, to be told to the user.

    Attributes:
        name: the file.
        kind: what its values were.
        cells: cells in the file.
        genes: genes in the file.
        known_genes: of these, genes of the vocabulary.
        unknown_values: expressed values of unknown genes, left out.
        empty_cells: cells without an expressed known gene.
        long_cells: cells cut to the max_genes highest values.
        max_genes: that limit.
        merged_genes: genes whose counts were added to those of a gene of the same name.
        recovered: whether the counts were recovered from log-normalised values.
        recoverable: whether they could be, as far as the file's first cells tell.
        notes: how the file was read.
    """

    name: str
    kind: Kind
    cells: int
    genes: int
    known_genes: int
    unknown_values: int
    empty_cells: int
    long_cells: int
    max_genes: int
    merged_genes: int = 0
    recovered: bool = False
    recoverable: bool = False
    notes: tuple[str, ...] = ()

    @property
    def coverage(self) -> float:
        """Share of the file's genes that the vocabulary knows."""
        return self.known_genes / self.genes

    def __str__(self) -> str:
        normalised = "normalised to 10,000 per cell, log1p"
        if self.recovered:
            how = f"log-normalised, counts recovered exactly and {normalised}"
        elif self.kind == "counts":
            how = f"counts, {normalised}"
        else:
            how = "log-normalised, taken as they are"
            how += " (their counts can be recovered: --counts recover)" if self.recoverable else ""
        share = "" if self.coverage == 1 else f" ({self.coverage:.1%})"
        head = (
            f"{self.name}: {self.cells:,} cells, {self.known_genes:,} of {self.genes:,} genes "
            f"known{share}; values are {how}"
        )
        parts = [head]
        if self.merged_genes:
            parts.append(f"{self.merged_genes:,} genes added to another of the same name")
        if self.unknown_values:
            parts.append(f"{self.unknown_values:,} values of unknown genes left out")
        if self.empty_cells:
            parts.append(f"{self.empty_cells:,} cells without a known expressed gene")
        if self.long_cells:
            parts.append(
                f"{self.long_cells:,} cells cut to their {self.max_genes:,} highest values "
                "(ties by gene order)"
            )
        return "; ".join([*parts, *self.notes])


def take_in(
    source: Source, vocabulary: Vocabulary, max_genes: int, spool: Spool, counts: Counts = "as-is"
) -> Intake:
    """Streams a file's cells into a spool.

    Args:
        source: the file.
        vocabulary: of V token ids.
        max_genes: longest cell; a longer one keeps its highest values, ties by gene order.
        spool: gets the cells, in order.
        counts: see IntakeConfig.

    Raises:
        InputError: no gene is known; a value is not finite, negative, or neither count nor
            logarithm; no value is above 0; log-normalised genes of the same name; or counts that
            cannot be recovered.
    """
    ids = _known(source, vocabulary)
    first, seen = spool.cells, _Seen()
    for rows in checked_rows(source):
        seen.look(rows)
        if counts == "recover":
            rows = _recovered(rows, source, seen)
        seen.totals.append(sums(rows))
        named = known(rows, ids)
        seen.unknown += len(rows.values) - len(named.values)
        tokens = by_token(named, vocabulary.size)
        lengths = np.diff(tokens.indptr)
        seen.empty += int(np.sum(lengths == 0))
        seen.long += int(np.sum(lengths > max_genes))
        tokens = cut(tokens, max_genes)
        spool.append(np.diff(tokens.indptr), tokens.indices, tokens.values)
    kind = seen.kind(source)
    counted = kind == "counts" or seen.recovered
    merged = _check_merged(source, ids, counts=counted)
    if counted:
        totals = np.concatenate(seen.totals)
        spool.log_normalise(first, COUNTS_PER_CELL / np.maximum(totals, 1.0))
    return Intake(
        name=source.name,
        kind=kind,
        cells=source.cells,
        genes=len(source.genes),
        known_genes=int(np.sum(ids >= 0)),
        unknown_values=seen.unknown,
        empty_cells=seen.empty,
        long_cells=seen.long,
        max_genes=max_genes,
        merged_genes=merged,
        recovered=seen.recovered,
        recoverable=seen.recoverable and kind == "log-normalised",
        notes=source.notes,
    )


class _Seen:
    """What is known of a file's values so far."""

    def __init__(self) -> None:
        self.totals: list[np.ndarray] = []
        self.values = self.unknown = self.empty = self.long = 0
        self.whole, self.largest = True, 0.0
        self.recovered = self.recoverable = False

    def look(self, rows: Rows) -> None:
        """At values before anything is left out or changed."""
        values = rows.values
        if self.whole and not np.all(values == np.floor(values)):
            self.whole = False
            # Some cells are enough to offer it.
            some = rows.indptr[: OFFER_CELLS + 1]
            self.recoverable = bool(recover_counts(some, values[: some[-1]]).exact.all())
        self.largest = max(self.largest, float(values.max(initial=0)))
        self.values += len(values)

    def kind(self, source: Source) -> Kind:
        """What all values are."""
        where = f"{source.name}: values of {source.values!r}"
        if not self.values:
            msg = (
                f"{where}: all {source.cells} cells are empty: no value is above 0; "
                "choose other values"
            )
            raise InputError(msg)
        if not self.whole and self.largest > LARGEST_LOGARITHM:
            msg = (
                f"{where} must be counts (whole numbers) or log-normalised (at most "
                f"{LARGEST_LOGARITHM:g}), got {self.largest:.6g}; round estimated counts, or take "
                "log1p of normalised values"
            )
            raise InputError(msg)
        return "counts" if self.whole else "log-normalised"


def _known(source: Source, vocabulary: Vocabulary) -> np.ndarray:
    """Token ids of a file's genes, -1 where unknown."""
    ids = vocabulary.ids(source.genes)
    if not np.any(ids >= 0):
        msg = (
            f"{source.name}: no gene is known, first {', '.join(map(repr, source.genes[:3]))}, "
            f"expected names like {', '.join(map(repr, vocabulary.genes[:3]))}; "
            "use the same kind of gene names, or connect them by --aliases or --gene-column"
        )
        raise InputError(msg)
    return ids


def _recovered(rows: Rows, source: Source, seen: _Seen) -> Rows:
    """The counts of a block; a block of whole numbers is counts already."""
    if seen.whole:
        return rows
    found = recover_counts(rows.indptr, rows.values)
    if not found.exact.all():
        msg = (
            f"{source.name}: values of {source.values!r}: the counts of "
            f"{int(np.sum(~found.exact)):,} of {len(found.exact):,} cells cannot be recovered "
            "exactly; leave out --counts recover, or name a layer that holds counts by --values"
        )
        raise InputError(msg)
    seen.recovered = True
    return rows._replace(values=found.counts)


def _check_merged(source: Source, ids: np.ndarray, *, counts: bool) -> int:
    """How many genes were added to another; logarithms cannot be added."""
    known = ids[ids >= 0]
    first = np.unique(known, return_index=True)[1]
    merged = len(known) - len(first)
    if merged and not counts:
        again = np.setdiff1d(np.arange(len(known)), first)[0]
        names = [n for n, i in zip(source.genes, ids, strict=True) if i == known[again]]
        msg = (
            f"{source.name}: {' and '.join(map(repr, names[:3]))} are the same gene, and "
            "log-normalised values cannot be added; recover the counts by --counts recover, or "
            "take their aliases out of the table"
        )
        raise InputError(msg)
    return merged
