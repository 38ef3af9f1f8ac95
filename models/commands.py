"""What each command takes and does; sigjax.models.cli finds and runs them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sigjax.models.config import DataConfig, Implementation, ModelConfig, TrainConfig


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
    """Train a model on the cells of .h5ad files.

    Attributes:
        data: .h5ad files.
        out: folder for the checkpoint, settings.json, loss.csv and loss.png.
        resume: go on from the checkpoint in out.
        implementation: what computes the attention; None picks the best that runs here.
        model: what the model is.
        reading: how cells are read and batched.
        training: how it is trained.
    """

    data: tyro.conf.Positional[tuple[Path, ...]]
    out: Path
    resume: bool = False
    implementation: Implementation = None
    model: ModelConfig = field(default_factory=ModelConfig)
    reading: DataConfig = field(default_factory=DataConfig)
    training: TrainConfig = field(default_factory=TrainConfig)

    def run(self) -> None:
        """Reads the files and trains."""
        from sigjax.models import jobs
        from sigjax.models.runs import Settings

        settings = Settings(self.model, self.reading, self.training, self.implementation)
        jobs.train_files(self.data, settings, self.out, say, resume=self.resume)


@dataclass(frozen=True)
class Embed:
    """Write a copy of an .h5ad file with obsm["X_sigjax"], the embedding of each cell.

    Attributes:
        data: an .h5ad file.
        checkpoint: folder that sigjax train or sigjax demo wrote.
        out: the file to write.
        values: where the values are; X, raw, or the name of a layer.
        implementation: what computes the attention; None picks the best that runs here.
    """

    data: tyro.conf.Positional[Path]
    checkpoint: Path
    out: Path
    values: str = "X"
    implementation: Implementation = None

    def run(self) -> None:
        """Embeds the file's cells."""
        from sigjax.models import jobs

        jobs.embed_file(self.data, self.checkpoint, self.out, self.values, self.implementation, say)


@dataclass(frozen=True)
class Evaluate:
    """Say a model's loss on the cells of a file, and the silhouette of their types.

    Attributes:
        data: an .h5ad file, best one that was not trained on.
        checkpoint: folder that sigjax train or sigjax demo wrote.
        values: where the values are; X, raw, or the name of a layer.
        label: column of obs with the cell types; None for no silhouette.
        implementation: what computes the attention; None picks the best that runs here.
    """

    data: tyro.conf.Positional[Path]
    checkpoint: Path
    values: str = "X"
    label: str | None = None
    implementation: Implementation = None

    def run(self) -> None:
        """Evaluates the checkpoint on the file's cells."""
        from sigjax.models import jobs

        jobs.evaluate_file(
            self.data, self.checkpoint, self.values, self.label, self.implementation, say
        )


type Command = Demo | Train | Embed | Evaluate

COMMANDS: dict[str, type[Demo | Train | Embed | Evaluate]] = {
    "demo": Demo,
    "train": Train,
    "embed": Embed,
    "evaluate": Evaluate,
}


def parse(name: str, arguments: Sequence[str]) -> Command:
    """A command with its arguments; leaves the process with status 2 where they do not parse."""
    # Options by their own names: --layers, not --model.layers.
    command = Annotated[COMMANDS[name], tyro.conf.OmitArgPrefixes]
    return tyro.cli(command, prog=f"sigjax {name}", args=arguments)


def say(text: str) -> None:
    """Prints a line at once, also where output goes to a file."""
    print(text, flush=True)
