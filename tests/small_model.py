"""A LLaMA of a few thousand numbers and its train step, without text, files or a trainer."""

import jax
import jax.numpy as jnp
import numpy as np

from configs.base import get_config
from switchlora_jax import train_state
from switchlora_jax.llama import LLaMA
from switchlora_jax.methods import METHODS
from switchlora_jax.sharding import DATA, by_rows, replicated
from switchlora_jax.train_step import make_train_step


def config(method="switchlora", **changes):
  """The base config with a small model that switches often; `changes` by key, `__` for a dot."""
  small = get_config()
  small.update(method=method, rank=4, steps=100, batch_size=16, seq_len=8)
  small.update(learning_rate=1e-2, min_lr_ratio=0.0, warmup_steps=0)
  small.model.update(vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
  small.switch.update(interval=4, freeze_steps=2)
  small.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  small.dtype, small.frozen_dtype = small.dtype or "float32", small.frozen_dtype or small.param_dtype
  return small


def mesh(devices: int) -> jax.sharding.Mesh:
  """The first so many devices, as `sharding.make_mesh` lays out all of them."""
  axis_types = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((devices,), (DATA,), axis_types=axis_types, devices=jax.devices()[:devices])


def model(config) -> LLaMA:
  """The model of a config."""
  dtypes = dict(dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.param_dtype))
  return LLaMA(**config.model, dense=METHODS[config.method].build(config).dense, remat=config.remat, **dtypes)


def step(config, devices: int):
  """The jitted train step on so many devices."""
  method = METHODS[config.method].build(config)
  options = dict(accumulation=config.accumulation, clip_norm=config.clip_norm)
  return make_train_step(model(config), method, mesh(devices), **options)


def first_state(config, devices: int) -> train_state.TrainState:
  """The state before step 0, a copy on each of so many devices."""
  create = lambda: train_state.create(model(config), _optimizer(config), config.seed)
  return jax.jit(create, out_shardings=replicated(mesh(devices)))()


def place(rows, devices: int) -> jax.Array:
  """Rows [batch, length], split over so many devices."""
  return jax.device_put(np.asarray(rows, np.int32), by_rows(mesh(devices)))


def _optimizer(config):
  return METHODS[config.method].build(config).optimizer


def rows(config, step: int) -> np.ndarray:
  """Token ids of the batch of a step, [batch, length]."""
  return np.random.default_rng(step).integers(0, config.model.vocab_size, (config.batch_size, config.seq_len))


def host(tree):
  """A copy in numpy, which a donated tree cannot take along."""
  return jax.tree.map(np.array, tree)


def same_bits(left, right) -> bool:
  """Whether two trees hold the same bytes under the same names; a NaN is itself."""
  left, right = (jax.tree.leaves_with_path(host(tree)) for tree in (left, right))
  return [path for path, _ in left] == [path for path, _ in right] and all(
    x.tobytes() == y.tobytes() for (_, x), (_, y) in zip(left, right, strict=True)
  )
