"""All cells of some files, folders and stores, in one vocabulary."""

from collections.abc import Callable, Sequence
from pathlib import Path

from sigjax.models.cells import Cells
from sigjax.models.config import DataConfig, InputError
from sigjax.models.intake import IntakeConfig, take_in
from sigjax.models.manifest import find_stores, read_manifest, verify
from sigjax.models.sources import Source, open_source
from sigjax.models.spool import Spool
from sigjax.models.store_reader import StoreReader
from sigjax.models.vocabulary import Vocabulary, read_aliases

type Say = Callable[[str], None]


def read_cells(
    paths: Sequence[Path],
    data: DataConfig,
    say: Say,
    vocabulary: Vocabulary | None = None,
    intake: IntakeConfig | None = None,
) -> tuple[Cells, Vocabulary]:
    """Cells of all files in order.

    Args:
        paths: .h5ad files, zarr stores, or folders of them.
        data: which of their values, and the longest cell.
        say: takes a line about each file.
        vocabulary: which genes; without one, the files' own genes are one. It comes back with the
            aliases of intake and of the files added.
        intake: how files are opened.

    Raises:
        InputError: a file cannot be used; the text names file, field and remedy.
    """
    config = intake or IntakeConfig()
    table = {} if config.aliases is None else read_aliases(config.aliases)
    with StoreReader(config.limits) as reader:
        sources = open_sources(paths, data.values, config, reader)
        aliases = {**aliases_of(sources), **table}
        if vocabulary is None:
            vocabulary = Vocabulary.union((source.genes for source in sources), aliases)
        else:
            vocabulary = vocabulary.with_aliases(aliases)
        spool = Spool()
        for source in sources:
            say(str(take_in(source, vocabulary, data.max_genes, spool, config.counts)))
    return Cells(*spool.finish()), vocabulary


def open_sources(
    paths: Sequence[Path], values: str, config: IntakeConfig, reader: StoreReader
) -> list[Source]:
    """Opens files after their checks, their digests among them; see read_cells."""
    stores = find_stores(paths)
    if config.manifest is not None:
        digests = read_manifest(config.manifest)
        for store in stores:
            verify(store, digests, config.manifest)
    sources = [open_source(store, reader, values, config.gene_column) for store in stores]
    if config.gene_column is not None and not any(source.has_column for source in sources):
        msg = (
            f"{', '.join(map(str, stores))}: var has no column {config.gene_column!r}; "
            f"choose one of {sorted({name for source in sources for name in source.columns})}"
        )
        raise InputError(msg)
    return sources


def aliases_of(sources: Sequence[Source]) -> dict[str, str]:
    """What the files' own columns connect; where two files differ, the first one counts."""
    aliases: dict[str, str] = {}
    for source in sources:
        aliases = {**source.aliases, **aliases}
    return aliases
