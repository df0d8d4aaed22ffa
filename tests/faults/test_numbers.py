"""Non-finite losses and gradients, and loss spikes: only the affected updates are skipped or rolled back."""

import re

import fault_runs
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import poison
import pytest
from fault_runs import assert_same_end, last_step, metrics_rows, saved_steps, small_config, start, start_pair

from switchlora_jax.data import loader
from switchlora_jax.methods import galore
from switchlora_jax.training import step as train_step

STEP = 28  # as in metrics.jsonl: the update from the state of step 27


def poison_batches(fault: str):
  """`KIND@STEP,STEP`: one sequence of the batch of each of these steps breaks the loss; see `poison.KINDS`."""
  kind, _, when = fault.partition("@")
  loader.make_batch_fn = poison.make_batch_fn(kind, (int(step) - 1 for step in when.split(",")))
  train_step.mean_loss = poison.loss


def start_with_fault(config, workdir, fault):
  return start(config, workdir, fault=f"test_numbers:{fault}")


def finish_with_fault(config, workdir, fault, **more):
  return fault_runs.finish(config, workdir, fault=f"test_numbers:{fault}", **more)


def updated_arrays(workdir, step: int) -> dict[str, bytes]:
  """The arrays of a checkpoint that only an update changes, as bytes by name."""
  with ocp.PyTreeCheckpointer() as reader:
    path = workdir / "checkpoints" / str(step) / "state"
    described = reader.metadata(path).item_metadata.tree
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described)
    state = reader.restore(path, restore_args=wanted)
  kept = {name: state[name] for name in ("params", "frozen", "candidates", "opt_state")}
  return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree.leaves_with_path(kept)}


def training_rows(workdir) -> dict[int, dict]:
  """The rows of training metrics by step."""
  return {row["step"]: row for row in metrics_rows(workdir) if "loss" in row}


def test_nan_losses_skip_only_their_updates(tmp_path):
  """Case 10. Two NaN losses, each just after a switch. A run that is killed after the first NaN has the same result."""
  often = dict(switch__decay_point=0.9, checkpoint_every=1, keep_checkpoints=20)
  config, fault = small_config(tmp_path, steps=16, **often), "poison_batches=nan@7,12"
  finish_with_fault(config, tmp_path / "whole", fault)
  rows = training_rows(tmp_path / "whole")
  assert rows[6]["switched"] > 0 and rows[11]["switched"] > 0 and rows[8]["switched"] > 0
  assert [step for step, row in rows.items() if row["loss"] is None] == [7, 12]
  assert [rows[step]["skipped"] for step in (6, 7, 11, 12, 16)] == [0, 1, 1, 2, 2]
  for step in (7, 12):
    assert rows[step]["switched"] == 0 and updated_arrays(tmp_path / "whole", step) == updated_arrays(
      tmp_path / "whole", step - 1
    )
  assert updated_arrays(tmp_path / "whole", 8) != updated_arrays(tmp_path / "whole", 7)
  run = start_with_fault(config, tmp_path / "killed", fault)
  run.wait_for_step(8)
  run.kill()
  finish_with_fault(config, tmp_path / "killed", fault)
  assert_same_end(tmp_path / "killed", tmp_path / "whole")


def fail_one_of(count: str):
  """One in `count` decompositions of GaLore returns NaN; which one depends on the matrix."""

  def failing(matrix, rank):
    lost = jnp.sum(jax.lax.bitcast_convert_type(matrix, jnp.int32)) % int(count) == 0
    return jnp.where(lost, jnp.nan, galore.leading_directions(matrix, rank))

  galore.projectors.options = lambda config, section: {"directions": failing}


def test_a_failed_decomposition_is_repeated_at_the_next_step(tmp_path):
  """GaLore: the other kernels are updated. A run that is killed has the same result."""
  config = small_config(tmp_path, method="galore", galore__refresh_every=6)
  finish_with_fault(config, tmp_path / "whole", "fail_one_of=3")
  failed = {step: row["svd_failed"] for step, row in training_rows(tmp_path / "whole").items()}
  assert failed[1] > min(failed[step] for step in range(2, 7)) == 0 and failed[7] > 0, failed
  assert all(row["loss"] is not None and not row["skipped"] for row in training_rows(tmp_path / "whole").values())
  run = start_with_fault(config, tmp_path / "killed", "fail_one_of=3")
  run.wait_for_step(8)
  run.kill()
  finish_with_fault(config, tmp_path / "killed", "fail_one_of=3")
  assert_same_end(tmp_path / "killed", tmp_path / "whole")


def test_an_infinite_gradient_on_one_device_skips_the_update_on_all(tmp_path):
  """Case 11. The loss, and the gradients of the other seven devices, are finite; no device applies the update."""
  config = small_config(tmp_path, steps=10, checkpoint_every=1, keep_checkpoints=20)
  finish_with_fault(config, tmp_path / "run", "poison_batches=gradient@7", devices=8)
  rows = training_rows(tmp_path / "run")
  assert [step for step, row in rows.items() if row["grad_norm"] is None] == [7]
  assert all(row["loss"] is not None for row in rows.values())
  assert [rows[step]["skipped"] for step in (6, 7, 10)] == [0, 1, 1]
  assert (
    updated_arrays(tmp_path / "run", 7) == updated_arrays(tmp_path / "run", 6) != updated_arrays(tmp_path / "run", 8)
  )


def spike_config(folder, action):
  """For a loss spike at step 28; the last checkpoint before it is that of step 25."""
  return small_config(folder, spike__window=8, spike__action=action, keep_checkpoints=20)


@pytest.mark.parametrize("action", ["report", "skip"])
def test_a_spike_is_reported_or_skipped(tmp_path, action):
  """Case 12. One warning and one flag in metrics.jsonl; `skip` skips only that update."""
  config = spike_config(tmp_path, action)
  config.update(steps=30, checkpoint_every=1)
  run = finish_with_fault(config, tmp_path / "run", f"poison_batches=spike@{STEP}")
  rows = training_rows(tmp_path / "run")
  assert [step for step, row in rows.items() if row["spike"]] == [STEP] and rows[30]["skipped"] == 0
  assert re.findall(r"step (\d+): the loss \S+ is a spike", run.output()) == [str(STEP)]
  same = updated_arrays(tmp_path / "run", STEP) == updated_arrays(tmp_path / "run", STEP - 1)
  assert same == (action == "skip")
  assert updated_arrays(tmp_path / "run", STEP + 1) != updated_arrays(tmp_path / "run", STEP)


def test_a_spike_rolls_the_run_back(tmp_path):
  """Case 12. To the last checkpoint, then past the batch of the spike; with two kills, the result is the same."""
  config, fault = spike_config(tmp_path, "rollback"), f"poison_batches=spike@{STEP}"
  run = finish_with_fault(config, tmp_path / "whole", fault)
  rows = training_rows(tmp_path / "whole")
  assert "the run rolls back" in run.output() and list(rows) == list(range(1, 41))
  assert not any(row["spike"] for row in rows.values())
  assert [(rows[step]["rollbacks"], rows[step]["data_offset"]) for step in (25, 26, 40)] == [(0, 0), (1, 3), (1, 3)]

  killed = tmp_path / "killed"
  run = start_with_fault(config, killed, fault)
  run.wait_for(lambda: "the run rolls back" in run.output(), "a rollback")
  run.kill()
  assert saved_steps(killed)[-1] <= 25, "a step after the rollback is already saved"
  run = start_with_fault(config, killed, fault)
  run.wait_for(lambda: last_step(killed) > 31 and saved_steps(killed)[-1] >= 30, "a checkpoint after the rollback")
  run.kill()
  finish_with_fault(config, killed, fault)
  assert_same_end(killed, tmp_path / "whole")


def test_two_processes_roll_back_together(tmp_path):
  """Case 12. Only process 0 reads the sequence that causes the spike."""
  fault = f"test_numbers:poison_batches=spike@{STEP}"
  pair = start_pair(spike_config(tmp_path, "rollback"), tmp_path / "pair", faults=(fault, fault))
  assert [run.exit_code() for run in pair] == [0, 0], [run.output() for run in pair]
  assert ["the run rolls back" in run.output() for run in pair] == [True, False]
  rows = training_rows(tmp_path / "pair")
  assert list(rows) == list(range(1, 41))
  assert [(rows[step]["rollbacks"], rows[step]["data_offset"]) for step in (25, 26, 40)] == [(0, 0), (1, 3), (1, 3)]
