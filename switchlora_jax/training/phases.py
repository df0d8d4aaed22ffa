"""Compiled phases: what a resolved config compiles to, for each phase of its run."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from switchlora_jax.methods import METHODS, full_rank_config
from switchlora_jax.methods.base import TrainState, dtypes
from switchlora_jax.models import LLaMA, make_model
from switchlora_jax.parallel.sharding import by_rows, placement
from switchlora_jax.runs.checkpoint import Checkpoints, weights_of
from switchlora_jax.runs.directory import SavedRun
from switchlora_jax.training.anomalies import initial_spike_state
from switchlora_jax.training.evaluation import make_eval_step
from switchlora_jax.training.step import make_train_step


class Phase(NamedTuple):
  """The compiled functions of one phase; each is compiled at its first call.

  Attributes:
    model: the LLaMA.
    create: () -> TrainState, the state before step 0, placed on the mesh.
    abstract: that state as ShapeDtypeStructs with shardings; it allocates nothing.
    step: see `step.make_train_step`.
    eval_step: see `evaluation.make_eval_step`.
    shard_batch: from sequences [batch, length] on the host, an array or a `loader.Batch`, to an int32 array on the
      mesh. Each process reads the sequences of its own devices.
    scale: s = α/r, the scale of the adapters; None if there are none.
    exchanged_bytes: the largest number of bytes of candidates that one step reads, and that it writes back.
    start: the first step of the phase.
  """

  model: LLaMA
  create: Any
  abstract: TrainState
  step: Any
  eval_step: Any
  shard_batch: Any
  scale: float | None
  exchanged_bytes: int
  start: int


def build_phase(config, mesh) -> Phase:
  """The phase in which the method of the config trains."""
  return assemble_phase(config, METHODS[config.method].build(config), mesh)


def build_phases(config, mesh) -> list[Phase]:
  """The phases of a run in order: the full-rank warm start if `warm_start_steps` is set, then the method's phase."""
  main = build_phase(config, mesh)
  return [build_phase(full_rank_config(config), mesh), main] if config.warm_start_steps else [main]


def phase_at(phases: list[Phase], step: int) -> Phase:
  """The phase that produced the state before step `step`, and whose tree structure that state has."""
  return [phase for phase in phases if phase.start < max(step, 1)][-1]


def restore_phase(run: SavedRun, step: int | None, mesh, whole: bool = False):
  """The compiled phase that made a checkpoint of a run, and the state of the checkpoint on `mesh`.

  Args:
    run: as from `runs.directory.open_run`.
    step: one of `run.steps`; the newest valid one by default.
    whole: whether to restore the whole `TrainState` rather than its `runs.checkpoint.Weights`.
  Raises:
    UserError: a key is missing in the run's config, or the checkpoint cannot be restored.
  """
  with run.missing_key_as_error():
    phases = build_phases(run.config, mesh)
  part = (lambda abstract: abstract) if whole else weights_of
  with Checkpoints(run.directory / "checkpoints") as checkpoints:
    state = checkpoints.restore(lambda step: part(phase_at(phases, step).abstract), step, partial=not whole)
  return phase_at(phases, int(state.step)), state


def create_state(model, tx, seed: int, window: int) -> TrainState:
  """The state before step 0; `window` is the number of losses in the spike detector. Pure, so it can be traced."""
  variables = model.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))
  params = variables["params"]
  zero = lambda: jnp.zeros((), jnp.int32)
  return TrainState(
    step=zero(),
    params=params,
    frozen=variables.get("frozen", {}),
    candidates=variables.get("candidates", {}),
    opt_state=tx.init(params),
    skipped=zero(),
    skipped_in_a_row=zero(),
    spikes=initial_spike_state(window),
  )


def assemble_phase(config, method, mesh) -> Phase:
  """The phase of a config with a given `Method`.

  Raises:
    ValueError: the method cannot work with its optimizer; see `Method.check_optimizer`.
  """
  device = mesh.devices.flat[0]
  model = make_model(config.model, method.dense, remat=config.remat, device=device, **dtypes(config))
  layout = placement(config, mesh)
  create = lambda: layout.pad(create_state(model, method.optimizer, config.seed, config.spike.window))
  shapes = jax.eval_shape(create)
  method.check_optimizer(shapes.opt_state)
  shardings, padded = layout.shardings(shapes), config.data.packing == "pad"
  options = dict(
    accumulation=config.accumulation,
    clip_norm=config.clip_norm,
    spike=config.spike,
    rest_ratio=config.rest_learning_rate / config.learning_rate,
    weight_decay=config.optimizer.weight_decay,
    padded=padded,
  )
  return Phase(
    model=model,
    create=jax.jit(create, out_shardings=shardings),
    abstract=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings),
    step=make_train_step(model, method, layout, shapes, **options),
    eval_step=make_eval_step(model, layout, shapes, padded),
    shard_batch=partial(shard_batch, mesh),
    scale=method.scale,
    exchanged_bytes=method.exchanged_bytes(shapes.candidates),
    start=config.warm_start_steps,
  )


def shard_batch(mesh, rows) -> jax.Array:
  """Place sequences [batch, length], an array or a `loader.Batch`, on the mesh as int32, sharded over all devices.

  The batch is the same for any number of processes. Each process reads the sequences of its own devices.
  """
  shard = lambda index: np.asarray(rows[index[0]], np.int32)
  return jax.make_array_from_callback(rows.shape, by_rows(mesh), shard)
