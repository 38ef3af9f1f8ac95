"""Which gene has which token id, by whichever of its names."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from sigjax.models.config import InputError

PADDING = 0
CELL_TOKEN = 1
RESERVED = 2

# ENSG00000141510.17; GENCODE marks copies on Y as ENSG00000182378.13_PAR_Y, which stay apart.
VERSIONED = re.compile(r"^(ENS[A-Z]{0,4}G\d{11})\.\d+(_PAR_Y)?$")


@dataclass(frozen=True)
class Vocabulary:
    """Genes in order; gene i has token id RESERVED + i, below lie padding and the cell token.

    Attributes:
        genes: unique names.
        aliases: other names of genes: alias to gene, see read_aliases.

    Raises:
        InputError: no gene, or a name that occurs twice.

    Example:
        >>> Vocabulary(("CD3D", "MS4A1"), {"CD20": "MS4A1"}).ids(["MS4A1", "CD20", "no"]).tolist()
        [3, 3, -1]
    """

    genes: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_unique("vocabulary", self.genes)
        if not self.genes:
            msg = "a vocabulary must hold at least one gene, got none"
            raise InputError(msg)

    @classmethod
    def union(
        cls, files: Iterable[Sequence[str]], aliases: Mapping[str, str] | None = None
    ) -> Self:
        """All genes of all files, each once, in the order of their first appearance."""
        known = aliases or {}
        names = (canonical(name, known) for names in files for name in names)
        return cls(tuple(dict.fromkeys(names)), known)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of to_json; a plain list of genes is taken too.

        Raises:
            InputError: the text is neither.
        """
        content = json.loads(text)
        if isinstance(content, list):
            content = {"genes": content, "aliases": {}}
        if not isinstance(content, dict) or set(content) != {"genes", "aliases"}:
            msg = "a vocabulary must be a list of genes, or genes and aliases"
            raise InputError(msg)
        genes, aliases = content["genes"], content["aliases"]
        texts = [*genes, *aliases, *aliases.values()]
        if not all(isinstance(name, str) for name in texts):
            msg = "the names of a vocabulary must be text"
            raise InputError(msg)
        return cls(tuple(genes), aliases)

    def to_json(self) -> str:
        """Genes and aliases as JSON; genes alone, as a list, where there is no alias."""
        content = {"genes": self.genes, "aliases": dict(self.aliases)}
        return json.dumps(content if self.aliases else self.genes, indent=0)

    def with_aliases(self, aliases: Mapping[str, str]) -> Self:
        """The same genes, with more names; those it has already stay as they are."""
        return type(self)(self.genes, {**aliases, **self.aliases}) if aliases else self

    @property
    def size(self) -> int:
        """Number of token ids, the reserved ones included."""
        return RESERVED + len(self.genes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of genes in order and of aliases: equal where two vocabularies are."""
        text = "\n".join(self.genes)
        if self.aliases:
            text += "\n\n" + "\n".join(f"{a}\t{g}" for a, g in sorted(self.aliases.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {gene: RESERVED + i for i, gene in enumerate(self.genes)}

    @cached_property
    def _canonical_ids(self) -> dict[str, int]:
        """Ids by canonical name; a name that two genes share belongs to neither."""
        ids: dict[str, int] = {}
        for gene, number in self._ids.items():
            name = canonical(gene, self.aliases)
            ids[name] = -1 if name in ids else number
        return ids

    def ids(self, names: Sequence[str]) -> np.ndarray:
        """Token ids of names: int32 [len(names)], -1 where a name is unknown.

        A name is looked up as it is, then by its alias and without the version of an Ensembl id.
        """
        return np.fromiter(map(self._id, names), np.int32, len(names))

    def _id(self, name: str) -> int:
        number = self._ids.get(name)
        if number is None:
            number = self._canonical_ids.get(canonical(name, self.aliases), -1)
        return number


def without_version(name: str) -> str:
    """An Ensembl gene id without its version; any other name as it is.

    Example:
        >>> without_version("ENSG00000141510.17"), without_version("RP11-34P13.7")
        ('ENSG00000141510', 'RP11-34P13.7')
    """
    found = VERSIONED.match(name) if name.startswith("ENS") else None
    return name if found is None else found[1] + (found[2] or "")


def canonical(name: str, aliases: Mapping[str, str]) -> str:
    """The gene that a name means: by its alias, and without an Ensembl id's version."""
    gene = aliases.get(name)
    if gene is None:
        bare = without_version(name)
        gene = aliases.get(bare, bare)
    return gene


def read_aliases(path: Path) -> dict[str, str]:
    """Reads a table of two columns parted by a tab: another name of a gene, and the gene.

    Versions of Ensembl ids are dropped, and an alias of an alias leads to the
    last name. Empty lines and lines that start with # are skipped.

    Raises:
        InputError: no such file, no such table, or an alias of two genes or of itself in a circle.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        msg = f"{path}: no such file; give a table with an alias and its gene in each line"
        raise InputError(msg) from error
    except UnicodeDecodeError as error:
        msg = f"{path}: must be text in UTF-8; save the table as tab-separated text"
        raise InputError(msg) from error
    pairs: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != 2 or not all(cells):
            msg = f"{path}: line {number} must be an alias, a tab and a gene, got {line[:80]!r}"
            raise InputError(msg)
        alias, gene = map(without_version, cells)
        if pairs.setdefault(alias, gene) != gene:
            msg = f"{path}: line {number}: {alias!r} is {pairs[alias]!r} already; keep one of them"
            raise InputError(msg)
    return _followed(pairs, str(path))


def _followed(pairs: Mapping[str, str], where: str) -> dict[str, str]:
    """Aliases that lead to the last name of their chain."""
    last: dict[str, str] = {}
    for alias, first in pairs.items():
        gene, passed = first, {alias}
        while gene in pairs and pairs[gene] != gene:
            if gene in passed:
                msg = f"{where}: {alias!r} is an alias of itself in a circle; break it"
                raise InputError(msg)
            passed.add(gene)
            gene = pairs[gene]
        if gene != alias:
            last[alias] = gene
    return last


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
