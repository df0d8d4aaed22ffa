"""Programs that the tests of a file share: compiling takes most of their time, and a program holds no state.

conftest.py puts `build` and `make_learnt_rank` in place of the package's. `build.__wrapped__` makes a new phase.
"""

import functools
import hashlib
import os
import pickle
from pathlib import Path

import compiled_programs
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from configs.base import get_config
from switchlora_jax.analysis import ranks
from switchlora_jax.models.llama import LLaMA
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.runs.directory import FREE, LAYOUT, flatten
from switchlora_jax.training import phases
from switchlora_jax.training import step as train_step

# What, with `data` but for its packing, no program reads: one that did would see the values of configs/base.py, and a
# test would fail.
NOT_COMPILED = ("eval_tokens", "warm_start_from", *(key for key in FREE if key not in LAYOUT))


@functools.cache
def _build(config, mesh, *_):
  phase = _new(config, mesh)
  return phase._replace(create=Create(config, phase))


class Create:
  """`Phase.create`, whose program takes long to compile and has no arguments: a session runs it once.

  The state is created on one device, then padded and placed. test_sharding.py compares it with that of the program.

  Attributes:
    program: the `create` of the phase itself.
  """

  def __init__(self, config, phase):
    self.program, self._config, self._abstract = phase.create, config, phase.abstract

  def __call__(self):
    if not self._outside_of_traces():
      return self.program()

    def placed(array, like):
      whole = np.zeros(like.shape, like.dtype)
      whole[tuple(map(slice, array.shape))] = array
      return jax.device_put(whole, like.sharding)

    likes, structure = jax.tree.flatten(self._abstract)
    return structure.unflatten(map(placed, self._arrays, likes))

  def _outside_of_traces(self) -> bool:
    return not isinstance(jnp.zeros(()), jax.core.Tracer)

  @functools.cached_property
  def _arrays(self) -> list[np.ndarray]:
    """The arrays of the state, without padding."""
    plain, one = ConfigDict(self._config.to_dict()), make_mesh(jax.devices()[:1])
    plain.sharding.update(fsdp=1, candidates="replicated")
    with jax.set_mesh(one):
      lowered = _new(FrozenConfigDict(plain), one).create.lower()
      text = f"{lowered.as_text()}{jax.config.values['jax_disable_most_optimizations']}"
      file = Path(compiled_programs.FOLDER, hashlib.sha256(text.encode()).hexdigest() + ".pickle")
      if not file.exists():
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_bytes(pickle.dumps(jax.device_get(jax.tree.leaves(lowered.compile()()))))
        partial.replace(file)
    return pickle.loads(file.read_bytes())


_new = phases.build_phase


@functools.wraps(_new)
def build(config, mesh):
  """`program.build`, once for configs that differ in what is not compiled; again under what a test has patched."""
  base, plain = flatten(get_config()), ConfigDict(config.to_dict())
  unread = [key for key in base if key in NOT_COMPILED or (key.startswith("data.") and key != "data.packing")]
  plain.update_from_flattened_dict({key: base[key] for key in unread})
  patched = (jax.config.jax_enable_x64, train_step.mean_loss, phases.make_train_step, LLaMA.block_class)
  return _build(FrozenConfigDict(plain), mesh, *patched)


_new_rank, _ranks = ranks.make_learnt_rank, {}


@functools.wraps(_new_rank)
def make_learnt_rank(first):
  """`analysis.make_learnt_rank`, once for each program, which contains that of `create`."""
  if isinstance(first.create, Create):
    first = first._replace(create=first.create.program)
  return _ranks.setdefault(first.create, _new_rank(first))


def forget():
  """Let go of all of them: they are large."""
  _build.cache_clear()
  _ranks.clear()
