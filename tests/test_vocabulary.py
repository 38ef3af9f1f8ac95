"""Genes by whichever of their names: symbols, Ensembl ids with and without versions, aliases."""

import doctest
import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax.models import recovery, store_reader, vocabulary
from sigjax.models.config import InputError
from sigjax.models.vocabulary import (
    RESERVED,
    Vocabulary,
    canonical,
    read_aliases,
    without_version,
)

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\t\r\n"), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("ENSG00000141510.17", "ENSG00000141510"),
        ("ENSMUSG00000059552.13", "ENSMUSG00000059552"),
        ("ENSG00000141510", "ENSG00000141510"),
        ("ENSG00000182378.13_PAR_Y", "ENSG00000182378_PAR_Y"),
        ("RP11-34P13.7", "RP11-34P13.7"),
        ("AL627309.1", "AL627309.1"),
        ("ENST00000269305.9", "ENST00000269305.9"),
    ],
)
def test_only_an_ensembl_gene_ids_version_is_dropped(name: str, bare: str):
    assert without_version(name) == bare


def test_a_gene_is_found_by_its_name_its_alias_and_its_id_with_any_version():
    vocabulary = Vocabulary(("TP53", "ENSG00000012048"), {"ENSG00000141510": "TP53", "P53": "TP53"})
    names = ["TP53", "P53", "ENSG00000141510.17", "ENSG00000141510", "ENSG00000012048.3", "?"]
    assert vocabulary.ids(names).tolist() == [2, 2, 2, 2, 3, -1]


def test_a_versioned_gene_of_an_older_vocabulary_is_found_by_its_bare_id():
    assert Vocabulary(("ENSG00000141510.17",)).ids(["ENSG00000141510"]).tolist() == [RESERVED]


def test_a_union_holds_a_gene_once_however_files_call_it():
    aliases = {"ENSG00000141510": "TP53"}
    vocabulary = Vocabulary.union([["TP53", "CD3D"], ["ENSG00000141510.17", "MS4A1"]], aliases)
    assert vocabulary.genes == ("TP53", "CD3D", "MS4A1")


def test_a_vocabulary_of_ids_is_found_by_symbols_once_a_table_connects_them():
    vocabulary = Vocabulary(("ENSG00000141510", "ENSG00000012048"))
    assert vocabulary.ids(["TP53"]).tolist() == [-1]
    table = {"ENSG00000141510": "TP53", "ENSG00000012048": "BRCA1"}
    assert vocabulary.with_aliases(table).ids(["TP53", "BRCA1"]).tolist() == [2, 3]


def test_a_name_that_two_genes_share_means_neither():
    vocabulary = Vocabulary(("ENSG1", "ENSG2", "ENSG3"), {f"ENSG{i}": "Y_RNA" for i in (1, 2, 3)})
    assert vocabulary.ids(["Y_RNA", "ENSG2"]).tolist() == [-1, 3]


def test_added_aliases_do_not_change_those_a_vocabulary_was_trained_with():
    vocabulary = Vocabulary(("A", "B"), {"x": "A"}).with_aliases({"x": "B", "y": "B"})
    assert vocabulary.ids(["x", "y"]).tolist() == [2, 3]


def test_genes_and_aliases_both_are_part_of_the_digest():
    digests = {
        Vocabulary(("A", "B")).digest,
        Vocabulary(("B", "A")).digest,
        Vocabulary(("A", "B"), {"x": "A"}).digest,
        Vocabulary(("A", "B"), {"x": "B"}).digest,
    }
    assert len(digests) == 4


@settings(deadline=None, max_examples=50)
@given(genes=st.lists(NAMES, min_size=1, unique=True), aliases=st.dictionaries(NAMES, NAMES))
def test_json_gives_back_the_same_vocabulary(genes: list[str], aliases: dict[str, str]):
    vocabulary = Vocabulary(tuple(genes), aliases)
    back = Vocabulary.from_json(vocabulary.to_json())
    assert back == vocabulary
    assert back.digest == vocabulary.digest


def test_a_vocabulary_without_aliases_is_the_plain_list_that_older_checkpoints_hold():
    assert json.loads(Vocabulary(("A", "B")).to_json()) == ["A", "B"]
    assert Vocabulary.from_json('["A", "B"]').genes == ("A", "B")


@pytest.mark.parametrize(
    "text", ['{"genes": ["A"]}', "3", '{"genes": [1], "aliases": {}}', '["A", "A"]', "[]"]
)
def test_json_that_is_no_vocabulary_is_refused(text: str):
    with pytest.raises(InputError):
        Vocabulary.from_json(text)


def table(folder: Path, text: str) -> Path:
    path = folder / "aliases.tsv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_is_read_and_chains_lead_to_their_last_name(tmp_path: Path):
    text = "# old\tnew\n\nENSG00000141510.3\tP53\nP53\tTP53\nTP53\tTP53\n"
    aliases = read_aliases(table(tmp_path, text))
    assert aliases == {"ENSG00000141510": "TP53", "P53": "TP53"}
    assert canonical("ENSG00000141510.9", aliases) == "TP53"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A B\n", r"aliases.tsv: line 1 must be an alias, a tab and a gene, got 'A B'"),
        ("A\tB\tC\n", r"line 1 must be an alias, a tab and a gene"),
        ("A\t\n", r"line 1 must be an alias, a tab and a gene"),
        ("A\tB\nA\tC\n", r"line 2: 'A' is 'B' already; keep one of them"),
        ("A\tB\nB\tC\nC\tA\n", r"'A' is an alias of itself in a circle; break it"),
    ],
    ids=["no tab", "three columns", "empty cell", "two genes", "circle"],
)
def test_a_table_that_says_no_clear_thing_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(InputError, match=message):
        read_aliases(table(tmp_path, text))


def test_a_table_that_is_missing_or_no_text_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"nowhere.tsv: no such file; give a table"):
        read_aliases(tmp_path / "nowhere.tsv")
    (tmp_path / "binary.tsv").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(InputError, match=r"binary.tsv: must be text in UTF-8; save"):
        read_aliases(tmp_path / "binary.tsv")


def test_sixty_thousand_genes_with_aliases_load_within_a_second():
    genes = tuple(f"ENSG{i:011d}" for i in range(60_000))
    text = Vocabulary(genes, {f"SYMBOL{i}": gene for i, gene in enumerate(genes)}).to_json()
    began = time.process_time()
    vocabulary = Vocabulary.from_json(text)
    assert vocabulary.ids(["SYMBOL59999", "ENSG00000000007.4"]).tolist() == [60_001, 9]
    # 0.3 s on the slowest machine it was tried on.
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "documented", [vocabulary, recovery, store_reader], ids=lambda m: m.__name__
)
def test_the_examples_of_the_documentation_run(documented):
    result = doctest.testmod(documented, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0
