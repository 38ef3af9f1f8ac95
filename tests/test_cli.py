"""The command line, end to end on small files, and every error a user can cause."""

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from sigjax.models import checkpoints, cli, demo
from sigjax.models.config import DataConfig, ModelConfig, TrainConfig
from sigjax.models.quiet import quiet
from sigjax.models.runs import Settings
from sigjax.models.sources import read_h5ad

GENES = 40
OPTIONS = [
    "--layers",
    "1",
    "--width",
    "16",
    "--heads",
    "2",
    "--steps",
    "4",
    "--evaluate-every",
    "2",
    "--buckets",
    "2",
    "--multiple",
    "16",
    "--tokens-per-batch",
    "256",
    "--query-genes",
    "16",
    "--held-out",
    "0.2",
]


def write(path: Path, seed: int = 0, change=None, **options) -> Path:
    """Counts of two cell types, written as .h5ad; change may spoil them."""
    rng = np.random.default_rng(seed)
    types = rng.integers(0, 2, 30)
    rates = np.where(np.arange(GENES) % 2 == types[:, None], 3.0, 0.4)
    counts = rng.poisson(rates).astype(np.float32)
    if change is not None:
        change(counts)
    names = options.get("names", [f"G{i}" for i in range(GENES)])
    with quiet():
        obs = pd.DataFrame(
            {"cell_type": np.array(["T", "B"])[types]}, index=[str(i) for i in range(30)]
        )
        data = anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=names))
        data.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with cells.h5ad and a run trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    data = write(folder / "cells.h5ad")
    assert cli.main(["train", str(data), "--out", str(folder / "run"), *OPTIONS]) == 0
    return folder


def dense(data: anndata.AnnData) -> np.ndarray:
    return sp.csr_matrix(data.X).toarray()


def curve(run: Path) -> list[dict[str, str]]:
    """loss.csv without its times."""
    with (run / "loss.csv").open(newline="") as file:
        rows = csv.DictReader(file)
        return [{k: v for k, v in row.items() if k not in ("seconds", "waited")} for row in rows]


def refused(capsys, arguments: list[object]) -> str:
    """What a command that has to fail says; it has to be one line."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sigjax: ")
    assert error.count("\n") == 1
    return error


def test_training_writes_checkpoint_curve_settings_and_picture(trained: Path):
    run = trained / "run"
    names = ["checkpoint", "loss.csv", "loss.png", "settings.json"]
    assert sorted(path.name for path in run.iterdir()) == names
    assert [row["step"] for row in curve(run)] == ["0", "1", "2", "3", "4"]
    assert [bool(row["held_out_loss"]) for row in curve(run)] == [True, False, True, False, True]
    assert json.loads((run / "settings.json").read_text())["training"]["steps"] == 4


def test_training_is_the_same_for_the_same_seed(trained: Path, tmp_path: Path):
    data = trained / "cells.h5ad"
    arguments = ["train", str(data), "--out", str(tmp_path), *OPTIONS, "--implementation", "xla"]
    assert cli.main(arguments) == 0
    assert curve(tmp_path) == curve(trained / "run")


def test_a_resumed_run_ends_with_the_same_curve(trained: Path, tmp_path: Path, monkeypatch):
    arguments = ["train", str(trained / "cells.h5ad"), "--out", str(tmp_path), *OPTIONS]
    arguments += ["--checkpoint-every", "2"]
    saved = checkpoints.save

    def stop(path, about, state, batches):
        saved(path, about, state, batches)
        if int(state.step) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        cli.main(arguments)
    monkeypatch.undo()
    assert cli.main([*arguments, "--resume"]) == 0
    ours, theirs = curve(tmp_path), curve(trained / "run")
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]
    assert [row["held_out_loss"] for row in ours] == [row["held_out_loss"] for row in theirs]


def test_a_packed_run_says_its_padding_and_embeds_cell_by_cell(tmp_path: Path, capsys):
    # Most cells are so short that two share the row of the longest.
    data = write(tmp_path / "cells.h5ad", change=lambda x: x[10:, 14:].fill(0))
    run = tmp_path / "run"
    packing = ["--pack-window", "30", "--multiple", "8", "--buckets", "1"]
    ahead = ["--compile-ahead", "2"]
    assert cli.main(["train", str(data), "--out", str(run), *OPTIONS, *packing, *ahead]) == 0
    text = capsys.readouterr().out
    said = re.search(
        r"^padding (.+)% of all tokens with a cell a row, (.+)% packed$", text, re.MULTILINE
    )
    assert re.search(r"^compiled 1 of 1: rows, tokens \(\d+, \d+\) in .+ s$", text, re.MULTILINE)
    assert said is not None
    assert float(said[2]) < float(said[1])
    out = tmp_path / "embedded.h5ad"
    assert cli.main(["embed", str(data), "--checkpoint", str(run), "--out", str(out)]) == 0
    assert len(np.unique(np.asarray(read_h5ad(out).obsm["X_sigjax"]), axis=0)) == 30


def test_embedding_adds_one_row_a_cell_and_changes_nothing_else(trained: Path, tmp_path: Path):
    data, out = trained / "cells.h5ad", tmp_path / "embedded.h5ad"
    arguments = ["embed", data, "--checkpoint", trained / "run", "--out", out]
    assert cli.main([str(argument) for argument in arguments]) == 0
    before, after = read_h5ad(data), read_h5ad(out)
    assert after.obsm["X_sigjax"].shape == (30, 16)
    assert np.all(np.isfinite(np.asarray(after.obsm["X_sigjax"])))
    np.testing.assert_array_equal(dense(before), dense(after))
    assert list(tmp_path.iterdir()) == [out]


def test_evaluating_says_loss_baseline_and_silhouettes(trained: Path, capsys):
    arguments = ["evaluate", trained / "cells.h5ad", "--checkpoint", trained / "run"]
    assert cli.main([*map(str, arguments), "--label", "cell_type"]) == 0
    text = capsys.readouterr().out
    assert "of the per-gene mean" in text
    assert "silhouette of cell_type: embedding" in text
    assert "PCA by components" in text
    assert "(5), " in text  # small PCAs too, which are the stronger baseline


def test_files_with_other_genes_train_together(tmp_path: Path, capsys):
    first = write(tmp_path / "first.h5ad")
    second = write(tmp_path / "second.h5ad", 1, names=[f"G{i + 20}" for i in range(GENES)])
    arguments = ["train", str(first), str(second), "--out", str(tmp_path / "run"), *OPTIONS]
    assert cli.main(arguments) == 0
    assert "48 training cells, 12 held out" in capsys.readouterr().out
    genes = json.loads((tmp_path / "run/checkpoint/vocabulary.json").read_text())
    assert genes == [f"G{i}" for i in range(60)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.__setitem__((1, 2), -1), r"cells.h5ad: values of 'X' must not be negative"),
        (lambda x: x.__setitem__((1, 2), np.nan), r"cells.h5ad: values of 'X' must be finite"),
        (lambda x: x.__setitem__((1, 2), np.inf), r"cells.h5ad: values of 'X' must be finite"),
        (lambda x: x.fill(0), r"cells.h5ad: values of 'X': all 30 cells are empty"),
    ],
    ids=["negative", "nan", "inf", "all empty"],
)
def test_training_on_values_that_are_no_expression_is_refused(tmp_path, capsys, change, message):
    data = write(tmp_path / "cells.h5ad", change=change)
    error = refused(capsys, ["train", data, "--out", tmp_path / "run", *OPTIONS])
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_training_on_gene_names_that_occur_twice_is_refused(tmp_path, capsys):
    data = write(tmp_path / "cells.h5ad", names=["G"] * GENES)
    assert "must be unique" in refused(capsys, ["train", data, "--out", tmp_path / "run"])


def test_a_missing_file_and_a_file_of_another_kind_are_refused(tmp_path, capsys):
    other = tmp_path / "cells.csv"
    other.write_text("gene,cell")
    out = ["--out", tmp_path / "run"]
    assert "nowhere.h5ad: no such file" in refused(capsys, ["train", "nowhere.h5ad", *out])
    assert "cells.csv: not an .h5ad file" in refused(capsys, ["train", other, *out])
    assert "at least one .h5ad file" in refused(capsys, ["train", *out])
    negative = refused(capsys, ["train", other, *out, "--compile-ahead", "-1"])
    assert "--compile-ahead must be at least 0, got -1" in negative


def test_empty_cells_are_counted_in_training_and_refused_in_embedding(trained, tmp_path, capsys):
    data = write(tmp_path / "cells.h5ad", change=lambda x: x[:3].fill(0))
    assert cli.main(["train", str(data), "--out", str(tmp_path / "run"), *OPTIONS]) == 0
    assert "3 cells without a known expressed gene" in capsys.readouterr().out
    checkpoint = ["--checkpoint", trained / "run"]
    error = refused(capsys, ["embed", data, *checkpoint, "--out", tmp_path / "out.h5ad"])
    assert "3 of 30 cells are empty" in error
    assert "filter_cells" in error
    assert not (tmp_path / "out.h5ad").exists()
    assert "3 of 30 cells are empty" in refused(capsys, ["evaluate", data, *checkpoint])


def test_embedding_a_file_without_a_known_gene_is_refused(trained, tmp_path, capsys):
    data = write(tmp_path / "cells.h5ad", names=[f"ENSG{i}" for i in range(GENES)])
    arguments = ["embed", data, "--checkpoint", trained / "run", "--out", tmp_path / "out.h5ad"]
    assert "no gene is known, first 'ENSG0'" in refused(capsys, arguments)


def test_a_checkpoint_that_is_none_is_refused(trained, tmp_path, capsys):
    data = trained / "cells.h5ad"
    for checkpoint, message in ((tmp_path / "none", "no such"), (tmp_path, "not a sigjax")):
        arguments = ["embed", data, "--checkpoint", checkpoint, "--out", tmp_path / "out.h5ad"]
        assert message in refused(capsys, arguments)


def test_a_run_is_not_overwritten_and_not_resumed_with_another_model(trained, capsys):
    train = ["train", trained / "cells.h5ad", "--out", trained / "run", *OPTIONS]
    assert "go on from it with --resume" in refused(capsys, train)
    resume = [*train, "--resume"]
    assert "4 steps done already" in refused(capsys, resume)
    assert "another model: it has layers 1, not 2" in refused(capsys, [*resume, "--layers", "2"])


def test_resuming_where_nothing_was_trained_is_refused(trained, tmp_path, capsys):
    train = ["train", trained / "cells.h5ad", "--out", tmp_path, *OPTIONS, "--resume"]
    assert "no such checkpoint" in refused(capsys, train)


def test_a_column_that_is_not_there_is_refused_with_those_that_are(trained, capsys):
    arguments = ["evaluate", trained / "cells.h5ad", "--checkpoint", trained / "run"]
    error = refused(capsys, [*arguments, "--label", "colour"])
    assert "no column 'colour'; choose one of ['cell_type']" in error


def test_an_implementation_of_the_other_attention_is_refused(trained, tmp_path, capsys):
    train = ["train", trained / "cells.h5ad", "--out", tmp_path / "run", *OPTIONS]
    error = refused(capsys, [*train, "--attention", "softmax", "--implementation", "triton"])
    assert "implementation of softmax must be one of None, 'cudnn', 'xla'" in error


@pytest.mark.parametrize(
    "arguments", [["--layers", "0"], ["--width", "x"], ["--attention", "linear"]], ids=" ".join
)
def test_an_option_out_of_range_leaves_with_status_2(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["train", "cells.h5ad", "--out", str(tmp_path), *arguments])
    assert leaving.value.code == 2
    assert arguments[0].strip("-") in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["fly"]], ids=["nothing", "unknown"])
def test_a_command_that_does_not_exist_is_answered_with_those_that_do(capsys, arguments):
    assert cli.main(arguments) == 2
    assert "evaluate  loss of a model" in capsys.readouterr().err


def test_help_says_what_there_is(capsys):
    assert cli.main(["--help"]) == 0
    assert "usage: sigjax COMMAND" in capsys.readouterr().out
    with pytest.raises(SystemExit) as leaving:
        cli.main(["embed", "--help"])
    assert leaving.value.code == 0
    assert "--checkpoint" in capsys.readouterr().out


def test_without_the_cells_extra_commands_say_what_to_install(tmp_path):
    hidden = "import sys; sys.modules['tyro'] = None\n"
    code = f"{hidden}from sigjax.models.cli import main; sys.exit(main(['demo']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == 'sigjax: tyro is not installed; pip install "sigjax[cells]"\n'


def test_the_command_line_imports_nothing_of_the_extra_before_a_command_asks():
    code = (
        "import sys, sigjax.models.cli as cli\n"
        "print(sorted(cli.EXTRA & set(sys.modules) - {'rich'}))  # flax needs rich itself"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_doctor_is_called_with_its_arguments(monkeypatch):
    monkeypatch.setattr("sigjax.doctor.main", lambda arguments: 7 if arguments == ["-x"] else 1)
    assert cli.main(["doctor", "-x"]) == 7


# umap's own compiled code warns while it is compiled.
@pytest.mark.filterwarnings("ignore::numba.NumbaWarning")
def test_the_demonstration_runs_on_the_cells_inside_scanpy(tmp_path: Path):
    lines: list[str] = []
    settings = Settings(
        ModelConfig(layers=1, width=16, heads=2),
        replace(demo.SETTINGS.data, query_genes=64, buckets=1),
        TrainConfig(steps=3, held_out=0.15),
    )
    demo.demo(tmp_path, lines.append, settings)
    text = "\n".join(lines)
    assert "700 cells, 765 of 765 genes known; values are log-normalised" in text
    assert "held-out loss" in text
    assert "silhouette of bulk_labels" in text
    assert demo.written_files(tmp_path) == [
        "cells.h5ad",
        "checkpoint",
        "loss.csv",
        "loss.png",
        "settings.json",
        "umap.png",
    ]
    assert read_h5ad(tmp_path / "cells.h5ad").obsm["X_sigjax"].shape == (700, 16)


def test_the_demonstrations_settings_are_valid_for_its_cells():
    assert isinstance(demo.SETTINGS.data, DataConfig)
    assert demo.SETTINGS.data.values == "raw"
