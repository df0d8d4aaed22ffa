"""Loss spikes: a loss far above those of the steps before it, found on the devices, as a part of the step.

A loss is a spike where it exceeds mean + threshold · deviation of the last `window` finite losses, the rule of OLMo's
optimizers. The window takes every finite loss, spikes too: each widens the deviation, so that of losses that stay at
one height, window / (1 + threshold²) are spikes (four by default), and then it is what is normal. Nothing has to end a
series of skipped steps.
What a run does about one says `config.spike.action`; to go back and leave out the data that led there is PaLM's way
(Chowdhery et al. 2022, section 5.1).
"""

import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp

from switchlora_jax.errors import UserError

log = logging.getLogger(__name__)

ACTIONS = ("report", "skip", "rollback")
LEAST = 0.01  # of the mean is the least deviation: where losses hardly differ, a ripple is no spike


class SpikeState(NamedTuple):
  """What a run knows of its losses, a part of its train state.

  Attributes:
    losses: [window] float32, the last finite ones, oldest first; NaN until there have been so many.
    rollbacks: [] int32, how often the run went back so far. offset: [] int32, how many batches the data are ahead of
      the step since then.
  """

  losses: jax.Array
  rollbacks: jax.Array
  offset: jax.Array


def initial_spike_state(window: int) -> SpikeState:
  """Before step 0."""
  zero = lambda: jnp.zeros((), jnp.int32)
  return SpikeState(jnp.full(window, jnp.nan, jnp.float32), zero(), zero())


def detect_spike(spikes: SpikeState, loss, spike) -> tuple[jax.Array, SpikeState, dict[str, jax.Array]]:
  """Whether the loss [] of a step is a spike by `config.spike`, [] bool, what is known after it, and what to log.

  Nothing is one before the window is full, nor a loss that is not finite, which the window does not take.
  Metrics: spike, 0 or 1; loss_mean and loss_deviation of the window without this loss, NaN before it is full; and
  where a run goes back at a spike, rollbacks and data_offset.
  """
  loss = loss.astype(jnp.float32)
  mean = jnp.mean(spikes.losses)
  deviation = jnp.sqrt(jnp.mean((spikes.losses - mean[None]) ** 2))
  finite = jnp.isfinite(loss)
  high = finite & (loss > mean + spike.threshold * jnp.maximum(deviation, LEAST * mean))  # false where these are NaN
  losses = jnp.where(finite, jnp.append(spikes.losses[1:], loss), spikes.losses)
  numbers = {"spike": high.astype(jnp.int32), "loss_mean": mean, "loss_deviation": deviation}
  if spike.action == "rollback":
    numbers |= {"rollbacks": spikes.rollbacks, "data_offset": spikes.offset}
  return high, spikes._replace(losses=losses), numbers


def check_spike_config(spike) -> None:
  """Raise `UserError` unless `config.spike` makes sense."""
  if spike.action not in ACTIONS:
    raise UserError(f"spike.action (={spike.action!r}) must be one of {', '.join(ACTIONS)}; set --config.spike.action")
  if spike.window < 2:
    raise UserError(
      f"spike.window (={spike.window}) must be at least 2, to have a deviation; set --config.spike.window"
    )
  if not spike.threshold > 0:
    raise UserError(f"spike.threshold (={spike.threshold}) must be greater than 0; set --config.spike.threshold")
  if spike.max_rollbacks < 1:
    raise UserError(
      f"spike.max_rollbacks (={spike.max_rollbacks}) must be at least 1; set --config.spike.max_rollbacks, or "
      f"--config.spike.action=report"
    )


class SpikeDetected(Exception):
  """The run has to go back: the loss of step number `step`, as metrics.jsonl counts them, was a spike."""

  def __init__(self, step: int):
    super().__init__(f"the loss of step {step} was a spike")
    self.step = step


DONE = {
  "report": "the update was made",
  "skip": "the update was skipped",
  "rollback": "the run goes back to before it, and goes on with the data behind it",
}


def report_spikes(rows: list[dict], spike, aloud: bool) -> None:
  """Warn of the spikes among the numbers of some steps.

  Args:
    rows: of metrics.jsonl, of training steps. spike: `config.spike`. aloud: whether this process warns.
  Raises:
    SpikeDetected: at the first, where the run shall go back.
  """
  for row in rows:
    if row["spike"]:
      if aloud:
        log.warning(
          "step %d: the loss %.4f is a spike; that of the %d steps before was %.4f, standard deviation %.4f (%s)",
          row["step"], row["loss"], spike.window, row["loss_mean"], row["loss_deviation"], DONE[spike.action],
        )  # fmt: skip
      if spike.action == "rollback":
        raise SpikeDetected(row["step"])


def check_rollback_allowed(spikes: SpikeState, spike, step: int) -> None:
  """Raise `UserError` where a run, in which step number `step` was a spike, has gone back too often already."""
  if (times := int(spikes.rollbacks)) >= spike.max_rollbacks:
    raise UserError(
      f"the run was stopped at step {step}, a loss spike: it went back {times} times already (spike.max_rollbacks = "
      f"{spike.max_rollbacks}); look at the data of these steps, lower --config.learning_rate in a new --workdir, or "
      f"raise --config.spike.max_rollbacks to go on"
    )


def state_after_rollback(there: SpikeState, here: SpikeState, ahead: int) -> SpikeState:
  """What is known where a run has gone back to: the losses of `there`; one more rollback, and the data go on.

  Args:
    here: what was known when it was decided.
    ahead: the number of batches from there to behind that of the spike.
  """
  return there._replace(rollbacks=here.rollbacks + 1, offset=here.offset + ahead)
