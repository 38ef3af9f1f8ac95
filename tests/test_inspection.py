"""sigjax inspect: its numbers are those of the files, of the buckets and of the packing."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax.buckets import LengthBuckets
from sigjax.models import checkpoints, cli
from sigjax.models.config import DataConfig, InputError, ModelConfig, TrainConfig
from sigjax.models.inspection import Asked, inspect_files
from sigjax.models.intake import IntakeConfig
from sigjax.models.padding import paddings
from sigjax.models.quiet import quiet
from sigjax.models.train import build
from sigjax.models.vocabulary import Vocabulary

READING = DataConfig(max_genes=30, multiple=8, buckets=3, tokens_per_batch=64)
TYPES = ["B", "NK", "B", "T", "B"]


def write(path: Path, lengths=(5, 30, 12, 3, 8), types=TYPES, first=0) -> Path:
    """Cells of so many genes each, of 40 that are named from number first on."""
    matrix = np.zeros((len(lengths), 40), np.float32)
    for row, length in zip(matrix, lengths, strict=True):
        row[:length] = np.arange(1, length + 1)
    obs = {} if types is None else {"cell_type": types, "batch": ["a"] * len(types)}
    with quiet():
        anndata.AnnData(
            sp.csr_matrix(matrix),
            obs=pd.DataFrame(obs, index=[f"{path.stem}{i}" for i in range(len(lengths))]),
            var=pd.DataFrame(index=[f"G{first + i}" for i in range(40)]),
        ).write_h5ad(path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    second = write(tmp_path / "second.h5ad", (7, 35), None, first=20)
    return [write(tmp_path / "first.h5ad"), second]


def asked(**changes) -> Asked:
    return Asked(READING, IntakeConfig(), **changes)


def test_a_report_holds_the_lengths_genes_and_types_of_each_file(files, capsys):
    report = inspect_files(files, asked(), width=100)
    assert [lengths.tolist() for lengths in report.lengths] == [[5, 30, 12, 3, 8], [7, 30]]
    assert [intake.long_cells for intake in report.intakes] == [0, 1]
    assert report.vocabulary_size == 60
    assert report.types == ({"B": 3, "NK": 1, "T": 1}, None)
    out = capsys.readouterr().out
    for line in ("first 5 3 8 30 0 100.0% 66.7% 3", "second 2 7 18 30 1 100.0% 66.7% -", "B 3"):
        assert line in " ".join(out.split())
    assert "together 7 3 8 30 1" in " ".join(out.split())


def test_padding_is_reported_for_one_length_for_buckets_and_packed(files, capsys):
    report = inspect_files(files, asked(), width=100)
    one, several, packed = report.padding
    lengths = np.concatenate(report.lengths) + 1
    buckets = LengthBuckets.fit(lengths, count=3, multiple=8)
    assert one.shapes == ((2, 32),)
    assert one.share == pytest.approx(1 - lengths.sum() / (32 * len(lengths)))
    assert several.share == pytest.approx(buckets.waste(lengths))
    assert [tokens for _, tokens in several.shapes] == list(buckets.edges)
    assert sum(several.cells) == sum(packed.cells) == len(lengths)
    assert packed.share < several.share < one.share
    assert f"{several.share:.1%}" in capsys.readouterr().out


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_shares_of_padding_lie_between_none_and_all(lengths):
    for choice in paddings(np.array(lengths), READING):
        assert 0 <= choice.share < 1
        assert len(choice.shapes) == len(choice.cells) <= 4
        assert sum(choice.cells) == len(lengths)


def test_a_picture_is_drawn(files, tmp_path, capsys):
    inspect_files(files, asked(), tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "picture in" in capsys.readouterr().out


def test_another_column_of_types_is_taken_by_name(files):
    report = inspect_files(files, asked(label="batch"))
    assert report.types == ({"a": 5}, None)


def test_a_column_that_no_file_has_is_refused_with_those_there_are(files):
    with pytest.raises(InputError, match=r"no column 'colour'; choose one of \['batch', 'cell"):
        inspect_files(files, asked(label="colour"))


def test_a_batch_too_small_for_the_longest_cell_is_refused(files):
    small = Asked(DataConfig(tokens_per_batch=16, multiple=8), IntakeConfig())
    with pytest.raises(InputError, match="tokens_per_batch must hold the longest length"):
        inspect_files(files, small)


def test_the_command_prints_tables_and_refuses_what_is_not_there(files, tmp_path, capsys):
    options = ["--multiple", "8", "--tokens-per-batch", "64"]
    assert cli.main(["inspect", str(files[0]), *options]) == 0
    out = capsys.readouterr().out
    assert "shapes and padding" in out
    assert "cell types" in out
    assert cli.main(["inspect", str(tmp_path / "nowhere.h5ad")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert cli.main(["inspect"]) == 2
    assert "at least one .h5ad file" in capsys.readouterr().err


def test_files_are_compared_with_the_genes_of_a_checkpoint(files, tmp_path):
    vocabulary = Vocabulary(tuple(f"G{i}" for i in range(40)))
    about = checkpoints.About(
        ModelConfig(layers=1, width=8, heads=1),
        DataConfig(),
        TrainConfig(),
        vocabulary,
        np.zeros(vocabulary.size, np.float32),
    )
    _, state = build(about.model, vocabulary.size, about.training)
    checkpoints.save(tmp_path / "run" / "checkpoint", about, state)
    report = inspect_files(files, asked(checkpoint=tmp_path / "run"))
    assert report.vocabulary_size == 40
    assert [intake.coverage for intake in report.intakes] == [1.0, 0.5]
