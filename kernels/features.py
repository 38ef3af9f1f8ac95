"""What a call asks of the kernels: which pairs take part, what is added to them, on which GPU."""

from jax import Array

from sigjax.choice import gpu_capability
from sigjax.kernels.tiles import Pairs
from sigjax.operands import Operands, Settings


def logits_shape(operands: Operands) -> tuple[int, ...]:
    """The shape of the logits, [B, N, T, S]."""
    batch, length, heads, _ = operands.query.shape
    return batch, heads, length, operands.key.shape[1]


def has_queries(bias: Array) -> bool:
    """Whether a bias has an axis of queries; one of a single query is as good without."""
    return bias.shape[2] > 1


def is_per_key(operands: Operands) -> bool:
    """Whether the bias has a number for each key and none of its own for each query."""
    bias = operands.bias
    return bias is not None and not has_queries(bias) and bias.shape[3] == operands.key.shape[1]


def without_bias_of_keys(operands: Operands) -> Operands:
    """The operands without a bias that is_per_key: the Hopper kernels take it as a key_bias."""
    return operands._replace(bias=None) if is_per_key(operands) else operands


def is_matrix(x: Array | None, shape: tuple[int, ...]) -> bool:
    """Whether an array has a number of its own for each query and key."""
    return x is not None and x.shape[2:] == shape[2:]


def pairs_of(operands: Operands) -> Pairs | None:
    """What concerns single pairs and asks for tiles of its own."""
    shape = logits_shape(operands)
    if is_matrix(operands.bias, shape):
        return "bias"
    if is_matrix(operands.mask, shape):
        return "mask"
    return None if operands.query_segments is None else "segments"


def window_of(settings: Settings) -> tuple[int | None, int | None]:
    """How far before and after itself a query sees, causality included; None is no bound."""
    left, right = settings.window or (None, None)
    if settings.is_causal:
        right = 0
    # A window wider than any length is as good; its sums must fit int32.
    left, right = (None if x is None else min(x, 2**30) for x in (left, right))
    return left, right


def keys_of_window(settings: Settings) -> int | None:
    """So many keys a query sees where sequences are long; None if there is no bound."""
    left, right = window_of(settings)
    return None if left is None or right is None else left + 1 + right


def capability() -> int:
    """Compute capability of the GPU, 90 for an H100.

    Raises:
        NotImplementedError: jax sees no NVIDIA GPU.
    """
    found = gpu_capability()
    if found is None:
        msg = "the Triton kernels were asked for where jax sees no NVIDIA GPU"
        raise NotImplementedError(msg)
    return found
