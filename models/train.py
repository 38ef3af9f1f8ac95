"""Training: optax AdamW with warm-up and cosine, one compiled step a static shape."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from sigjax.models.collate import AnyBatch, Batch
from sigjax.models.config import Implementation, ModelConfig, TrainConfig
from sigjax.models.feed import Fed
from sigjax.models.losses import masked_error, masked_loss, profile_loss
from sigjax.models.tokens import LOG1P, Encoding
from sigjax.models.transformer import CellTransformer

# Losses are fetched this many steps late, so that the host never waits for the device.
LAG = 10


class NonFiniteLossError(ArithmeticError):
    """The loss of a step is NaN or infinite."""


class TrainState(NamedTuple):
    """All that a training run carries: plain arrays in nested dicts and tuples.

    Attributes:
        params: the model's parameters, float32.
        opt_state: the optimiser's.
        step: int32 scalar, steps done.
    """

    params: dict[str, Any]
    opt_state: optax.OptState
    step: Array


class StepRecord(NamedTuple):
    """One step of a training run.

    Attributes:
        step: its number, from 1.
        loss: masked-expression loss of its batch.
        learning_rate: the optimiser's.
        gradient_norm: global norm before clipping.
        cells: cells seen so far in this run.
        seconds: since this run began.
        waited: of these, spent waiting for batches: an upper bound of what the device waited,
            which has steps queued meanwhile.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    cells: int
    seconds: float
    waited: float


class Biases(NamedTuple):
    """Where the genes' biases begin: at the means of the training cells, float32 [V] each."""

    value_bias: np.ndarray
    profile_bias: np.ndarray


@dataclass(frozen=True)
class Model:
    """A model as a pure function: what jax.jit sees.

    Attributes:
        graph: structure of a CellTransformer.
        optimizer: changes its parameters.
        schedule: learning rate of a step.
        profile_weight: weight of the profile's loss.
    """

    graph: nnx.GraphDef[CellTransformer]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    profile_weight: float

    def apply(self, params: dict[str, Any]) -> CellTransformer:
        """The module with these parameters."""
        return nnx.merge(self.graph, params)

    def loss(self, params: dict[str, Any], batch: AnyBatch) -> tuple[Array, Array]:
        """What training lowers, and of it the masked-expression loss."""
        outputs = self.apply(params)(batch)
        loss = masked_loss(outputs.predictions, batch.values, batch.masked)
        profile = profile_loss(outputs.profile, batch.query_values, batch.real)
        return loss + self.profile_weight * profile, loss


def build(
    config: ModelConfig,
    vocabulary_size: int,
    training: TrainConfig,
    implementation: Implementation = None,
    biases: Biases | None = None,
    encoding: Encoding = LOG1P,
) -> tuple[Model, TrainState]:
    """A model and its state before the first step, by training.seed.

    Args:
        config: of the model.
        vocabulary_size: V.
        training: its optimiser and seed.
        implementation: what computes the attention.
        biases: where the genes' biases begin; None is at 0.
        encoding: what the model sees of values.

    Raises:
        InputError: the implementation does not serve config.attention.
    """
    module = CellTransformer(
        config,
        vocabulary_size,
        encoding=encoding,
        implementation=implementation,
        rngs=nnx.Rngs(training.seed),
    )
    graph, state = nnx.split(module)
    params = nnx.to_pure_dict(state)
    if biases is not None:
        params |= {name: jnp.asarray(value) for name, value in biases._asdict().items()}
    optimizer, schedule = make_optimizer(training)
    start = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    return Model(graph, optimizer, schedule, training.profile_weight), start


def make_optimizer(
    config: TrainConfig,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW behind clipping by the global norm; weight decay acts on matrices only."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=max(1, round(config.warmup_share * config.steps)),
        decay_steps=max(2, config.steps),
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b2=0.98,
            weight_decay=config.weight_decay,
            mask=partial(jax.tree.map, lambda x: x.ndim > 1),
        ),
    )
    return optimizer, schedule


class Trainer:
    """Runs compiled steps, one compilation a static shape.

    Args:
        model: what is trained.

    Attributes:
        compiled: the (B, L) for which a training step was compiled, in order.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.compiled: list[tuple[int, int]] = []
        self._ready: dict[tuple[int, int], jax.stages.Compiled] = {}
        self._step = jax.jit(self._update, donate_argnums=0)
        self._error = jax.jit(self._masked_error)

    def step(self, state: TrainState, batch: AnyBatch) -> tuple[TrainState, Array, Array]:
        """One optimiser step: the new state (the old one is used up), loss, gradient norm."""
        step = self._ready.get(np.shape(batch.gene_ids), self._step)
        return step(state, batch)

    def compile_ahead(
        self,
        state: TrainState,
        batches: Sequence[AnyBatch],
        workers: int,
        said: Callable[[tuple[int, int], float], None] = lambda *_: None,
    ) -> None:
        """Compiles the step for the shapes of batches, several at a time.

        Args:
            state: any state of the model; it is not used up.
            batches: one of each shape, such as BatchStream.blanks.
            workers: how many are compiled side by side, at least 1.
            said: called with each (B, L) as it is ready, and the seconds that it took.

        Raises:
            ValueError: workers is below 1.
        """
        if workers < 1:
            msg = f"workers must be at least 1, got {workers}"
            raise ValueError(msg)

        def ready(batch: AnyBatch) -> tuple[tuple[int, int], jax.stages.Compiled, float]:
            began = time.perf_counter()
            shapes = jax.tree.map(_shape_of, (state, batch))
            compiled = self._step.lower(*shapes).compile()
            return np.shape(batch.gene_ids), compiled, time.perf_counter() - began

        with ThreadPoolExecutor(workers) as pool:
            for future in as_completed([pool.submit(ready, batch) for batch in batches]):
                shape, self._ready[shape], seconds = future.result()
                said(shape, seconds)

    def masked_error(self, params: dict[str, Any], batch: Batch) -> tuple[Array, Array]:
        """Sum of squared errors of a batch and number of its masked values."""
        return self._error(params, batch)

    def _update(self, state: TrainState, batch: AnyBatch) -> tuple[TrainState, Array, Array]:
        # Python runs this body only while JAX traces it: once a shape.
        self.compiled.append(np.shape(batch.gene_ids))
        slope = jax.value_and_grad(self.model.loss, has_aux=True)
        (_, loss), gradients = slope(state.params, batch)
        updates, opt_state = self.model.optimizer.update(gradients, state.opt_state, state.params)
        params = cast("dict[str, Any]", optax.apply_updates(state.params, updates))
        return TrainState(params, opt_state, state.step + 1), loss, optax.tree.norm(gradients)

    def _masked_error(self, params: dict[str, Any], batch: Batch) -> tuple[Array, Array]:
        outputs = self.model.apply(params)(batch)
        return masked_error(outputs.predictions, batch.values, batch.masked)


def _shape_of(x: Array | np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype)


@dataclass(frozen=True)
class Hooks:
    """What a caller of train wants to hear and do.

    Attributes:
        stepped: called with each step's record, some steps late.
        evaluated: called with a step's number and the state after it, before the first step, every
            evaluate_every steps and after the last.
        saved: called with the state and that of the batches behind it, every checkpoint_every
            steps and after the last.
    """

    stepped: Callable[[StepRecord], None] = lambda _: None
    evaluated: Callable[[int, TrainState], None] = lambda *_: None
    saved: Callable[[TrainState, dict[str, Any]], None] = lambda *_: None


def train(
    trainer: Trainer,
    state: TrainState,
    batches: grain.DatasetIterator[Fed],
    config: TrainConfig,
    hooks: Hooks | None = None,
) -> TrainState:
    """Trains from state up to config.steps.

    A run that was cut goes on as if it had not been with what hooks.saved was last
    given: the state, and feed(stream, of its batches).

    Args:
        trainer: of the model.
        state: the start; it is used up.
        batches: from feed, behind the last batch of state.
        config: number of steps and when to evaluate and save.
        hooks: what the caller wants to hear.

    Raises:
        NonFiniteLossError: with the step's number; nothing is saved after it.
    """
    hooks = hooks or Hooks()
    first = int(state.step)
    pending = _Pending(hooks.stepped, trainer.model.schedule)
    hooks.evaluated(first, state)
    for step in range(first + 1, config.steps + 1):
        batch, cells = pending.timed(batches)
        state, loss, norm = trainer.step(state, batch)
        pending.add(step, loss, norm, cells)
        last = step == config.steps
        evaluate = last or step % config.evaluate_every == 0
        save = last or (config.checkpoint_every and step % config.checkpoint_every == 0)
        if evaluate or save:
            pending.flush(keep=0)
        if evaluate:
            hooks.evaluated(step, state)
        if save:
            hooks.saved(state, batches.get_state())
    return state


class _Pending:
    """Losses that are still on the device."""

    def __init__(self, stepped: Callable[[StepRecord], None], schedule: optax.Schedule) -> None:
        self._stepped = stepped
        self._schedule = schedule
        self._waiting: list[tuple[int, Array, Array, int, float]] = []
        self._cells, self._waited = 0, 0.0
        self._began = time.perf_counter()

    def timed(self, batches: grain.DatasetIterator[Fed]) -> Fed:
        """The next batch; the wait for it counts."""
        began = time.perf_counter()
        fed = next(batches)
        self._waited += time.perf_counter() - began
        return fed

    def add(self, step: int, loss: Array, norm: Array, cells: int) -> None:
        self._cells += cells
        self._waiting.append((step, loss, norm, self._cells, self._waited))
        self.flush(keep=LAG)

    def flush(self, keep: int) -> None:
        """Reports all but the last keep losses."""
        while len(self._waiting) > keep:
            step, loss, norm, cells, waited = self._waiting.pop(0)
            value = float(loss)
            if not np.isfinite(value):
                msg = (
                    f"the loss of step {step} is {value}; lower the learning rate or clip_norm, "
                    "or compute in float32"
                )
                raise NonFiniteLossError(msg)
            seconds = time.perf_counter() - self._began
            rate = float(jnp.asarray(self._schedule(step - 1)))
            self._stepped(StepRecord(step, value, rate, float(norm), cells, seconds, waited))
