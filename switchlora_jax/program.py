"""What a resolved config compiles to: a program for each phase of its run."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from switchlora_jax import train_state
from switchlora_jax.evaluation import make_eval_step
from switchlora_jax.llama import LLaMA
from switchlora_jax.methods import METHODS, full
from switchlora_jax.methods.base import dtypes
from switchlora_jax.sharding import by_rows, placement
from switchlora_jax.train_step import make_train_step


class Program(NamedTuple):
  """Everything compiled or about to be, for one phase.

  Attributes:
    model: the LLaMA.
    create: () -> TrainState, the state before step 0, placed on the mesh.
    abstract: that state as ShapeDtypeStructs with shardings; nothing is allocated for it.
    step: see `train_step.make_train_step`. eval_step: see `evaluation.make_eval_step`.
    place: rows [batch, length] on the host, an array or a `batches.Batch`, to int32 on the mesh; a process reads
      those of its own devices.
    scale: of the adapters, s = α/r, or None where there are none.
    start: the first step of its phase.
  """

  model: LLaMA
  create: Any
  abstract: train_state.TrainState
  step: Any
  eval_step: Any
  place: Any
  scale: float | None
  start: int


def build(config, mesh) -> Program:
  """The program of the phase in which the config's own method trains."""
  return assemble(config, METHODS[config.method].build(config), mesh)


def phases(config, mesh) -> list[Program]:
  """The programs of a run in the order of their steps: full rank first where `warm_start_steps` says so."""
  main = build(config, mesh)
  return [build(full_rank(config), mesh), main] if config.warm_start_steps else [main]


def trained_by(programs: list[Program], step: int) -> Program:
  """The program that made the state before step `step`, and whose state tree it therefore has."""
  return [program for program in programs if program.start < max(step, 1)][-1]


def full_rank(config) -> FrozenConfigDict:
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


def runs_fused_attention(device) -> bool:
  """Whether a device runs cuDNN's attention: an NVIDIA GPU from Ampere on."""
  return device.platform == "gpu" and float(device.compute_capability) >= 8


def assemble(config, method, mesh) -> Program:
  """The program of a config with a given `Method`."""
  fused = runs_fused_attention(mesh.devices.flat[0])
  model = LLaMA(**config.model, dense=method.dense, remat=config.remat, fused_attention=fused, **dtypes(config))
  lies = placement(config, mesh)
  create = lambda: lies.pad(train_state.create(model, method.optimizer, config.seed, config.spike.window))
  shapes = jax.eval_shape(create)
  shardings = lies.shardings(shapes)
  step = dict(accumulation=config.accumulation, clip_norm=config.clip_norm, spike=config.spike)
  return Program(
    model=model,
    create=jax.jit(create, out_shardings=shardings),
    abstract=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings),
    step=make_train_step(model, method, lies, shapes, **step),
    eval_step=make_eval_step(model, lies, shapes),
    place=partial(place, mesh),
    scale=method.scale,
    start=config.warm_start_steps,
  )


def place(mesh, rows) -> jax.Array:
  """Rows [batch, length], an array or a `batches.Batch`, as int32 on the mesh, each device with its share.

  The batch is the same for any number of processes; each reads the rows of its own devices.
  """
  share = lambda index: np.asarray(rows[index[0]], np.int32)
  return jax.make_array_from_callback(rows.shape, by_rows(mesh), share)
