"""What each command takes and does; sigjax.models.cli finds and runs them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sigjax.models.config import (
    DataConfig,
    Implementation,
    InputError,
    ModelConfig,
    TrainConfig,
)
from sigjax.models.intake import IntakeConfig


@dataclass(frozen=True)
class Demo:
    """Train on scanpy's 700 annotated blood cells, then score and draw the result.

    Attributes:
        out: folder for the checkpoint, the .h5ad file and the pictures.
    """

    out: Path = Path("sigjax-demo")

    def run(self) -> None:
        """Runs the demonstration."""
        from sigjax.models.demo import demo

        demo(self.out, say)


@dataclass(frozen=True)
class Train:
    """Train a model on the cells of .h5ad files and zarr stores.

    Attributes:
        data: .h5ad files, zarr stores, or folders of them.
        out: folder for the checkpoint, settings.json, loss.csv and loss.png.
        resume: go on from the checkpoint in out.
        implementation: what computes the attention; None picks the best that runs here.
        compile_ahead: steps, one a batch shape, that are compiled side by side before training
            begins; 0 compiles each when its shape comes first.
        model: what the model is.
        intake: how files are opened.
        reading: how cells are read and batched.
        training: how it is trained.
    """

    data: tyro.conf.Positional[tuple[Path, ...]]
    out: Path
    resume: bool = False
    implementation: Implementation = None
    compile_ahead: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    intake: IntakeConfig = field(default_factory=IntakeConfig)
    reading: DataConfig = field(default_factory=DataConfig)
    training: TrainConfig = field(default_factory=TrainConfig)

    def run(self) -> None:
        """Reads the files and trains."""
        from sigjax.models import jobs
        from sigjax.models.runs import Settings

        if self.compile_ahead < 0:
            msg = f"--compile-ahead must be at least 0, got {self.compile_ahead}"
            raise InputError(msg)
        settings = Settings(
            self.model, self.reading, self.training, self.implementation, self.compile_ahead
        )
        jobs.train_files(self.data, settings, self.out, say, resume=self.resume, intake=self.intake)


@dataclass(frozen=True)
class Embed:
    """Write a copy of a file or store with obsm["X_sigjax"], the embedding of each cell.

    Attributes:
        data: an .h5ad file or a zarr store.
        checkpoint: folder that sigjax train or sigjax demo wrote.
        out: the file or store to write, of the same kind as data.
        values: where the values are; X, raw, or the name of a layer.
        implementation: what computes the attention; None picks the best that runs here.
        intake: how the file is opened.
    """

    data: tyro.conf.Positional[Path]
    checkpoint: Path
    out: Path
    values: str = "X"
    implementation: Implementation = None
    intake: IntakeConfig = field(default_factory=IntakeConfig)

    def run(self) -> None:
        """Embeds the file's cells."""
        from sigjax.models import jobs

        jobs.embed_file(
            self.data,
            self.checkpoint,
            self.out,
            self.values,
            self.implementation,
            say,
            self.intake,
        )


@dataclass(frozen=True)
class Evaluate:
    """Say a model's loss on the cells of a file, and the silhouette of their types.

    Attributes:
        data: an .h5ad file or a zarr store, best one that was not trained on.
        checkpoint: folder that sigjax train or sigjax demo wrote.
        values: where the values are; X, raw, or the name of a layer.
        label: column of obs with the cell types; None for no silhouette.
        implementation: what computes the attention; None picks the best that runs here.
        intake: how the file is opened.
    """

    data: tyro.conf.Positional[Path]
    checkpoint: Path
    values: str = "X"
    label: str | None = None
    implementation: Implementation = None
    intake: IntakeConfig = field(default_factory=IntakeConfig)

    def run(self) -> None:
        """Evaluates the checkpoint on the file's cells."""
        from sigjax.models import jobs

        jobs.evaluate_file(
            self.data,
            self.checkpoint,
            self.values,
            self.label,
            self.implementation,
            say,
            self.intake,
        )


@dataclass(frozen=True)
class Inspect:
    """Say what training would see of files: genes, lengths, shapes, padding and cell types.

    Attributes:
        data: .h5ad files, zarr stores, or folders of them.
        label: column of obs with the cell types; None takes cell_type of the files that have it.
        checkpoint: folder that sigjax train or sigjax demo wrote, whose genes are then asked for.
        picture: a .png, .svg or .pdf file to draw lengths, padding and cell types into.
        intake: how files are opened.
        reading: how cells are read and batched.
    """

    data: tyro.conf.Positional[tuple[Path, ...]]
    label: str | None = None
    checkpoint: Path | None = None
    picture: Path | None = None
    intake: IntakeConfig = field(default_factory=IntakeConfig)
    reading: DataConfig = field(default_factory=DataConfig)

    def run(self) -> None:
        """Reads the files and says what is in them."""
        from sigjax.models.inspection import Asked, inspect_files

        asked = Asked(self.reading, self.intake, self.label, self.checkpoint)
        inspect_files(self.data, asked, self.picture)


@dataclass(frozen=True)
class Manifest:
    """Write the SHA-256 digests of files, for --manifest of the other commands.

    Attributes:
        data: .h5ad files, zarr stores, or folders of them.
        out: the table to write; its paths are relative to its folder.
    """

    data: tyro.conf.Positional[tuple[Path, ...]]
    out: Path

    def run(self) -> None:
        """Writes the table."""
        from sigjax.models.manifest import find_stores, write_manifest

        count = write_manifest(find_stores(self.data), self.out)
        say(f"{self.out}: {count:,} files")


type Command = Demo | Train | Embed | Evaluate | Inspect | Manifest

COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "train": Train,
    "embed": Embed,
    "evaluate": Evaluate,
    "inspect": Inspect,
    "manifest": Manifest,
}


def parse(name: str, arguments: Sequence[str]) -> Command:
    """A command with its arguments; leaves the process with status 2 where they do not parse."""
    # Options by their own names: --layers, not --model.layers.
    command = Annotated[COMMANDS[name], tyro.conf.OmitArgPrefixes]
    return tyro.cli(command, prog=f"sigjax {name}", args=arguments)


def say(text: str) -> None:
    """Prints a line at once, also where output goes to a file."""
    print(text, flush=True)
