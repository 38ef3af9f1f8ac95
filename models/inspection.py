"""sigjax inspect: what training would see of files, as tables and a picture."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from sigjax.models import checkpoints
from sigjax.models.cells import Cells, without_empty
from sigjax.models.config import DataConfig, InputError
from sigjax.models.corpus import aliases_of, open_sources
from sigjax.models.intake import Intake, IntakeConfig, take_in
from sigjax.models.manifest import find_stores
from sigjax.models.padding import Padding, paddings
from sigjax.models.spool import Spool
from sigjax.models.store_reader import StoreReader
from sigjax.models.vocabulary import Vocabulary, read_aliases

DEFAULT_LABEL = "cell_type"
MOST_TYPES = 25


@dataclass(frozen=True)
class Asked:
    """What is asked of files.

    Attributes:
        reading: how cells are read and batched.
        intake: how files are opened.
        label: column of obs with the cell types; None is DEFAULT_LABEL where there is one.
        checkpoint: whose vocabulary is asked for; None is that of the files together.
    """

    reading: DataConfig
    intake: IntakeConfig
    label: str | None = None
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Report:
    """What is in some files.

    Attributes:
        intakes: what became of each.
        lengths: expressed known genes of each cell of each file.
        types: number of cells of each type of each file; None where no column says.
        vocabulary_size: number of genes asked for.
        padding: what padding costs, of all files together; empty cells left out.
    """

    intakes: tuple[Intake, ...]
    lengths: tuple[np.ndarray, ...]
    types: tuple[Counter[str] | None, ...]
    vocabulary_size: int
    padding: tuple[Padding, ...]


def inspect_files(
    paths: Sequence[Path], asked: Asked, picture: Path | None = None, width: int | None = None
) -> Report:
    """Prints tables about files and draws a picture of them.

    Args:
        paths: .h5ad files, zarr stores, or folders of them.
        asked: what of them.
        picture: where to draw; None draws nothing.
        width: of the tables in characters; None takes the terminal's.

    Raises:
        InputError: a file cannot be used, or none of them has the column asked.label.
    """
    report = inspected(paths, asked)
    console = Console(width=width)
    for intake in report.intakes:
        console.print(str(intake), highlight=False, markup=False, soft_wrap=True)
    for table in (files_table(report), padding_table(report), types_table(report)):
        console.print(table)
    if picture is not None:
        from sigjax.models.pictures import draw_report

        draw_report(picture, report)
        console.print(f"picture in {picture}", highlight=False, markup=False, soft_wrap=True)
    return report


def inspected(paths: Sequence[Path], asked: Asked) -> Report:
    """Reads files; see inspect_files."""
    if not paths:
        msg = "inspect needs at least one .h5ad file, got none"
        raise InputError(msg)
    with StoreReader(asked.intake.limits) as reader:
        sources = open_sources(paths, asked.reading.values, asked.intake, reader)
        table = {} if asked.intake.aliases is None else read_aliases(asked.intake.aliases)
        aliases = {**aliases_of(sources), **table}
        if asked.checkpoint is None:
            vocabulary = Vocabulary.union((source.genes for source in sources), aliases)
        else:
            vocabulary = checkpoints.describe(_folder(asked.checkpoint)).vocabulary
            vocabulary = vocabulary.with_aliases(aliases)
        spool = Spool()
        intakes = tuple(
            take_in(source, vocabulary, asked.reading.max_genes, spool, asked.intake.counts)
            for source in sources
        )
        types = _types(find_stores(paths), asked.label, reader)
    cells = Cells(*spool.finish())
    ends = np.cumsum([intake.cells for intake in intakes])
    return Report(
        intakes,
        tuple(np.split(cells.lengths, ends[:-1])),
        types,
        len(vocabulary.genes),
        tuple(paddings(without_empty(cells).lengths + 1, asked.reading)),
    )


def files_table(report: Report) -> Table:
    """One line a file: cells, lengths, genes and cell types."""
    table = _table("files: cells, their expressed genes, shares of genes known and of all, types")
    table.add_column("file", no_wrap=True)
    for name in ("cells", "min", "median", "max", "cut", "known", "of all", "types"):
        table.add_column(name, justify="right", no_wrap=True)
    for intake, lengths, types in zip(report.intakes, report.lengths, report.types, strict=True):
        table.add_row(
            Path(intake.name).stem,
            f"{intake.cells:,}",
            *_spread(lengths),
            f"{intake.long_cells:,}",
            f"{intake.coverage:.1%}",
            f"{intake.known_genes / report.vocabulary_size:.1%}",
            "-" if types is None else f"{len(types):,}",
        )
    if len(report.intakes) > 1:
        whole = np.concatenate(report.lengths)
        cut = sum(intake.long_cells for intake in report.intakes)
        known = sum(i.known_genes for i in report.intakes) / sum(i.genes for i in report.intakes)
        row = ("together", f"{len(whole):,}", *_spread(whole), f"{cut:,}", f"{known:.1%}", "", "")
        table.add_section()
        table.add_row(*row)
    return table


def padding_table(report: Report) -> Table:
    """One line a static shape, and what padding costs with each choice of shapes."""
    table = _table("shapes and padding, cell token included")
    for name in ("choice", "rows", "tokens a row", "cells", "padding"):
        table.add_column(name, justify="left" if name == "choice" else "right")
    for choice in report.padding:
        for i, ((rows, tokens), cells) in enumerate(zip(choice.shapes, choice.cells, strict=True)):
            first = i == 0
            table.add_row(
                choice.name if first else "",
                f"{rows:,}",
                f"{tokens:,}",
                f"{cells:,}",
                f"{choice.share:.1%}" if first else "",
            )
        table.add_section()
    return table


def types_table(report: Report) -> Table:
    """The most frequent cell types of all files."""
    types = all_types(report)
    table = _table("cell types")
    table.add_column("type")
    table.add_column("cells", justify="right")
    for name, count in types.most_common(MOST_TYPES):
        table.add_row(name, f"{count:,}")
    rest = types.most_common()[MOST_TYPES:]
    if rest:
        table.add_section()
        table.add_row(f"{len(rest):,} others", f"{sum(count for _, count in rest):,}")
    return table


def all_types(report: Report) -> Counter[str]:
    """Number of cells of each type, of all files that have types."""
    whole: Counter[str] = Counter()
    for types in report.types:
        whole.update(types or {})
    return whole


def _types(
    stores: Sequence[Path], label: str | None, reader: StoreReader
) -> tuple[Counter[str] | None, ...]:
    found = [reader.find_labels(store, label or DEFAULT_LABEL) for store in stores]
    if label is not None and all(labels is None for labels in found):
        # The first file's own error names the columns there are.
        reader.labels(stores[0], label)
    return tuple(
        None if labels is None else Counter("(none)" if x is None else x for x in labels)
        for labels in found
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))


def _folder(checkpoint: Path) -> Path:
    """The checkpoint's own folder, of that of a run."""
    return checkpoint / "checkpoint" if (checkpoint / "checkpoint").is_dir() else checkpoint


def _spread(lengths: np.ndarray) -> tuple[str, str, str]:
    return f"{lengths.min():,}", f"{int(np.median(lengths)):,}", f"{lengths.max():,}"
