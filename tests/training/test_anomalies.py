"""What is a loss spike: against the plain rule in numpy, on windows of every kind; and what it says."""

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


def watched(losses, **changes):
  """For each loss whether it is a spike, and what is known at the end."""
  spike = settings(**changes)
  known, found = initial_spike_state(spike.window), []
  for loss in losses:
    high, known, _ = detect_spike(known, jnp.float32(loss), spike)
    found.append(bool(high))
  return found, known


def expected(losses, window, threshold):
  """The same in float64, in plain words."""
  seen, found = [], []
  for loss in losses:
    last = np.array(seen[-window:])
    full = len(last) == window
    limit = last.mean() + threshold * max(last.std(), MIN_DEVIATION * last.mean()) if full else np.inf
    found.append(bool(np.isfinite(loss) and loss > limit))
    seen += [loss] if np.isfinite(loss) else []
  return found


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_rule(seed):
  """Losses that fall, with noise, outliers and numbers that are not finite among them."""
  draw = np.random.default_rng(seed)
  losses = (3 + 4 * np.exp(-np.arange(60) / 20) + draw.normal(0, 0.1, 60)).astype(np.float32)
  losses[draw.integers(10, 60, 4)] += draw.uniform(0, 5, 4).astype(np.float32)
  losses[draw.integers(0, 60, 3)] = [np.nan, np.inf, -np.inf]
  found, _ = watched(losses)
  assert found == expected(losses, 8, 3.0) and any(found) and not all(found)


def test_nothing_is_a_spike_before_the_window_is_full():
  assert watched([1.0] * 7 + [100.0])[0] == [False] * 8
  assert watched([1.0] * 8 + [100.0])[0] == [False] * 8 + [True]


def test_a_flat_window_does_not_cry_wolf():
  """Three times 1% of the mean is allowed where losses do not differ at all."""
  assert not watched([2.0] * 8 + [2.05])[0][-1]
  assert watched([2.0] * 8 + [2.07])[0][-1]


def test_what_is_not_finite_is_no_spike_and_not_kept():
  found, known = watched([1, 2, 3, 4, 5, 6, 7, 8, np.nan, np.inf, 9])
  assert not any(found)
  np.testing.assert_array_equal(known.losses, np.arange(2, 10))


@pytest.mark.parametrize(("window", "threshold"), [(8, 1.5), (32, 3.0), (128, 6.0)])
def test_losses_that_stay_high_are_soon_normal(window, threshold):
  """Or a run that skips spikes could skip for ever. With a share p of them, mean and deviation are p and √(p(1−p))."""
  noise = np.random.default_rng(0).normal(3, 0.01, window)
  found, _ = watched([*noise, *[9.0] * window], window=window, threshold=threshold)
  spikes = math.ceil(window / (1 + threshold**2))
  assert found == [False] * window + [True] * spikes + [False] * (window - spikes)


def test_float64_and_bfloat16_losses_are_watched_in_float32(x64):
  for dtype in (jnp.float64, jnp.bfloat16):
    _, known, numbers = detect_spike(initial_spike_state(4), jnp.asarray(2, dtype), settings())
    assert known.losses.dtype == numbers["loss_mean"].dtype == jnp.float32


def test_only_a_run_that_goes_back_tells_how_often():
  for action, more in (("report", set()), ("skip", set()), ("rollback", {"rollbacks", "data_offset"})):
    *_, numbers = detect_spike(initial_spike_state(4), jnp.float32(1), settings(action=action))
    assert numbers.keys() == {"spike", "loss_mean", "loss_deviation"} | more


# --- what is said and done ----------------------------------------------------------------------------------------

ROWS = [
  {"step": step, "loss": 2.0 + 7 * spike, "loss_mean": 2.0, "loss_deviation": 0.25, "spike": spike}
  for step, spike in ((4, 0), (5, 1), (6, 0), (7, 1))
]


@pytest.mark.parametrize(("action", "what"), [("report", "was made"), ("skip", "was skipped")])
def test_every_spike_is_reported(caplog, action, what):
  assert report_spikes(ROWS, settings(action=action), log_warnings=True) is None
  assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
  assert caplog.messages[0] == (
    f"step 5: the loss 9.0000 is a spike; the 8 losses before it have mean 2.0000, standard deviation 0.2500 "
    f"(the update {what})"
  )
  assert caplog.messages[1].startswith("step 7:")


def test_every_process_rolls_back_from_the_first_spike(caplog):
  for log_warnings in (True, False):
    assert report_spikes(ROWS, settings(action="rollback"), log_warnings) == 5
  assert len(caplog.messages) == 1 and "the run rolls back" in caplog.messages[0]


def test_without_a_spike_there_is_no_warning_and_no_rollback(caplog):
  assert report_spikes(ROWS[::2], settings(action="rollback"), log_warnings=True) is None
  assert not caplog.messages


def test_going_back_again_adds_up():
  """From step 12 to 10, then from 15 to 10: batches 10 and 11 are left out, then 12 to 16, those of steps 10 to 14."""
  there = initial_spike_state(4)._replace(losses=jnp.arange(4.0))
  once = state_after_rollback(there, initial_spike_state(4), 12 - 10)
  twice = state_after_rollback(there, once, 15 - 10)
  assert (once.rollbacks, once.offset, twice.rollbacks, twice.offset) == (1, 2, 2, 7)
  np.testing.assert_array_equal(twice.losses, there.losses)


def test_a_run_goes_back_only_so_often():
  known = initial_spike_state(4)
  check_rollback_allowed(known._replace(rollbacks=jnp.int32(1)), settings(), 9)
  with pytest.raises(UserError, match=r"stopped at step 9, a loss spike, after 2 rollbacks .*max_rollbacks"):
    check_rollback_allowed(known._replace(rollbacks=jnp.int32(2)), settings(), 9)


def test_a_run_stops_after_too_many_skipped_updates_in_a_row():
  config = ConfigDict(dict(max_skipped=3, learning_rate=0.1))
  rows = [{"step": step, "skipped_in_a_row": count} for step, count in ((4, 1), (5, 2), (6, 0))]
  check_progress([], config)
  check_progress(rows, config)
  with pytest.raises(UserError, match=r"stopped after step 7: 3 updates in a row .*max_skipped = 3.*= 0.1"):
    check_progress([*rows, {"step": 6, "skipped_in_a_row": 3}, {"step": 7, "skipped_in_a_row": 0}], config)
