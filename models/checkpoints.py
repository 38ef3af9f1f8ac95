"""Checkpoints: the state by orbax, and beside it all that is needed to use it alone."""

import json
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sigjax.models.config import DataConfig, Implementation, InputError, ModelConfig, TrainConfig
from sigjax.models.outputs import written
from sigjax.models.tokens import encoding_of
from sigjax.models.train import Model, TrainState, build
from sigjax.models.vocabulary import Vocabulary

FORMAT = "sigjax checkpoint"
FORMAT_VERSION = 1
MODEL = "CellTransformer"
PACKAGES = ("sigjax", "jax", "flax", "optax", "orbax-checkpoint")


@dataclass(frozen=True)
class About:
    """What a state belongs to.

    Attributes:
        model: settings of the model.
        data: how its cells were read.
        training: how it was trained.
        vocabulary: its genes.
        gene_means: float32 [V], the baseline of its training cells.
    """

    model: ModelConfig
    data: DataConfig
    training: TrainConfig
    vocabulary: Vocabulary
    gene_means: np.ndarray


class Restored(NamedTuple):
    """A checkpoint in memory, ready to embed or to train on.

    Attributes:
        about: what it belongs to.
        model: as a pure function.
        state: its parameters and optimiser.
        batches: state of the batches behind it, from feed; None where it was saved without.
    """

    about: About
    model: Model
    state: TrainState
    batches: dict[str, Any] | None = None


def save(
    path: Path, about: About, state: TrainState, batches: dict[str, Any] | None = None
) -> None:
    """Writes a checkpoint folder; an older one at path is replaced when the new one is whole.

    Args:
        path: the folder.
        about: what the state belongs to.
        state: of the training.
        batches: where its batches were, of which a run can go on; see feed.
    """
    import orbax.checkpoint as ocp

    with written(path) as folder:
        folder.mkdir()
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / "state").absolute(), state)
        np.save(folder / "gene_means.npy", about.gene_means, allow_pickle=False)
        (folder / "vocabulary.json").write_text(about.vocabulary.to_json(), encoding="utf-8")
        manifest = json.dumps(_manifest(about, state) | {"batches": batches}, indent=2)
        (folder / "manifest.json").write_text(manifest, encoding="utf-8")


def load(path: Path, implementation: Implementation = None) -> Restored:
    """Reads a checkpoint folder, or the folder of a training run that holds one.

    Args:
        path: the folder.
        implementation: what computes the attention from now on.

    Raises:
        InputError: nothing there, no sigjax checkpoint, one of another model, or a damaged one.
    """
    import orbax.checkpoint as ocp

    folder = path / "checkpoint" if (path / "checkpoint").is_dir() else path
    about = describe(folder)
    model, abstract = _abstract(about, implementation)
    # Before orbax, which leaves unfinished reads behind where a shape is wrong.
    manifest = _read_manifest(folder)
    if manifest.get("state") != _leaves(abstract):
        msg = f"{folder}: the checkpoint's state is damaged or of another model: shapes differ"
        raise InputError(msg)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            state = checkpointer.restore((folder / "state").absolute(), abstract)
    except (KeyError, OSError, TypeError, ValueError) as error:
        msg = f"{folder}: the checkpoint's state is damaged or of another model: {_brief(error)}"
        raise InputError(msg) from error
    return Restored(about, model, state, manifest.get("batches"))


def describe(folder: Path) -> About:
    """Everything of a checkpoint but its state.

    Raises:
        InputError: as load.
    """
    manifest = _read_manifest(folder)
    try:
        about = About(
            model=ModelConfig.from_dict(manifest["config"]),
            data=DataConfig(**manifest["data"]),
            training=TrainConfig(**manifest["training"]),
            vocabulary=Vocabulary.from_json(
                (folder / "vocabulary.json").read_text(encoding="utf-8")
            ),
            gene_means=np.load(folder / "gene_means.npy", allow_pickle=False),
        )
    except (KeyError, OSError, TypeError, ValueError) as error:
        msg = f"{folder}: the checkpoint is damaged: {_brief(error)}"
        raise InputError(msg) from error
    if about.vocabulary.digest != manifest.get("vocabulary"):
        msg = f"{folder}: vocabulary.json is not the vocabulary of this checkpoint"
        raise InputError(msg)
    if about.gene_means.shape != (about.vocabulary.size,):
        msg = f"{folder}: gene_means.npy does not fit the vocabulary of this checkpoint"
        raise InputError(msg)
    return about


def require_same(folder: Path, about: About, model: ModelConfig, vocabulary: Vocabulary) -> None:
    """Raises InputError unless a checkpoint is of this model and these genes."""
    theirs, ours = about.model.to_dict(), model.to_dict()
    different = [f"{k} {theirs[k]!r}, not {ours[k]!r}" for k in ours if theirs[k] != ours[k]]
    if different:
        msg = f"{folder}: the checkpoint is of another model: it has {'; '.join(different)}"
        raise InputError(msg)
    if about.vocabulary.digest != vocabulary.digest:
        msg = (
            f"{folder}: the checkpoint has another vocabulary ({len(about.vocabulary.genes)} "
            f"genes, not {len(vocabulary.genes)}, in another order or with other aliases); "
            "go on with the same files"
        )
        raise InputError(msg)


def _manifest(about: About, state: TrainState) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": MODEL,
        "config": about.model.to_dict(),
        "data": asdict(about.data),
        "training": asdict(about.training),
        "vocabulary": about.vocabulary.digest,
        "step": int(state.step),
        "state": _leaves(state),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        msg = f"{folder}: no such checkpoint; give the folder that sigjax train wrote"
        raise InputError(msg)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{folder}: not a sigjax checkpoint ({_brief(error)})"
        raise InputError(msg) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        msg = f"{folder}: not a sigjax checkpoint (manifest.json is of another program)"
        raise InputError(msg)
    if manifest.get("format_version") != FORMAT_VERSION:
        msg = (
            f"{folder}: format_version must be {FORMAT_VERSION}, got "
            f"{manifest.get('format_version')!r}; use the sigjax that wrote it"
        )
        raise InputError(msg)
    if manifest.get("model") != MODEL:
        msg = f"{folder}: the checkpoint is of another model: {manifest.get('model')!r}"
        raise InputError(msg)
    return manifest


def _abstract(about: About, implementation: Implementation) -> tuple[Model, TrainState]:
    """The model, and its state as shapes on the default device."""
    models = []

    def start() -> TrainState:
        model, state = build(
            about.model,
            about.vocabulary.size,
            about.training,
            implementation,
            encoding=encoding_of(about.data),
        )
        models.append(model)
        return state

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(start)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    return models[0], abstract


def _leaves(state: TrainState) -> dict[str, str]:
    """Shape and dtype of each array of a state, by its path."""
    return {
        jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}"
        for path, x in jax.tree.leaves_with_path(state)
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        # A plain checkout on the path is not installed.
        return None


def _brief(error: BaseException) -> str:
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text[:160]}"
