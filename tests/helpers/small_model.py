"""A LLaMA of a few thousand numbers and its train step, without text, files or a trainer."""

import flax.linen as nn
import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

from configs.base import get_config
from switchlora_jax.config import fill_defaults
from switchlora_jax.methods.base import TrainState
from switchlora_jax.models import llama
from switchlora_jax.parallel.sharding import by_rows, make_mesh
from switchlora_jax.training import phases


class TwoLinearBlock(llama.Block):
  """A block of `up` and `down` alone, without attention; for modules marked `two_linear_layers`.

  A step of this model compiles in half the time of LLaMA's, whose blocks have seven linear layers. Switching, the
  optimizer and sharding map over the kinds of linear layers; here they map over two kinds, of different shapes.
  """

  @nn.compact
  def __call__(self, x, angles):
    hidden = nn.silu(self._linear("up", self.architecture.intermediate_size, self._norm("mlp_norm")(x)))
    return x + self._linear("down", x.shape[-1], hidden), None


def config(method="switchlora", fill=True, **changes):
  """The base config with a small model that switches often; `changes` by key, `__` for a dot.

  Unset keys are filled in as in a run, unless `fill` is false.
  """
  small = get_config()
  small.update(method=method, rank=4, steps=100, batch_size=16, seq_len=8)
  small.update(learning_rate=1e-2, min_lr_ratio=0.0, warmup_steps=0)
  small.model.update(vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
  small.switch.update(interval=4, freeze_steps=2)
  small.sharding.candidates = "replicated"  # as all else: a state can be put on any devices as it is
  small.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return fill_defaults(small) if fill else small


def mesh(devices: int, fsdp: int = 1) -> jax.sharding.Mesh:
  """The first so many devices."""
  return make_mesh(jax.devices()[:devices], fsdp)


def phase(config, devices: int) -> phases.Phase:
  """What the config compiles to on so many devices."""
  return phases.build_phase(config, mesh(devices, config.sharding.fsdp))


def model(config):
  """The model of a config."""
  return phase(config, 1).model


def step(config, devices: int):
  """The jitted train step on so many devices."""
  return phase(config, devices).step


def first_state(config, devices: int) -> TrainState:
  """The state before step 0, placed on so many devices."""
  return phase(config, devices).create()


def shard_batch(rows, devices: int) -> jax.Array:
  """Rows [batch, length], split over so many devices."""
  return jax.device_put(np.asarray(rows, np.int32), by_rows(mesh(devices)))


def rows(config, step: int) -> np.ndarray:
  """Token ids of the batch of a step, [batch, length]."""
  return np.random.default_rng(step).integers(0, config.model.vocab_size, (config.batch_size, config.seq_len))


def equations(jaxpr):
  """All equations of a jaxpr, those of its inner jaxprs included."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)


def host(tree):
  """A copy in numpy, which a donated tree cannot take along."""
  return jax.tree.map(np.array, tree)


def same_bits(left, right) -> bool:
  """Whether two trees hold the same bytes under the same names; a NaN is itself."""
  left, right = (jax.tree.leaves_with_path(host(tree)) for tree in (left, right))
  return [path for path, _ in left] == [path for path, _ in right] and all(
    x.tobytes() == y.tobytes() for (_, x), (_, y) in zip(left, right, strict=True)
  )
