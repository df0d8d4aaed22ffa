"""The sparse part of SLTrain: its support does not change in training, and its settings are checked."""

import jax
import numpy as np
import pytest
import small_model
from small_model import host, same_bits

from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.parallel.sharding import replicated
from switchlora_jax.runs.checkpoint import Checkpoints

pytestmark = pytest.mark.two_linear_layers


def config(**changes):
  return small_model.config("sltrain", sltrain__density=0.2, **changes)


@pytest.mark.slow
def test_layers_have_their_own_support_which_does_not_change_in_training_and_is_restored(tmp_path):
  """The checkpoint is restored into a state of another seed, whose support differs."""
  phase = small_model.phase(config(), 1)
  first = host(phase.create())
  state = jax.device_put(first, replicated(small_model.mesh(1)))
  for t in range(3):
    state, _ = phase.step(state, small_model.shard_batch(small_model.rows(config(), t), 1))
  assert same_bits(state.frozen, first.frozen)
  supports = [layer["sparse_support"] for layer in first.frozen["blocks"].values()]
  assert {x.shape for x in supports} == {(2, 77)} and {x.dtype for x in supports} == {np.dtype("int32")}
  rows = [row for stack in supports for row in stack]
  assert all(not np.array_equal(x, y) for i, x in enumerate(rows) for y in rows[:i])

  other = small_model.phase(config(seed=1), 1)
  assert not same_bits(host(other.create()).frozen, first.frozen)
  with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
    checkpoints.save(3, state)
    checkpoints.wait()
    restored = checkpoints.restore(lambda _: other.abstract)
  assert same_bits(restored.frozen, first.frozen) and same_bits(restored.params, state.params)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1])
def test_a_density_that_is_no_share_is_refused(density):
  with pytest.raises(UserError, match=r"sltrain\.density \(=.*\) must be greater than 0 and at most 1; set --config"):
    resolve(small_model.config("sltrain", fill=False, sltrain__density=density), 1)
