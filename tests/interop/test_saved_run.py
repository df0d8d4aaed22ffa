"""Of a run that is only read, the weights come back and nothing else does."""

import json
import shutil

import jax
import pytest
from small_model import same_bits
from tiny import resolved

from switchlora_jax.errors import UserError
from switchlora_jax.interop import saved_run
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs.checkpoint import Checkpoints
from switchlora_jax.training import phases


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(directory, state after step 7) of a run of which no step was made; its warm start ends at step 5."""
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


def test_it_says_what_the_directory_holds(run):
  found = saved_run.open_run(run[0])
  assert (found.fingerprint, found.devices, found.revision, found.steps) == ("abc", 8, None, [4, 7])
  assert found.config.to_dict() == run_directory.read(run[0])["config"]
  assert found.tokenizer.read_bytes() == b"pieces"


@pytest.mark.parametrize("devices", [1, 8])
def test_the_weights_come_back_and_nothing_else_does(run, devices):
  found = saved_run.open_run(run[0])
  made, state = saved_run.restore(found, None, make_mesh(jax.devices()[:devices]))
  assert (int(state.step), made.start) == (7, 5)
  assert same_bits((state.params, state.frozen), (run[1].params, run[1].frozen))
  assert len(jax.tree.leaves(run[1].candidates)) > 0 < len(jax.tree.leaves(run[1].opt_state))
  assert jax.tree.leaves((state.candidates, state.opt_state)) == []


def test_the_whole_state_comes_back_where_it_is_wanted(run):
  _, state = saved_run.restore(saved_run.open_run(run[0]), None, make_mesh(), whole=True)
  assert same_bits(state, run[1]._replace(step=run[1].step + 7))


def test_a_step_of_the_warm_start_comes_with_its_own_program(run):
  made, state = saved_run.restore(saved_run.open_run(run[0]), 4, make_mesh())
  assert (int(state.step), made.start, made.scale, state.frozen) == (4, 0, None, {})


def test_a_step_that_was_not_saved_is_refused(run):
  found = saved_run.open_run(run[0])
  found.check_step(4, "--step")
  with pytest.raises(UserError, match=r"--step \(=5\) must be .*: 4, 7; name one of them"):
    found.check_step(5, "--step")


def test_what_is_no_run_is_refused(run, tmp_path):
  copy = shutil.copytree(run[0], tmp_path / "copy")
  (copy / "tokenizer.model").unlink()
  for folder in (copy, tmp_path / "none"):
    with pytest.raises(UserError, match=f"^{folder} must be the directory of a run"):
      saved_run.open_run(folder)
