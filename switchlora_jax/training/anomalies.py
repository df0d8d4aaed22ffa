"""Loss spikes, and updates that are skipped in a row because a number was not finite.

A loss is a spike if it exceeds mean + threshold · standard deviation of the last `window` finite losses, the rule of
OLMo's optimizers. The training step evaluates it on the devices. The window includes every finite loss, also spikes.
Each spike increases the deviation. A loss that stays at a new level therefore counts as a spike
window / (1 + threshold²) times (four by default), and as normal afterwards. With action "skip", a series of skipped
steps ends for this reason.

`config.spike.action` selects the response. Rolling back and leaving out the data that led to the spike follows PaLM
(Chowdhery et al. 2022, section 5.1).
"""

import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp

from switchlora_jax.errors import UserError

log = logging.getLogger(__name__)

ACTIONS = ("report", "skip", "rollback")
MIN_DEVIATION = 0.01  # lower bound of deviation / mean: small fluctuations of a flat loss are not spikes


class SpikeState(NamedTuple):
  """State of the spike detector, a part of the train state.

  Attributes:
    losses: [window] float32, the last finite losses, oldest first, padded with NaN at the front.
    rollbacks: [] int32, number of rollbacks so far.
    offset: [] int32, number of batches left out by rollbacks: step t reads batch t + offset.
  """

  losses: jax.Array
  rollbacks: jax.Array
  offset: jax.Array


def initial_spike_state(window: int) -> SpikeState:
  """The state before step 0."""
  zero = lambda: jnp.zeros((), jnp.int32)
  return SpikeState(jnp.full(window, jnp.nan, jnp.float32), zero(), zero())


def detect_spike(spikes: SpikeState, loss, spike) -> tuple[jax.Array, SpikeState, dict[str, jax.Array]]:
  """Whether the loss of a step is a spike.

  No loss is a spike until the window is full. A loss that is not finite is not a spike, and not added to the window.

  Args:
    spikes: the state before the step.
    loss: [], of any floating dtype; converted to float32.
    spike: `config.spike`.
  Returns:
    is_spike: [] bool.
    spikes: the state after the step.
    metrics: spike, 0 or 1; loss_mean and loss_deviation of the window without this loss, NaN until it is full; with
      action "rollback", also rollbacks and data_offset.
  """
  loss = loss.astype(jnp.float32)
  mean = jnp.mean(spikes.losses)
  deviation = jnp.sqrt(jnp.mean((spikes.losses - mean[None]) ** 2))
  finite = jnp.isfinite(loss)
  limit = mean + spike.threshold * jnp.maximum(deviation, MIN_DEVIATION * mean)
  is_spike = finite & (loss > limit)  # false while the limit is NaN
  losses = jnp.where(finite, jnp.append(spikes.losses[1:], loss), spikes.losses)
  metrics = {"spike": is_spike.astype(jnp.int32), "loss_mean": mean, "loss_deviation": deviation}
  if spike.action == "rollback":
    metrics |= {"rollbacks": spikes.rollbacks, "data_offset": spikes.offset}
  return is_spike, spikes._replace(losses=losses), metrics


def check_spike_config(spike) -> None:
  """Raise `UserError` if a value of `config.spike` is invalid."""
  if spike.action not in ACTIONS:
    raise UserError(f"spike.action (={spike.action!r}) must be one of {', '.join(ACTIONS)}; set --config.spike.action")
  if spike.window < 2:
    raise UserError(
      f"spike.window (={spike.window}) must be at least 2, to define a deviation; set --config.spike.window"
    )
  if not spike.threshold > 0:
    raise UserError(f"spike.threshold (={spike.threshold}) must be greater than 0; set --config.spike.threshold")
  if spike.max_rollbacks < 1:
    raise UserError(
      f"spike.max_rollbacks (={spike.max_rollbacks}) must be at least 1; set --config.spike.max_rollbacks, or "
      f"--config.spike.action=report"
    )


RESPONSES = {
  "report": "the update was made",
  "skip": "the update was skipped",
  "rollback": "the run rolls back to its last checkpoint and continues with the data after this batch",
}


def report_spikes(rows: list[dict], spike, log_warnings: bool) -> int | None:
  """Warn of loss spikes, and find the first one that calls for a rollback.

  Args:
    rows: metrics of training steps, as from `Metrics.flush`.
    spike: `config.spike`.
    log_warnings: whether this process logs the warnings.
  Returns:
    With action "rollback", the step number of the first spike, as in metrics.jsonl; later ones are not reported, since
    their steps are undone. None if there is no spike, and with any other action.
  """
  for row in rows:
    if row["spike"]:
      if log_warnings:
        log.warning(
          "step %d: the loss %.4f is a spike; the %d losses before it have mean %.4f, standard deviation %.4f (%s)",
          row["step"], row["loss"], spike.window, row["loss_mean"], row["loss_deviation"], RESPONSES[spike.action],
        )  # fmt: skip
      if spike.action == "rollback":
        return row["step"]
  return None


def check_rollback_allowed(spikes: SpikeState, spike, step: int) -> None:
  """Raise `UserError` if a run, in which step number `step` was a spike, has used up its rollbacks."""
  if (count := int(spikes.rollbacks)) >= spike.max_rollbacks:
    raise UserError(
      f"the run was stopped at step {step}, a loss spike, after {count} rollbacks (spike.max_rollbacks = "
      f"{spike.max_rollbacks}); look at the data of these steps, lower --config.learning_rate in a new --workdir, or "
      f"raise --config.spike.max_rollbacks to continue"
    )


def state_after_rollback(restored: SpikeState, before: SpikeState, batches: int) -> SpikeState:
  """Spike-detector state after a rollback: the restored losses, one more rollback, a larger data offset.

  Args:
    restored: the state of the checkpoint.
    before: the state when the rollback was decided.
    batches: number of batches from the step of the checkpoint up to and including that of the spike.
  """
  return restored._replace(rollbacks=before.rollbacks + 1, offset=before.offset + batches)


def check_progress(rows: list[dict], config) -> None:
  """Raise `UserError` if at least `config.max_skipped` updates in a row were skipped because a number was not finite.

  Args:
    rows: metrics of training steps, as from `Metrics.flush`.
    config: the resolved config.
  """
  worst = max((row["skipped_in_a_row"] for row in rows), default=0)
  if worst >= config.max_skipped:
    raise UserError(
      f"the run was stopped after step {rows[-1]['step']}: {worst} updates in a row had a loss or gradient that "
      f"was not finite (max_skipped = {config.max_skipped}); lower --config.learning_rate (= {config.learning_rate}) "
      f"in a new --workdir, or look at the data of these steps"
    )
