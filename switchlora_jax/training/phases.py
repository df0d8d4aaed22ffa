"""What a resolved config compiles to: a program for each phase of its run."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from switchlora_jax.methods import METHODS, full
from switchlora_jax.methods.base import TrainState, dtypes
from switchlora_jax.models import LLaMA, make_model
from switchlora_jax.parallel.sharding import by_rows, placement
from switchlora_jax.training.anomalies import initial_spike_state
from switchlora_jax.training.evaluation import make_eval_step
from switchlora_jax.training.step import make_train_step


class Phase(NamedTuple):
  """Everything compiled or about to be, for one phase.

  Attributes:
    model: the LLaMA.
    create: () -> TrainState, the state before step 0, placed on the mesh.
    abstract: that state as ShapeDtypeStructs with shardings; nothing is allocated for it.
    step: see `train_step.make_train_step`. eval_step: see `evaluation.make_eval_step`.
    shard_batch: rows [batch, length] on the host, an array or a `loader.Batch`, to int32 on the mesh; a process reads
      those of its own devices.
    scale: of the adapters, s = α/r, or None where there are none.
    start: the first step of its phase.
  """

  model: LLaMA
  create: Any
  abstract: TrainState
  step: Any
  eval_step: Any
  shard_batch: Any
  scale: float | None
  start: int


def build_phase(config, mesh) -> Phase:
  """The program of the phase in which the config's own method trains."""
  return assemble_phase(config, METHODS[config.method].build(config), mesh)


def build_phases(config, mesh) -> list[Phase]:
  """The programs of a run in the order of their steps: full rank first where `warm_start_steps` says so."""
  main = build_phase(config, mesh)
  return [build_phase(full_rank_config(config), mesh), main] if config.warm_start_steps else [main]


def phase_at(phases: list[Phase], step: int) -> Phase:
  """The program that made the state before step `step`, and whose state tree it therefore has."""
  return [phase for phase in phases if phase.start < max(step, 1)][-1]


def full_rank_config(config) -> FrozenConfigDict:
  """The config of the full-rank phase, over the same horizon as the run.

  Learning rate and warm-up are those of `warm_start_learning_rate` and `warm_start_warmup_steps`; the end of the
  cosine is full's own whatever `min_lr_ratio` says, which is of what comes after (GaLore's 0.1 by default).
  """
  plain = config.to_dict() | {
    "method": "full",
    "learning_rate": config.warm_start_learning_rate,
    "warmup_steps": config.warm_start_warmup_steps,
    "min_lr_ratio": full.MIN_LR_RATIO,
    "warm_start_steps": 0,
  }
  return FrozenConfigDict(plain)


def create_state(model, tx, seed: int, window: int) -> TrainState:
  """The state before step 0, for a `window` of losses. Pure: under `jax.eval_shape` it allocates nothing."""
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
  """The program of a config with a given `Method`."""
  device = mesh.devices.flat[0]
  model = make_model(config.model, method.dense, remat=config.remat, device=device, **dtypes(config))
  lies = placement(config, mesh)
  create = lambda: lies.pad(create_state(model, method.optimizer, config.seed, config.spike.window))
  shapes = jax.eval_shape(create)
  shardings = lies.shardings(shapes)
  step = dict(accumulation=config.accumulation, clip_norm=config.clip_norm, spike=config.spike)
  return Phase(
    model=model,
    create=jax.jit(create, out_shardings=shardings),
    abstract=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings),
    step=make_train_step(model, method, lies, shapes, **step),
    eval_step=make_eval_step(model, lies, shapes),
    shard_batch=partial(shard_batch, mesh),
    scale=method.scale,
    start=config.warm_start_steps,
  )


def shard_batch(mesh, rows) -> jax.Array:
  """Rows [batch, length], an array or a `loader.Batch`, as int32 on the mesh, each device with its share.

  The batch is the same for any number of processes; each reads the rows of its own devices.
  """
  share = lambda index: np.asarray(rows[index[0]], np.int32)
  return jax.make_array_from_callback(rows.shape, by_rows(mesh), share)
