"""Every setting of the model and its training, as frozen dataclasses checked once."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

type Attention = Literal["sigmoid", "softmax"]
type Implementation = Literal["triton", "xla", "cudnn"] | None
type ComputeDtype = Literal["float32", "bfloat16"]
type EncodingName = Literal["log1p", "bins", "rank"]

# What serves an attention: None lets the op choose.
IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    "sigmoid": (None, "triton", "xla"),
    "softmax": (None, "cudnn", "xla"),
}


class InputError(ValueError):
    """A file, field or option given by the user cannot be used; the text says what to do."""


@dataclass(frozen=True)
class ModelConfig:
    """What identifies a model: two checkpoints with equal values have equal parameters' shapes.

    Attributes:
        layers: number of transformer blocks.
        width: features of a token; a multiple of heads.
        heads: attention heads of a block.
        mlp_ratio: width of a block's hidden layer over width.
        attention: "sigmoid" (sigjax.SigmoidAttention) or "softmax".
        dtype: dtype of the computation; parameters are always float32.
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    mlp_ratio: int = 4
    attention: Attention = "sigmoid"
    dtype: ComputeDtype = "float32"

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "mlp_ratio"):
            _check_at_least(name, getattr(self, name), 1)
        _check_choice("attention", self.attention, tuple(IMPLEMENTATIONS))
        _check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        if self.width % self.heads:
            msg = f"width must be a multiple of heads, got width {self.width}, heads {self.heads}"
            raise InputError(msg)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of to_dict.

        Raises:
            InputError: a setting is missing, unknown or out of range.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            msg = f"a model's settings must be {sorted(names)}, got {sorted(values)}"
            raise InputError(msg)
        return cls(**values)


@dataclass(frozen=True)
class DataConfig:
    """How cells are read and batched.

    Attributes:
        values: where a file's values are: "X", "raw", or the name of a layer.
        max_genes: longest cell; a longer one keeps its max_genes highest values.
        encoding: what the model sees of a cell: the "log1p" values, their quantile "bins" within
            the cell, or the genes in "rank" order of their values.
        bins: number of quantile bins.
        mask_share: share of a cell's values that is hidden from the model, at least one.
        query_genes: genes, expressed or not, whose values a batch asks of the cells' embeddings.
        buckets: number of static lengths; training compiles at most that many steps.
        multiple: bucket lengths are multiples of it.
        tokens_per_batch: rows of a batch times its length, at most; over all devices.
        pack_window: cells of which several short ones share a row in training; 0 packs none.
    """

    values: str = "X"
    max_genes: int = 2048
    encoding: EncodingName = "log1p"
    bins: int = 64
    mask_share: float = 0.2
    query_genes: int = 512
    buckets: int = 4
    multiple: int = 64
    tokens_per_batch: int = 16384
    pack_window: int = 0

    def __post_init__(self) -> None:
        for name in ("max_genes", "bins", "query_genes", "buckets", "multiple", "tokens_per_batch"):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("pack_window", self.pack_window, 0)
        _check_choice("encoding", self.encoding, ("log1p", "bins", "rank"))
        if not self.values:
            msg = "values must be 'X', 'raw' or the name of a layer, got ''"
            raise InputError(msg)
        if not 0 < self.mask_share < 1:
            msg = f"mask_share must lie between 0 and 1, got {self.mask_share}"
            raise InputError(msg)


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        steps: optimiser steps in all.
        learning_rate: the peak, reached after the warm-up.
        warmup_share: share of the steps over which the rate rises; then it falls as a cosine.
        profile_weight: weight of the profile's loss beside the masked-expression loss.
        weight_decay: decoupled, AdamW's.
        clip_norm: largest global norm of a gradient.
        held_out: share of the cells that is never trained on.
        evaluate_every: steps between two evaluations of the held-out loss.
        checkpoint_every: steps between two checkpoints; 0 writes the last one only.
        seed: of the initial parameters, the split, the order and the masks.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    warmup_share: float = 0.1
    profile_weight: float = 1.0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    held_out: float = 0.1
    evaluate_every: int = 100
    checkpoint_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("evaluate_every", 1),
            ("checkpoint_every", 0),
            ("seed", 0),
        ):
            _check_at_least(name, getattr(self, name), least)
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                msg = f"{name} must be positive, got {getattr(self, name)}"
                raise InputError(msg)
        for name in ("profile_weight", "weight_decay"):
            if not getattr(self, name) >= 0:
                msg = f"{name} must not be negative, got {getattr(self, name)}"
                raise InputError(msg)
        for name in ("warmup_share", "held_out"):
            if not 0 < getattr(self, name) < 1:
                msg = f"{name} must lie between 0 and 1, got {getattr(self, name)}"
                raise InputError(msg)


def check_implementation(attention: Attention, implementation: Implementation) -> None:
    """Raises InputError for an implementation that does not serve the attention."""
    _check_choice(f"implementation of {attention}", implementation, IMPLEMENTATIONS[attention])


def _check_at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"{name} must be an int, got {value!r}"
        raise InputError(msg)
    if value < least:
        msg = f"{name} must be at least {least}, got {value}"
        raise InputError(msg)


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        msg = f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        raise InputError(msg)
