"""The model: what it may see, what it must ignore, and which attention it runs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sigjax.models.collate import FILLER, Batch
from sigjax.models.config import Attention, InputError, ModelConfig
from sigjax.models.transformer import CellTransformer, Outputs
from sigjax.models.vocabulary import CELL_TOKEN, RESERVED

GENES, LENGTHS = 40, (9, 16, 0)
CONFIG = ModelConfig(layers=1, width=16, heads=2)
ATTENTIONS = pytest.mark.parametrize("attention", ["sigmoid", "softmax"])


def batch(length=16, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = np.array(LENGTHS, np.int32)
    shape = (len(lengths), length)
    inside = np.arange(length) < lengths[:, None]
    genes = inside & (np.arange(length) > 0)
    drawn = np.array([rng.permutation(GENES)[:16] for _ in lengths]) + RESERVED
    gene_ids = np.zeros(shape, np.int32)
    gene_ids[:, :16] = drawn
    gene_ids[:, 0] = CELL_TOKEN
    values = np.zeros(shape, np.float32)
    values[:, :16] = rng.uniform(0.5, 5, (len(lengths), 16))
    masked = np.zeros(shape, bool)
    masked[:, :16] = rng.random((len(lengths), 16)) < 0.3
    queries = np.arange(RESERVED, RESERVED + 8, dtype=np.int32)
    return Batch(
        np.where(inside, gene_ids, 0),
        np.where(genes, values, 0),
        genes & masked,
        lengths,
        np.array([0, 1, FILLER], np.int32),
        queries,
        np.zeros((len(lengths), 8), np.float32),
    )


def model(attention: Attention = "sigmoid", seed: int = 0, **changes) -> CellTransformer:
    config = replace(CONFIG, attention=attention, **changes)
    return CellTransformer(config, GENES + RESERVED, rngs=nnx.Rngs(seed))


@nnx.jit
def apply(module: CellTransformer, x: Batch) -> Outputs:
    return module(x)


def valid(outputs: Outputs, x: Batch) -> list[np.ndarray]:
    """Predictions of tokens before their row's length."""
    return [np.asarray(p)[:n] for p, n in zip(outputs.predictions, x.lengths, strict=True)]


@ATTENTIONS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_are_float32_and_parameters_stay_float32(attention, dtype):
    module, x = model(attention, dtype=dtype), batch()
    outputs = apply(module, x)
    assert [y.shape for y in outputs] == [(3, 16), (3, CONFIG.width), (3, 8)]
    assert {y.dtype for y in outputs} == {jnp.dtype("float32")}
    assert {p.dtype for p in jax.tree.leaves(nnx.state(module))} == {jnp.dtype("float32")}


@ATTENTIONS
def test_a_masked_value_is_never_seen(attention):
    module, x = model(attention), batch()
    changed = x._replace(values=np.where(x.masked, 99, x.values).astype(np.float32))
    for ours, theirs in zip(apply(module, x), apply(module, changed), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@ATTENTIONS
def test_a_seen_value_changes_the_predictions(attention):
    module, x = model(attention), batch()
    values = x.values.copy()
    values[1, np.flatnonzero(~x.masked[1])[1]] += 1
    before, after = apply(module, x), apply(module, x._replace(values=values))
    assert not np.allclose(before.predictions[1], after.predictions[1])
    np.testing.assert_array_equal(before.predictions[0, :9], after.predictions[0, :9])


@ATTENTIONS
def test_a_row_ignores_its_padding(attention):
    module, x = model(attention), batch()
    past = np.arange(16) >= x.lengths[:, None]
    changed = x._replace(
        gene_ids=np.where(past, RESERVED + 5, x.gene_ids),
        values=np.where(past, 3, x.values).astype(np.float32),
    )
    ours, theirs = apply(module, x), apply(module, changed)
    for a, b in zip(valid(ours, x), valid(theirs, x), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(ours.embedding[:2], theirs.embedding[:2])


@ATTENTIONS
def test_a_row_is_the_same_in_a_longer_bucket(attention):
    module, short, long = model(attention), batch(16), batch(32)
    ours, theirs = apply(module, short), apply(module, long)
    for a, b in zip(valid(ours, short), valid(theirs, long), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.embedding[:2], theirs.embedding[:2], rtol=1e-4, atol=1e-5)


@ATTENTIONS
def test_a_cell_is_a_set_the_order_of_its_genes_does_not_matter(attention):
    module, x = model(attention), batch()
    order = np.arange(16)
    order[1:9] = order[1:9][::-1]
    turned = x._replace(
        **{name: getattr(x, name)[:, order] for name in ("gene_ids", "values", "masked")}
    )
    ours, theirs = apply(module, x), apply(module, turned)
    np.testing.assert_allclose(ours.predictions[0, order[:9]], theirs.predictions[0, :9], atol=1e-5)
    np.testing.assert_allclose(ours.embedding[0], theirs.embedding[0], atol=1e-5)


@ATTENTIONS
def test_gradients_are_finite_beside_rows_that_fill_up(attention):
    x = batch()
    gradient = nnx.jit(nnx.grad(lambda m: sum(jnp.sum(y**2) for y in m(x))))(model(attention))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
    assert any(np.any(g) for g in jax.tree.leaves(gradient))


def test_the_profile_depends_on_the_embedding_alone():
    module, x = model(), batch()
    again = apply(module, x._replace(queries=x.queries[::-1].copy()))
    np.testing.assert_allclose(apply(module, x).profile, again.profile[:, ::-1], rtol=1e-5)


def test_one_switch_swaps_the_attention_and_nothing_else():
    shapes = [
        jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(model(attention))))
        for attention in ("sigmoid", "softmax")
    ]
    assert shapes[0] == shapes[1]
    ours, theirs = (apply(model(attention), batch()) for attention in ("sigmoid", "softmax"))
    assert not np.allclose(ours.predictions, theirs.predictions)


def test_the_seed_alone_decides_the_parameters():
    ours, again, other = (model(seed=seed) for seed in (1, 1, 2))
    leaves = (jax.tree.leaves(nnx.state(module)) for module in (ours, again))
    assert all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))
    assert not np.array_equal(ours.mask[...], other.mask[...])


def test_the_implementation_reaches_the_op():
    module = CellTransformer(CONFIG, GENES + RESERVED, implementation="triton", rngs=nnx.Rngs(0))
    if jax.default_backend() == "gpu":
        pytest.skip("the Triton path runs here")
    with pytest.raises(NotImplementedError, match="triton"):
        nnx.eval_shape(lambda x: module(x), batch())


@pytest.mark.parametrize(
    ("attention", "implementation"), [("sigmoid", "cudnn"), ("softmax", "triton")]
)
def test_an_implementation_of_the_other_attention_is_refused(attention, implementation):
    with pytest.raises(InputError, match="must be one of"):
        CellTransformer(
            replace(CONFIG, attention=attention),
            GENES,
            implementation=implementation,
            rngs=nnx.Rngs(0),
        )
