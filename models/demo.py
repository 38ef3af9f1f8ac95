"""The demonstration: real annotated blood cells, from file to embedding in a few minutes."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from sigjax.models import jobs
from sigjax.models.cells import cells_of, require_expressed
from sigjax.models.config import DataConfig, ModelConfig, TrainConfig
from sigjax.models.evaluate import matrix_of, pca
from sigjax.models.quiet import quiet
from sigjax.models.runs import Say, Settings, fit
from sigjax.models.sources import source_of
from sigjax.models.vocabulary import Vocabulary

if TYPE_CHECKING:
    from anndata import AnnData

NAME = "pbmc68k_reduced"
LABEL = "bulk_labels"
SETTINGS = Settings(
    ModelConfig(layers=2, width=64, heads=4),
    DataConfig(values="raw", buckets=3, multiple=32, tokens_per_batch=4096),
    TrainConfig(steps=300, learning_rate=3e-3, evaluate_every=50, held_out=0.15),
)


def demo(out: Path, say: Say, settings: Settings = SETTINGS) -> None:
    """Trains on scanpy's 700 blood cells and says and draws what came of it.

    Writes checkpoint, loss.csv, loss.png, cells.h5ad with obsm["X_sigjax"] and umap.png in out.

    Args:
        out: folder, made where it is missing.
        say: takes lines for the user.
        settings: of the run.

    Raises:
        InputError: out holds a run already.
    """
    from sigjax.models.pictures import draw_cells, plane

    began = time.perf_counter()
    data = blood_cells()
    source = source_of(data, NAME, settings.data.values)
    vocabulary = Vocabulary.union([source.genes])
    cells, intake = cells_of(source, vocabulary, settings.data.max_genes)
    require_expressed(cells, NAME)
    say(str(intake))
    trained = fit(cells, vocabulary, settings, out, say, resume=False)
    embedding = jobs.embed_cells(trained.restored, cells)
    labels = jobs.labels_of(data, NAME, LABEL)
    data.obsm["X_sigjax"] = embedding
    jobs.write_h5ad(data, out / "cells.h5ad")
    panels = {"sigjax": plane(embedding), "PCA": plane(pca(matrix_of(cells, vocabulary.size)))}
    draw_cells(out / "umap.png", panels, labels)
    held_out = trained.history.held_out
    say(
        f"held-out loss {held_out[0][1]:.4f} at the start, {held_out[-1][1]:.4f} at the end, "
        f"{trained.baseline:.4f} of the per-gene mean"
    )
    say(jobs.silhouettes(embedding, cells, vocabulary, labels, LABEL))
    say(f"{time.perf_counter() - began:.0f} s; see {out}: {', '.join(written_files(out))}")


def blood_cells() -> "AnnData":
    """Reads scanpy's pbmc68k_reduced, inside the package: 700 cells, 765 genes in raw."""
    with quiet():
        from scanpy.datasets import pbmc68k_reduced

        return pbmc68k_reduced()


def written_files(out: Path) -> list[str]:
    """Names in a folder, in order."""
    return sorted(path.name for path in out.iterdir())
