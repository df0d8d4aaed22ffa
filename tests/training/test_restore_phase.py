"""Restoring a checkpoint of another run with its compiled phase: only its weights, or its complete state."""

import json

import jax
import pytest
from small_model import same_bits
from stages import slowly
from tiny import resolved

from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.runs.checkpoint import Checkpoints
from switchlora_jax.runs.directory import open_run
from switchlora_jax.training import phases
from switchlora_jax.training.phases import restore_phase

pytestmark = pytest.mark.two_linear_layers


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(directory, state after step 7) of a saved run without training. Its full-rank phase ends at step 5."""
  folder = tmp_path_factory.mktemp("run")
  config = resolved(folder, warm_start_steps=5, candidates_dtype="bfloat16")
  saved = {"config": config.to_dict(), "data_fingerprint": "abc", "devices": "8 × cpu"}
  saved |= {"git_revision": None, "versions": {}}
  (folder / "config.json").write_text(json.dumps(saved))
  (folder / "tokenizer.model").write_bytes(b"pieces")
  first, state = (phase.create() for phase in phases.build_phases(config, make_mesh()))
  with Checkpoints(folder / "checkpoints", keep=2) as checkpoints:
    checkpoints.save(4, first._replace(step=first.step + 4))
    checkpoints.save(7, state._replace(step=state.step + 7))
  return folder, state


@pytest.mark.parametrize("devices", slowly([1, 8], quick=[8]))
def test_only_the_weights_are_restored(run, devices):
  phase, state = restore_phase(open_run(run[0]), None, make_mesh(jax.devices()[:devices]))
  assert (int(state.step), phase.start) == (7, 5)
  assert same_bits((state.params, state.frozen), (run[1].params, run[1].frozen))
  assert len(jax.tree.leaves(run[1].candidates)) > 0 < len(jax.tree.leaves(run[1].opt_state))
  assert set(state._fields) == {"step", "params", "frozen"}


def test_the_complete_state_is_restored_on_request(run):
  _, state = restore_phase(open_run(run[0]), None, make_mesh(), whole=True)
  assert same_bits(state, run[1]._replace(step=run[1].step + 7))


def test_a_step_of_the_full_rank_phase_is_restored_with_that_phase(run):
  phase, state = restore_phase(open_run(run[0]), 4, make_mesh())
  assert (int(state.step), phase.start, phase.scale, state.frozen) == (4, 0, None, {})
