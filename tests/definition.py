"""The definition, as one program: op by op it takes longer than what is compared with it.

Nor is the program optimised, which takes longer than to run it; one serves every scale.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
from jax import Array

from sigjax import reference
from sigjax.operands import Operands, Settings

UNOPTIMISED = {"xla_backend_optimization_level": "0"}


type Band = tuple[bool, tuple[int, int] | None]  # of settings all that the definition asks for


@cache
def _attention(band: Band) -> Callable[[Operands, Any], Array]:
    return jax.jit(
        lambda operands, scale: reference.attention(operands, Settings(scale, *band)),
        compiler_options=UNOPTIMISED,
    )


@cache
def _gradients(band: Band, names: tuple[str, ...]) -> Callable[..., dict[str, Array]]:
    def gradients(operands: Operands, scale: Any, cotangent: Array) -> dict[str, Array]:
        def output(arrays: dict[str, Any]) -> Array:
            return reference.attention(operands._replace(**arrays), Settings(scale, *band))

        _, pullback = jax.vjp(output, {name: getattr(operands, name) for name in names})
        return pullback(cotangent)[0]

    return jax.jit(gradients, compiler_options=UNOPTIMISED)


def attention(operands: Operands, settings: Settings) -> Array:
    """reference.attention."""
    return _attention((settings.is_causal, settings.window))(operands, settings.scale)


def gradients(
    operands: Operands,
    settings: Settings,
    cotangent: Array,
    names: Sequence[str] = ("query", "key", "value"),
) -> dict[str, Array]:
    """Of reference.attention, by the operands' names, where the output has such a cotangent."""
    band = settings.is_causal, settings.window
    return _gradients(band, tuple(names))(operands, settings.scale, cotangent)
