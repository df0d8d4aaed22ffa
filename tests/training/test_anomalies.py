"""Loss spikes: detection compared with NumPy, warnings, and limits on rollbacks and skipped updates."""

import logging
import math

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from switchlora_jax.errors import UserError
from switchlora_jax.training.anomalies import (
  MIN_DEVIATION,
  check_progress,
  check_rollback_allowed,
  detect_spike,
  initial_spike_state,
  report_spikes,
  state_after_rollback,
)


def settings(**changes):
  return ConfigDict(dict(window=8, threshold=3.0, action="report", max_rollbacks=2) | changes)


def detect(losses, **changes):
  """Whether each loss is a spike, and the final state of the detector."""
  spike = settings(**changes)
  state, found = initial_spike_state(spike.window), []
  for loss in losses:
    high, state, _ = detect_spike(state, jnp.float32(loss), spike)
    found.append(bool(high))
  return found, state


def expected(losses, window, threshold):
  """The same rule in NumPy with float64."""
  seen, found = [], []
  for loss in losses:
    last = np.array(seen[-window:])
    full = len(last) == window
    limit = last.mean() + threshold * max(last.std(), MIN_DEVIATION * last.mean()) if full else np.inf
    found.append(bool(np.isfinite(loss) and loss > limit))
    seen += [loss] if np.isfinite(loss) else []
  return found


@pytest.mark.parametrize("seed", range(5))
def test_spikes_are_those_of_the_numpy_rule(seed):
  """Falling losses with noise, outliers, NaN and infinities."""
  draw = np.random.default_rng(seed)
  losses = (3 + 4 * np.exp(-np.arange(60) / 20) + draw.normal(0, 0.1, 60)).astype(np.float32)
  losses[draw.integers(10, 60, 4)] += draw.uniform(0, 5, 4).astype(np.float32)
  losses[draw.integers(0, 60, 3)] = [np.nan, np.inf, -np.inf]
  found, _ = detect(losses)
  assert found == expected(losses, 8, 3.0) and any(found) and not all(found)


def test_nothing_is_a_spike_before_the_window_is_full():
  assert detect([1.0] * 7 + [100.0])[0] == [False] * 8
  assert detect([1.0] * 8 + [100.0])[0] == [False] * 8 + [True]


def test_the_deviation_of_a_window_has_a_lower_bound():
  """If all losses are equal, the deviation is taken to be 1% of the mean."""
  assert not detect([2.0] * 8 + [2.05])[0][-1]
  assert detect([2.0] * 8 + [2.07])[0][-1]


def test_a_loss_that_is_not_finite_is_no_spike_and_does_not_enter_the_window():
  found, state = detect([1, 2, 3, 4, 5, 6, 7, 8, np.nan, np.inf, 9])
  assert not any(found)
  np.testing.assert_array_equal(state.losses, np.arange(2, 10))


@pytest.mark.parametrize(("window", "threshold"), [(8, 1.5), (32, 3.0), (128, 6.0)])
def test_losses_that_stay_high_soon_are_no_spikes(window, threshold):
  """Otherwise a run could skip updates forever. With a share p of high losses, mean and deviation are p and √(p(1−p)).

  Both are in units of the step between the two levels.
  """
  noise = np.random.default_rng(0).normal(3, 0.01, window)
  found, _ = detect([*noise, *[9.0] * window], window=window, threshold=threshold)
  spikes = math.ceil(window / (1 + threshold**2))
  assert found == [False] * window + [True] * spikes + [False] * (window - spikes)


def test_float64_and_bfloat16_losses_are_compared_in_float32(x64):
  for dtype in (jnp.float64, jnp.bfloat16):
    _, state, numbers = detect_spike(initial_spike_state(4), jnp.asarray(2, dtype), settings())
    assert state.losses.dtype == numbers["loss_mean"].dtype == jnp.float32


def test_only_the_action_rollback_reports_rollbacks_and_the_data_offset():
  for action, more in (("report", set()), ("skip", set()), ("rollback", {"rollbacks", "data_offset"})):
    *_, numbers = detect_spike(initial_spike_state(4), jnp.float32(1), settings(action=action))
    assert numbers.keys() == {"spike", "loss_mean", "loss_deviation"} | more


# --- warnings and rollbacks ---------------------------------------------------------------------------------------

ROWS = [
  {"step": step, "loss": 2.0 + 7 * spike, "loss_mean": 2.0, "loss_deviation": 0.25, "spike": spike}
  for step, spike in ((4, 0), (5, 1), (6, 0), (7, 1))
]


@pytest.mark.parametrize(("action", "update"), [("report", "was made"), ("skip", "was skipped")])
def test_every_spike_is_reported(caplog, action, update):
  assert report_spikes(ROWS, settings(action=action), log_warnings=True) is None
  assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
  assert caplog.messages[0] == (
    f"step 5: the loss 9.0000 is a spike; the 8 losses before it have mean 2.0000, standard deviation 0.2500 "
    f"(the update {update})"
  )
  assert caplog.messages[1].startswith("step 7:")


def test_every_process_rolls_back_from_the_first_spike(caplog):
  for log_warnings in (True, False):
    assert report_spikes(ROWS, settings(action="rollback"), log_warnings) == 5
  assert len(caplog.messages) == 1 and "the run rolls back" in caplog.messages[0]


def test_without_a_spike_there_is_no_warning_and_no_rollback(caplog):
  assert report_spikes(ROWS[::2], settings(action="rollback"), log_warnings=True) is None
  assert not caplog.messages


def test_the_data_offsets_of_rollbacks_add_up():
  """Rollbacks from step 12 to 10 and from 15 to 10. The first skips batches 10 and 11, the second 12 to 16."""
  saved = initial_spike_state(4)._replace(losses=jnp.arange(4.0))
  once = state_after_rollback(saved, initial_spike_state(4), 12 - 10)
  twice = state_after_rollback(saved, once, 15 - 10)
  assert (once.rollbacks, once.offset, twice.rollbacks, twice.offset) == (1, 2, 2, 7)
  np.testing.assert_array_equal(twice.losses, saved.losses)


def test_a_spike_after_max_rollbacks_raises():
  state = initial_spike_state(4)
  check_rollback_allowed(state._replace(rollbacks=jnp.int32(1)), settings(), 9)
  with pytest.raises(UserError, match=r"stopped at step 9, a loss spike, after 2 rollbacks .*max_rollbacks"):
    check_rollback_allowed(state._replace(rollbacks=jnp.int32(2)), settings(), 9)


def test_a_run_stops_after_too_many_skipped_updates_in_a_row():
  config = ConfigDict(dict(max_skipped=3, learning_rate=0.1))
  rows = [{"step": step, "skipped_in_a_row": count} for step, count in ((4, 1), (5, 2), (6, 0))]
  check_progress([], config)
  check_progress(rows, config)
  with pytest.raises(UserError, match=r"stopped after step 7: 3 updates in a row .*max_skipped = 3.*= 0.1"):
    check_progress([*rows, {"step": 6, "skipped_in_a_row": 3}, {"step": 7, "skipped_in_a_row": 0}], config)
