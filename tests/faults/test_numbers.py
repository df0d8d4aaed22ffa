"""Numbers that are not finite, and losses that jump: what is left out, and that the rest of the run is the same."""

import re

import hurt_runs
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import poison
import pytest
from hurt_runs import assert_same_end, last_step, lines, saved_steps, small, start, start_pair

from switchlora_jax.data import loader
from switchlora_jax.methods import galore
from switchlora_jax.training import step as train_step

STEP = 28  # as metrics.jsonl counts it, so that the state before it is that of 27


def hurt(what: str):
  """`KIND@STEP,STEP`: those batches break the loss, each by one row; see `poison.KINDS`."""
  kind, _, when = what.partition("@")
  loader.make_batch_fn = poison.make_batch_fn(kind, (int(step) - 1 for step in when.split(",")))
  train_step.mean_loss = poison.loss


def begin(config, workdir, what):
  return start(config, workdir, fault=f"test_numbers:{what}")


def finish(config, workdir, what, **more):
  return hurt_runs.finish(config, workdir, fault=f"test_numbers:{what}", **more)


def parts(workdir, step: int) -> dict[str, bytes]:
  """Every array of a checkpoint that a skipped update leaves alone, by name."""
  with ocp.PyTreeCheckpointer() as reader:
    path = workdir / "checkpoints" / str(step) / "state"
    described = reader.metadata(path).item_metadata.tree
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described)
    state = reader.restore(path, restore_args=wanted)
  kept = {name: state[name] for name in ("params", "frozen", "candidates", "opt_state")}
  return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree.leaves_with_path(kept)}


def numbers(workdir) -> dict[int, dict]:
  """The lines of training, by step."""
  return {row["step"]: row for row in lines(workdir) if "loss" in row}


@pytest.mark.telling
def test_nan_just_after_a_switch(tmp_path):
  """Case 10. Only the updates of the hurt steps are skipped; a run killed behind the first ends as one that was not."""
  often = dict(switch__decay_point=0.9, checkpoint_every=1, keep_checkpoints=20)
  config, what = small(tmp_path, steps=16, **often), "hurt=nan@7,12"
  finish(config, tmp_path / "whole", what)
  rows = numbers(tmp_path / "whole")
  assert rows[6]["switched"] > 0 and rows[11]["switched"] > 0 and rows[8]["switched"] > 0
  assert [step for step, row in rows.items() if row["loss"] is None] == [7, 12]
  assert [rows[step]["skipped"] for step in (6, 7, 11, 12, 16)] == [0, 1, 1, 2, 2]
  for step in (7, 12):
    assert rows[step]["switched"] == 0 and parts(tmp_path / "whole", step) == parts(tmp_path / "whole", step - 1)
  assert parts(tmp_path / "whole", 8) != parts(tmp_path / "whole", 7)
  run = begin(config, tmp_path / "killed", what)
  run.until(8)
  run.kill()
  finish(config, tmp_path / "killed", what)
  assert_same_end(tmp_path / "killed", tmp_path / "whole")


def lose_one_of(count: str):
  """One in so many of GaLore's decompositions finds nothing; which, is a matter of what is decomposed."""

  def failing(matrix, rank):
    lost = jnp.sum(jax.lax.bitcast_convert_type(matrix, jnp.int32)) % int(count) == 0
    return jnp.where(lost, jnp.nan, galore.leading_directions(matrix, rank))

  galore.scale_by_galore.__kwdefaults__["directions"] = failing


def test_decompositions_that_fail(tmp_path):
  """Numbers, of GaLore: a kernel whose decomposition failed waits for the next step, the others go on; a run that is
  killed on the way ends as one that was not."""
  config = small(tmp_path, method="galore", galore__refresh_every=6)
  finish(config, tmp_path / "whole", "lose_one_of=3")
  failed = {step: row["svd_failed"] for step, row in numbers(tmp_path / "whole").items()}
  assert failed[1] > min(failed[step] for step in range(2, 7)) == 0 and failed[7] > 0, failed
  assert all(row["loss"] is not None and not row["skipped"] for row in numbers(tmp_path / "whole").values())
  run = begin(config, tmp_path / "killed", "lose_one_of=3")
  run.until(8)
  run.kill()
  finish(config, tmp_path / "killed", "lose_one_of=3")
  assert_same_end(tmp_path / "killed", tmp_path / "whole")


def test_an_infinite_gradient_on_one_device_of_eight(tmp_path):
  """Case 11. The loss is finite, and the rows of seven devices are; no device makes the update."""
  config = small(tmp_path, steps=10, checkpoint_every=1, keep_checkpoints=20)
  finish(config, tmp_path / "run", "hurt=gradient@7", devices=8)
  rows = numbers(tmp_path / "run")
  assert [step for step, row in rows.items() if row["grad_norm"] is None] == [7]
  assert all(row["loss"] is not None for row in rows.values())
  assert [rows[step]["skipped"] for step in (6, 7, 10)] == [0, 1, 1]
  assert parts(tmp_path / "run", 7) == parts(tmp_path / "run", 6) != parts(tmp_path / "run", 8)


def spiking(folder, action):
  """The loss of step 28 is 20 times what it was; the last checkpoint before is that of step 25."""
  return small(folder, spike__window=8, spike__action=action, keep_checkpoints=20)


@pytest.mark.parametrize("action", ["report", "skip"])
def test_a_spike_is_reported_or_skipped(tmp_path, action):
  """Case 12. Once, by a warning and in metrics.jsonl; where it is skipped, nothing else is."""
  config = spiking(tmp_path, action)
  config.update(steps=30, checkpoint_every=1)
  run = finish(config, tmp_path / "run", f"hurt=spike@{STEP}")
  rows = numbers(tmp_path / "run")
  assert [step for step, row in rows.items() if row["spike"]] == [STEP] and rows[30]["skipped"] == 0
  assert re.findall(r"step (\d+): the loss \S+ is a spike", run.said()) == [str(STEP)]
  same = parts(tmp_path / "run", STEP) == parts(tmp_path / "run", STEP - 1)
  assert same == (action == "skip")
  assert parts(tmp_path / "run", STEP + 1) != parts(tmp_path / "run", STEP)


def test_a_run_goes_back_from_a_spike(tmp_path):
  """Case 12. To the last checkpoint, behind the batch of the spike; killed on the way, it does the same again."""
  config, what = spiking(tmp_path, "rollback"), f"hurt=spike@{STEP}"
  run = finish(config, tmp_path / "whole", what)
  rows = numbers(tmp_path / "whole")
  assert "the run rolls back" in run.said() and list(rows) == list(range(1, 41))
  assert not any(row["spike"] for row in rows.values())
  assert [(rows[step]["rollbacks"], rows[step]["data_offset"]) for step in (25, 26, 40)] == [(0, 0), (1, 3), (1, 3)]

  killed = tmp_path / "killed"
  run = begin(config, killed, what)
  run.wait_for(lambda: "the run rolls back" in run.said(), "a way back")
  run.kill()
  assert saved_steps(killed)[-1] <= 25, "what is saved is of the first course"
  run = begin(config, killed, what)
  run.wait_for(lambda: last_step(killed) > 31 and saved_steps(killed)[-1] >= 30, "a checkpoint of the second course")
  run.kill()
  finish(config, killed, what)
  assert_same_end(killed, tmp_path / "whole")


def test_two_processes_go_back_together(tmp_path):
  """Case 12. Only the first has the row that hurts."""
  fault = f"test_numbers:hurt=spike@{STEP}"
  pair = start_pair(spiking(tmp_path, "rollback"), tmp_path / "pair", faults=(fault, fault))
  assert [run.end() for run in pair] == [0, 0], [run.said() for run in pair]
  assert ["the run rolls back" in run.said() for run in pair] == [True, False]
  rows = numbers(tmp_path / "pair")
  assert list(rows) == list(range(1, 41))
  assert [(rows[step]["rollbacks"], rows[step]["data_offset"]) for step in (25, 26, 40)] == [(0, 0), (1, 3), (1, 3)]
