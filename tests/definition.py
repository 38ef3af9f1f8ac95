"""The definition, as one program: op by op it takes longer than what is compared with it.

Nor is the program optimised, which takes longer than to run it; one serves every scale and window,
of which causality is one.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from jax import Array

from sigjax import numerics, reference
from sigjax.checks import check
from sigjax.operands import Operands, Settings

UNOPTIMISED = {"xla_backend_optimization_level": "0"}
WIDE = 2**30  # more than there are positions

# The op's arguments, None where they have no default.
ARGUMENTS: dict[str, Any] = {
    name: None if parameter.default is parameter.empty else parameter.default
    for name, parameter in inspect.signature(check).parameters.items()
} | {"is_causal": False}

type Window = tuple[int, int]


def _attention(operands: Operands, scale: Any, window: Window) -> Array:
    return reference.attention(operands, Settings(scale, window=window))


_compiled = jax.jit(_attention, compiler_options=UNOPTIMISED)


@partial(jax.jit, static_argnames="names", compiler_options=UNOPTIMISED)
def _gradients(
    operands: Operands, scale: Any, window: Window, cotangent: Array, *, names: tuple[str, ...]
) -> dict[str, Array]:
    def output(arrays: dict[str, Any]) -> Array:
        return _attention(operands._replace(**arrays), scale, window)

    _, pullback = jax.vjp(output, {name: getattr(operands, name) for name in names})
    return pullback(cotangent)[0]


@partial(jax.jit, compiler_options=UNOPTIMISED)
def _results(
    arrays: dict[str, Any], fixed: dict[str, Any], scale: Any, window: Window, cotangent: Array
) -> dict[str, Array]:
    def attention(arrays: dict[str, Any]) -> Array:
        operands, _ = check(**(ARGUMENTS | fixed | arrays))
        return _attention(operands, scale, window)

    with jax.default_matmul_precision("highest"):
        output, pullback = jax.vjp(attention, arrays)
        return {"output": output, **pullback(cotangent)[0]}


def attention(operands: Operands, settings: Settings) -> Array:
    """reference.attention."""
    return _compiled(operands, settings.scale, window_of(settings.window, settings.is_causal))


def gradients(
    operands: Operands,
    settings: Settings,
    cotangent: Array,
    names: Sequence[str] = ("query", "key", "value"),
) -> dict[str, Array]:
    """Of reference.attention, by the operands' names, where the output has such a cotangent."""
    window = window_of(settings.window, settings.is_causal)
    return _gradients(operands, settings.scale, window, cotangent, names=tuple(names))


def results(
    inputs: Mapping[str, Any],
    *,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: Window | None = None,
) -> numerics.Named:
    """Output and gradients by the op's argument names; inputs have the output's cotangent too."""
    arrays = dict(inputs)
    cotangent = arrays.pop("cotangent")
    fixed = {name: x for name, x in arrays.items() if name.endswith(numerics.FIXED_ARGUMENTS)}
    arrays = {name: x for name, x in arrays.items() if name not in fixed}
    scale = arrays["query"].shape[-1] ** -0.5 if scale is None else scale
    window = window_of(local_window_size, is_causal)
    return jax.device_get(_results(arrays, fixed, scale, window, cotangent))


def window_of(window: Window | None, is_causal: bool) -> Window:
    """A window that excludes what these exclude."""
    left, right = (min(x, WIDE) for x in window or (WIDE, WIDE))
    return left, 0 if is_causal else right
