"""A bidirectional transformer over a cell's expressed genes."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from sigjax.models.collate import AnyBatch, PackedBatch
from sigjax.models.config import Implementation, InputError, ModelConfig, check_implementation
from sigjax.models.tokens import LOG1P, Encoding
from sigjax.models.values import value_embedding
from sigjax.modules import SigmoidAttention

GENE_SCALE = 0.03


class Outputs(NamedTuple):
    """What the transformer gives for a batch; where rows are packed, of M cells each.

    Attributes:
        predictions: float32 [B, L], the value of each token's gene.
        embedding: float32 [B, W] or [B, M, W], one vector a cell.
        profile: float32 [B, Q] or [B, M, Q], the values of the batch's queries, from the
            embedding alone.
    """

    predictions: Array
    embedding: Array
    profile: Array


class SoftmaxAttention(nnx.Module):
    """Self-attention by jax.nn.dot_product_attention; W features, N heads."""

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        dtype: jnp.dtype,
        implementation: Literal["cudnn", "xla"] | None,
        rngs: nnx.Rngs,
    ) -> None:
        split = (num_heads, in_features // num_heads)
        self.query, self.key, self.value = (
            nnx.LinearGeneral(in_features, split, dtype=dtype, rngs=rngs) for _ in range(3)
        )
        self.out = nnx.LinearGeneral(split, in_features, axis=(-2, -1), dtype=dtype, rngs=rngs)
        self.implementation = implementation

    def __call__(
        self,
        x: Array,
        *,
        sequence_lengths: ArrayLike,
        query_segment_ids: ArrayLike | None = None,
    ) -> Array:
        """[B, L, W], int32 [B] and, where rows are packed, int32 [B, L] to [B, L, W]."""
        lengths = jnp.asarray(sequence_lengths)
        return self.out(
            jax.nn.dot_product_attention(
                self.query(x),
                self.key(x),
                self.value(x),
                mask=_same_segment(query_segment_ids),
                query_seq_lengths=lengths,
                key_value_seq_lengths=lengths,
                implementation=self.implementation,
            )
        )


class Block(nnx.Module):
    """Attention and a hidden layer, each behind a norm and beside a residual."""

    def __init__(
        self, config: ModelConfig, implementation: Implementation, *, rngs: nnx.Rngs
    ) -> None:
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.attention_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = _attention(config, implementation, rngs)
        self.hidden_norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.hidden = nnx.Linear(width, config.mlp_ratio * width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(config.mlp_ratio * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, lengths: ArrayLike, segments: ArrayLike | None = None) -> Array:
        """[B, L, W], int32 [B] and, where rows are packed, int32 [B, L] to [B, L, W]."""
        x = x + self.attention(
            self.attention_norm(x), sequence_lengths=lengths, query_segment_ids=segments
        )
        return x + self.out(jax.nn.gelu(self.hidden(self.hidden_norm(x))))


def _attention(
    config: ModelConfig, implementation: Implementation, rngs: nnx.Rngs
) -> SigmoidAttention | SoftmaxAttention:
    heads, width, dtype = config.heads, config.width, jnp.dtype(config.dtype)
    if config.attention == "sigmoid" and implementation != "cudnn":
        return SigmoidAttention(heads, width, dtype=dtype, implementation=implementation, rngs=rngs)
    if config.attention == "softmax" and implementation != "triton":
        return SoftmaxAttention(heads, width, dtype=dtype, implementation=implementation, rngs=rngs)
    msg = f"{config.attention} attention is not served by implementation {implementation!r}"
    raise InputError(msg)


class CellTransformer(nnx.Module):
    """Predicts hidden expression values of a cell from the others, and embeds cells.

    Every prediction is a bias of the gene plus a product of a vector of the gene
    with a vector of what is known: of the token and of its cell for a hidden
    value, of the cell's embedding alone for the cell's profile, which holds
    genes that are not expressed too. It is the profile that makes the embedding
    tell cell types apart: the values of expressed genes alone teach it little
    more than how deep a cell was sequenced.

    B batch, L tokens, M cells of a packed row, Q asked genes, W width, V token ids.

    Args:
        config: what the model is.
        vocabulary_size: V.
        encoding: what the model sees of values.
        implementation: what computes the attention; no part of the model, so
            that parameters trained by one serve with any other.
        rngs: for the initial parameters.

    Raises:
        InputError: the implementation does not serve config.attention.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary_size: int,
        *,
        encoding: Encoding = LOG1P,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ) -> None:
        check_implementation(config.attention, implementation)
        width, dtype = config.width, jnp.dtype(config.dtype)
        linear = partial(nnx.Linear, width, width, dtype=dtype, rngs=rngs)
        # Small before a norm: the same step of the optimiser turns a gene's vector further.
        small = nnx.initializers.normal(GENE_SCALE)
        self.gene = nnx.Embed(vocabulary_size, width, embedding_init=small, dtype=dtype, rngs=rngs)
        self.gene_norm = nnx.LayerNorm(
            width, use_bias=False, use_scale=False, dtype=dtype, rngs=rngs
        )
        self.value = value_embedding(encoding, width, dtype, rngs)
        self.mask = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (width,)))
        self.blocks = nnx.List(
            [Block(config, implementation, rngs=rngs) for _ in range(config.layers)]
        )
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.token_question, self.cell_question, self.value_answer = (linear() for _ in range(3))
        self.embedding, self.profile_answer = linear(use_bias=False), linear()
        self.value_bias = nnx.Param(jnp.zeros(vocabulary_size))
        self.profile_bias = nnx.Param(jnp.zeros(vocabulary_size))

    def __call__(self, batch: AnyBatch) -> Outputs:
        """Predictions for every token, and an embedding and a profile of every cell.

        The values at masked positions are not looked at, and nothing past a
        row's length is. The cells of a packed row do not see each other.
        """
        ids = jnp.asarray(batch.gene_ids)
        genes = self.gene_norm(self.gene(ids))
        x = genes + self._values(batch)
        segments = batch.segment_ids if isinstance(batch, PackedBatch) else None
        for block in self.blocks:
            x = block(x, batch.lengths, segments)
        x = self.norm(x)
        cell = _cell_tokens(x, batch)
        question = self.token_question(x) + _spread(self.cell_question(cell), batch)
        products = _product("blw,blw->bl", question, self.value_answer(genes))
        embedding = self.embedding(cell).astype(jnp.float32)
        return Outputs(
            products + self.value_bias[...][ids], embedding, self._profile(embedding, batch.queries)
        )

    def _values(self, batch: AnyBatch) -> Array:
        """Embedded values [B, L, W]; the mask's embedding where the value is hidden."""
        embedded = self.value(batch)
        masked = jnp.asarray(batch.masked)[..., None]
        return jnp.where(masked, self.mask[...].astype(embedded.dtype)[None, None], embedded)

    def _profile(self, embedding: Array, queries: ArrayLike) -> Array:
        """Values float32 [B, Q] or [B, M, Q] of the asked genes, from the embedding alone."""
        ids = jnp.asarray(queries)
        answers = self.profile_answer(self.gene_norm(self.gene(ids)))
        products = _product("...w,qw->...q", embedding.astype(answers.dtype), answers)
        bias = self.profile_bias[...][ids]
        return products + jnp.expand_dims(bias, tuple(range(products.ndim - 1)))


def _same_segment(segments: ArrayLike | None) -> Array | None:
    """Which pairs of tokens belong together, of int32 [B, L]: bool [B, 1, L, L]."""
    if segments is None:
        return None
    segments = jnp.asarray(segments)
    return segments[:, None, :, None] == segments[:, None, None, :]


def _cell_tokens(x: Array, batch: AnyBatch) -> Array:
    """Of tokens [B, L, W] the cells' own: [B, W], of packed rows [B, M, W]."""
    if isinstance(batch, PackedBatch):
        return jnp.take_along_axis(x, jnp.asarray(batch.starts)[..., None], axis=1)
    return x[:, 0]


def _spread(x: Array, batch: AnyBatch) -> Array:
    """Vectors of cells, [B, W] or [B, M, W], at each of their tokens: [B, 1, W] or [B, L, W]."""
    if not isinstance(batch, PackedBatch):
        return x[:, None]
    places = jnp.arange(1, x.shape[1] + 1)
    own = jnp.asarray(batch.segment_ids)[..., None] == places[None, None]
    # A product: a gather's gradient adds a cell's tokens up in no set order on a GPU.
    return jnp.einsum("blm,bmw->blw", own.astype(x.dtype), x, precision="highest")


def _product(axes: str, questions: Array, answers: Array) -> Array:
    """Inner products over the width, scaled to keep their size at any width; float32."""
    product = jnp.einsum(axes, questions, answers, preferred_element_type=jnp.float32)
    return product * questions.shape[-1] ** -0.5
