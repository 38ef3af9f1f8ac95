"""When the Hopper kernels serve a call."""

import os
import re
from typing import Literal

import numpy as np
import triton

from sigjax.kernels import features
from sigjax.operands import Operands, Settings

# Where this environment variable is set, the Hopper kernels serve the directions that it names
# alone: "forward", or "" for none. "forward,backward,narrow" has the forward kernel serve narrow
# windows and packed rows at head size 64 too, where it is slower. It is read when a call is
# traced: set it before the first one.
VARIABLE = "SIGJAX_HOPPER"
DIRECTIONS = "forward,backward"
HEAD_SIZES = (64, 128)
MATRIX_KEYS = 8  # divide the keys of a bias or mask
TRITON = (3, 9)  # the first with gluon.aggregate
# Keys from which on a window is not narrow: one of 1,025 takes 0.51 ms for the portable kernel's
# 0.39 at T = 4,096 (VARIANTS.md, H200); the tiles of 192 queries have their costs whatever keys
# they meet. The bound is predicted.
WINDOW = 4096


def serves(
    direction: Literal["forward", "backward"], operands: Operands, settings: Settings
) -> bool:
    """Whether a Hopper kernel computes the output, or the gradients, of such operands."""
    query, key = operands.query, operands.key
    if not _computes(direction):
        return False
    if direction == "backward" and settings.deterministic:
        return False  # it adds up query gradients in any order
    if direction == "forward" and _is_slower(operands, settings):
        return False
    if not _serves_pairs(direction, operands):
        return False
    if settings.result_dtype not in (None, np.float32):
        return False
    if direction == "backward" and not _serves_biases(operands, settings):
        return False
    return key.size > 0 and query.dtype.itemsize == 2 and query.shape[-1] in HEAD_SIZES


def _computes(direction: Literal["forward", "backward"]) -> bool:
    """Whether GPU, Triton and VARIABLE allow Hopper kernels in a direction."""
    if direction not in _directions():
        return False
    return features.capability() == 90 and _triton_version() >= TRITON


def _directions() -> list[str]:
    return os.environ.get(VARIABLE, DIRECTIONS).split(",")


def _is_slower(operands: Operands, settings: Settings) -> bool:
    """Whether the portable forward kernel is the faster one, and nobody asks for the other."""
    if operands.query.shape[-1] != 64 or "narrow" in _directions():
        return False
    left, right = features.window_of(settings)
    is_narrow = left is not None and right is not None and left + right < WINDOW
    return is_narrow or operands.query_segments is not None


def _serves_pairs(direction: Literal["forward", "backward"], operands: Operands) -> bool:
    """Whether the Hopper kernel of a direction takes such a bias and mask of single pairs."""
    operands = features.without_bias_of_keys(operands)
    if operands.bias is None and operands.mask is None:
        return True
    from sigjax.kernels import hopper_matrices  # of a Triton that has Gluon

    return hopper_matrices.serves(direction, operands)


def _serves_biases(operands: Operands, settings: Settings) -> bool:
    """Whether the Hopper backward kernel takes such biases per head and key."""
    plain_keys = operands.key_bias is None and not features.is_per_key(operands)
    if plain_keys and (operands.sigmoid_bias is None or not settings.bias_gradients):
        return True
    # A program has the sums of one query head.
    return operands.query.shape[2] == operands.key.shape[2]


def serves_bias_gradient(operands: Operands, settings: Settings) -> bool:
    """Whether the Hopper kernel computes the gradient of the bias; its order is fixed."""
    query, key, bias = operands.query, operands.key, operands.bias
    if bias is None or not features.has_queries(bias) or not _computes("backward"):
        return False
    if operands.mask is not None or operands.query_segments is not None:
        return False
    if settings.result_dtype not in (None, np.float32):
        return False
    # Rows of the bias must begin at multiples of 16 bytes.
    keys = key.shape[1]
    pairs = bias.dtype.itemsize == 2 and bias.shape[3] == keys and keys % MATRIX_KEYS == 0
    return pairs and query.dtype.itemsize == 2 and query.shape[-1] in HEAD_SIZES


def _triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
