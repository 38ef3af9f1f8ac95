"""How the model takes what an encoding lets it see of a value: one embedding for each."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sigjax.models.collate import AnyBatch
from sigjax.models.tokens import Encoding, QuantileBins, RankOrder

# Longest and shortest wavelength, in ranks, differ by it (Vaswani et al., 2017, section 3.5).
LONGEST = 10_000.0


class ContinuousValue(nnx.Module):
    """A hidden layer over the log1p value."""

    def __init__(self, width: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(1, width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, batch: AnyBatch) -> Array:
        """Embeds batch.values: [B, L, W]."""
        return self.out(jax.nn.gelu(self.hidden(jnp.asarray(batch.values)[..., None])))


class BinnedValue(nnx.Module):
    """A vector a bin, and one for no bin."""

    def __init__(self, bins: int, width: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.table = nnx.Embed(bins + 1, width, dtype=dtype, rngs=rngs)

    def __call__(self, batch: AnyBatch) -> Array:
        """Embeds batch.codes: [B, L, W]."""
        return self.table(_codes(batch))


class RankedValue(nnx.Module):
    """Sines and cosines of the rank, mixed; so a model takes ranks that it was not trained on."""

    def __init__(self, width: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.width = width

    def __call__(self, batch: AnyBatch) -> Array:
        """Embeds batch.codes: [B, L, W]."""
        half = (self.width + 1) // 2
        rates = LONGEST ** (-jnp.arange(half, dtype=jnp.float32) / half)
        # float32 whatever the model computes in: bfloat16 holds no rank above 256 exactly.
        angles = _codes(batch).astype(jnp.float32)[..., None] * rates[None, None]
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return self.out(waves[..., : self.width])


def value_embedding(
    encoding: Encoding, width: int, dtype: jnp.dtype, rngs: nnx.Rngs
) -> ContinuousValue | BinnedValue | RankedValue:
    """The embedding that takes what an encoding gives."""
    if isinstance(encoding, QuantileBins):
        return BinnedValue(encoding.count, width, dtype, rngs)
    if isinstance(encoding, RankOrder):
        return RankedValue(width, dtype, rngs)
    return ContinuousValue(width, dtype, rngs)


def _codes(batch: AnyBatch) -> Array:
    if batch.codes is None:
        msg = "batch.codes must be int32 [B, L] for a model of binned or ranked values, got None"
        raise ValueError(msg)
    return jnp.asarray(batch.codes)
