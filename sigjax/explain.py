"""Which implementation, kernels and tiles a call takes, and why not the faster ones."""

from dataclasses import dataclass
from typing import Any, Literal

import jax

from sigjax.checks import check, check_implementation
from sigjax.choice import call_refusal, choose, gpu_capability, host_refusal
from sigjax.chunked import block_size
from sigjax.operands import Operands, Settings


@dataclass(frozen=True)
class Explanation:
    """What ``sigjax.explain`` found; ``str`` of it is made to be read.

    Attributes:
        implementation: "triton" or "xla".
        kernels: each kernel that runs, with its tile: (name, tile) in order.
        reason: why the faster implementation or kernels do not serve the call; None where
            the fastest there are run.
        notes: what became of arguments that take effect in some kernels alone.
    """

    implementation: Literal["triton", "xla"]
    kernels: tuple[tuple[str, str], ...]
    reason: str | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"implementation: {self.implementation}"]
        lines += [f"  {name}: {tile}" for name, tile in self.kernels]
        if self.reason is not None:
            lines.append(f"not faster because {self.reason}")
        lines += self.notes
        return "\n".join(lines)


def explain(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    implementation: Literal["triton", "xla"] | None = None,
    **arguments: Any,
) -> Explanation:
    """Says what ``sigmoid_attention`` would run for these arguments, without running it.

    Args:
        query: as in ``sigmoid_attention``, an array or, here, a ``jax.ShapeDtypeStruct``.
        key: see query.
        value: see query.
        bias: see query.
        mask: see query.
        implementation: as in ``sigmoid_attention``.
        **arguments: the others of ``sigmoid_attention``; arrays may be shapes.

    Returns:
        Implementation, kernels with their tiles, and why no faster ones run.

    Raises:
        ValueError: as ``sigmoid_attention``.
        TypeError: as ``sigmoid_attention``.
        NotImplementedError: as ``sigmoid_attention``.

    Example:
        >>> import jax, jax.numpy as jnp, sigjax
        >>> x = jax.ShapeDtypeStruct((1, 4096, 16, 64), jnp.bfloat16)
        >>> explanation = sigjax.explain(x, x, x, implementation="xla")
        >>> print(explanation)
        implementation: xla
          scan: 512 keys a step
        not faster because implementation 'xla' was asked for
    """
    check_implementation(implementation)
    operands, settings = _checked([query, key, value, bias, mask], arguments)
    chosen = choose(implementation, operands, settings)
    if chosen == "xla":
        batch, length, heads, _ = operands.query.shape
        size = block_size(batch, heads, length, operands.key.shape[1])
        reason = call_refusal(operands, settings) or host_refusal()
        if implementation == "xla":
            reason = "implementation 'xla' was asked for"
        elif reason is not None:
            reason = f"'triton' cannot serve this call: {reason}"
        notes = _notes(settings, '"xla"')
        return Explanation("xla", (("scan", f"{size} keys a step"),), reason, notes)
    return _triton(operands, settings)


def _checked(positional: list[Any], arguments: dict[str, Any]) -> tuple[Operands, Settings]:
    """Operands as shapes: nothing is computed."""
    defaults = {
        "scale": None,
        "sigmoid_bias": None,
        "key_bias": None,
        "is_causal": False,
        "query_seq_lengths": None,
        "key_value_seq_lengths": None,
        "local_window_size": None,
    }
    options = {**defaults, **arguments}
    arrays = {name: x for name, x in options.items() if hasattr(x, "shape") and name != "scale"}
    static: dict[str, Any] = {name: x for name, x in options.items() if name not in arrays}
    found: list[Settings] = []

    def run(positional: list[Any], arrays: dict[str, Any]) -> Operands:
        operands, settings = check(*positional, **arrays, **static)
        found.append(settings)
        return operands

    return jax.eval_shape(run, positional, arrays), found[0]


def _notes(settings: Settings, exact: str | None) -> tuple[str, ...]:
    """What became of fast_sigmoid; exact is what takes the exact sigmoid, None for nothing."""
    if not settings.fast_sigmoid:
        return ()
    if exact is None:
        return ("fast_sigmoid: the hardware's tanh in the forward pass, exact gradients",)
    return (f"fast_sigmoid has no effect: {exact} computes the exact sigmoid",)


def _triton(operands: Operands, settings: Settings) -> Explanation:
    # Here and not above: a host without a GPU need not have Triton.
    from sigjax.kernels import features, hopper_choice, launch, tiles

    capability = gpu_capability() or 0  # choose refuses where there is none
    head_size = operands.query.shape[-1]

    def portable(*names: tiles.Kernel) -> list[tuple[str, str]]:
        return [(name, str(launch.tile_of(name, operands))) for name in names]

    forward, backward = (
        hopper_choice.serves(direction, operands, settings) for direction in ("forward", "backward")
    )
    kernels = portable("forward")
    if forward:
        from sigjax.kernels import hopper_launch  # of a Triton that has Gluon

        kernels = [("hopper forward", str(hopper_launch.forward_tile(operands, settings)))]
    if backward:
        kernels.append(("hopper backward", str(tiles.hopper_backward_tile(head_size))))
    else:
        kernels += portable("query_gradient", "key_value_gradient")
    # The gradient of another bias is a sum that the key and value gradient kernel has.
    if operands.bias is not None and features.has_queries(operands.bias):
        if hopper_choice.serves_bias_gradient(operands, settings):
            kernels.append(("hopper bias_gradient", str(tiles.hopper_bias_tile(head_size))))
        else:
            kernels += portable("bias_gradient")
    reason = None
    if capability == 90 and not (forward and backward):
        sizes = " and ".join(map(str, hopper_choice.HEAD_SIZES))
        reason = (
            f"the Hopper kernels serve bfloat16 and float16 with head sizes {sizes}, a bias per "
            "key and, without segments, a mask or a 16-bit bias with a number for each pair, where "
            f"{hopper_choice.MATRIX_KEYS} divides S, forward at head size 64 no segments and no "
            f"window of less than {hopper_choice.WINDOW:,} keys (the portable kernel is faster), "
            "backward neither gradients of grouped heads' biases nor "
            f"deterministic=True, with Triton 3.9 or newer, where {hopper_choice.VARIABLE} allows"
        )
    notes = _notes(settings, None if forward else "the portable forward kernel")
    return Explanation("triton", tuple(kernels), reason, notes)
