"""The comparison of training runs tells rounding from noise."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import training


def write(folder: Path, name: str, curves: training.Curves) -> None:
    for (implementation, seed), losses in curves.items():
        rows = [f"{step + 1},{loss}" for step, loss in enumerate(losses)]
        text = "\n".join(["step,loss", "0,", *rows]) + "\n"
        training.losses_file(folder, name, implementation, seed).write_text(text)


def curves(between_implementations: float, between_seeds: float) -> training.Curves:
    base = np.linspace(2, 1, 10)
    return {
        (implementation, seed): base + i * between_implementations + seed * between_seeds
        for i, implementation in enumerate(training.IMPLEMENTATIONS)
        for seed in training.SEEDS
    }


@pytest.mark.parametrize(("gap", "code"), [(0.01, 0), (0.5, 1)])
def test_implementations_must_differ_less_than_seeds(
    gap: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path, "cells", curves(gap, 0.1))
    assert training.main(["cells.h5ad", "--out", str(tmp_path), "--compare-only"]) == code
    said = capsys.readouterr().out
    assert f"of one seed: {gap:.4f}" in said
    assert "of one implementation: 0.1000" in said
    assert (tmp_path / "train_cells.png").stat().st_size > 0


def test_runs_of_unequal_length_are_refused(tmp_path: Path):
    unequal = curves(0.0, 0.1)
    unequal["xla", 1] = unequal["xla", 1][:-1]
    write(tmp_path, "cells", unequal)
    with pytest.raises(ValueError, match=r"as many steps as each other, got \[9, 10\]"):
        training.read(tmp_path, "cells")
