"""Fira compared with an implementation in NumPy, its limiter, and its settings."""

from functools import partial

import jax
import numpy as np
import pytest
import small_model
from projected import SIDES, failing, gradients, matrices, positive_directions, projector_by_hand, run, with_failure
from small_model import host, same_bits
from tiny import resolved, tiny_config

from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.methods import fira
from switchlora_jax.methods.fira import scale_by_fira
from switchlora_jax.methods.galore import ProjectedAdam, failures, scale_by_galore

pytestmark = pytest.mark.two_linear_layers

HYPER = dict(rank=2, refresh_every=4, scale=0.25, limit=1.01)
ADAM = ProjectedAdam(HYPER["rank"], HYPER["refresh_every"], matrices, directions=positive_directions)
STACK = {"up": (3, 5, 8), "down": (3, 8, 5)}


def fira_by_hand(grads, rank, refresh_every, scale, limit, b1=0.9, b2=0.999, eps=1e-6):
  """The updates of one kernel [in, out], and whether the limiter acted; each side is written out."""
  m = v = previous = 0
  updates, limited = [], []
  for t, grad in enumerate(grads):
    left = grad.shape[0] <= grad.shape[1]
    if t % refresh_every == 0:
      basis = projector_by_hand(grad, rank)
    low = basis.T @ grad if left else grad @ basis
    back = partial(lambda basis, x, left: scale * (basis @ x if left else x @ basis.T), basis, left=left)
    m, v = b1 * m + (1 - b1) * low, b2 * v + (1 - b2) * low**2
    step = m / (np.sqrt(v) + eps)
    axis = 0 if left else 1
    factor = np.linalg.norm(step, axis=axis, keepdims=True) / (np.linalg.norm(low, axis=axis, keepdims=True) + 1e-8)
    rest = (grad - back(low)) * factor
    size, largest = np.linalg.norm(rest), limit * (previous + 1e-8)
    limited.append(t > 0 and size > largest)
    if limited[-1]:
      rest = rest * largest / size
    previous = np.linalg.norm(rest)
    unbias = np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
    updates.append(unbias * (back(step) + rest))
  return updates, limited


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_25_updates_are_those_of_numpy(sides, x64):
  """With 7 projectors, and with updates that the limiter changes and that it does not."""
  grads = gradients(25, kernel=sides)
  grads[12]["kernel"] = grads[12]["kernel"] * 30  # the norm of S jumps
  updates, states = run(scale_by_fira(ADAM, HYPER["scale"], HYPER["limit"]), grads)
  expected, limited = fira_by_hand([grad["kernel"] for grad in grads], **HYPER)
  for ours, ref in zip(updates, expected, strict=True):
    np.testing.assert_allclose(ours["kernel"], ref, rtol=0, atol=1e-10)
  assert [state.limited for state in states] == limited and {0, 1} == set(limited)


def test_stacked_layers_are_updated_like_single_layers(x64):
  """Each layer has its own projector, column factors and limiter."""
  grads = gradients(6, **STACK)
  updates, states = run(scale_by_fira(ADAM, HYPER["scale"], HYPER["limit"]), grads)
  for name in STACK:
    for layer in range(3):
      expected, _ = fira_by_hand([grad[name][layer] for grad in grads], **HYPER)
      np.testing.assert_allclose(updates[-1][name][layer], expected[-1], rtol=0, atol=1e-10)
  assert states[-1].norm["up"].shape == (3,)


def test_the_rest_is_orthogonal_to_the_projection_if_the_scale_is_1(x64):
  """The equation of the paper. Without the rest, the update is GaLore's."""
  grads = gradients(3, kernel=(5, 8))
  adam = ADAM._replace(refresh_every=2)
  updates, states = run(scale_by_fira(adam, 1.0), grads)
  low_rank, _ = run(scale_by_galore(adam, 1.0), grads)
  rest = updates[-1]["kernel"] - low_rank[-1]["kernel"]
  basis = states[-1].projector["kernel"]
  np.testing.assert_allclose(basis.T @ rest, np.zeros((2, 8)), rtol=0, atol=1e-12)
  share = np.linalg.norm(rest) / np.linalg.norm(updates[-1]["kernel"])
  np.testing.assert_allclose(states[-1].residual_share, share, rtol=1e-6)
  assert 0.3 < share < 1


def test_leaves_that_are_not_projected_use_galores_adam(x64):
  grads = gradients(4, kernel=(5, 8), norm=(5,))
  adam = ADAM._replace(refresh_every=2)
  (*_, ours), _ = run(scale_by_fira(adam, 0.25), grads)
  (*_, theirs), _ = run(scale_by_galore(adam, 0.25), grads)
  assert same_bits(ours["norm"], theirs["norm"])


def test_a_gradient_of_0_does_not_stop_the_rest_for_ever(x64):
  """No norm is larger than 1.01 times 0. The limiter starts again after it."""
  grads = gradients(3, kernel=(5, 8))
  grads[0]["kernel"] = 0 * grads[0]["kernel"]
  tx = scale_by_fira(ADAM._replace(refresh_every=1), 1.0)
  updates, states = run(tx, grads)
  assert not updates[0]["kernel"].any() and states[0].norm["kernel"] == 0
  assert states[1].norm["kernel"] > 1e-3 and states[1].limited == 0


def test_limit_0_is_no_limit(x64):
  """The config accepts it, and no norm is limited where 1.01 would limit one."""
  grads = gradients(3, kernel=(5, 8))
  grads[2]["kernel"] = grads[2]["kernel"] * 30
  runs = {limit: run(scale_by_fira(ADAM, 0.25, limit), grads) for limit in (0, np.inf, 1.01)}
  limited = {limit: [int(state.limited) for state in states] for limit, (_, states) in runs.items()}
  assert same_bits(runs[0], runs[np.inf]) and limited[0] == [0, 0, 0] != limited[1.01]
  fira.check(small_model.config("fira", fira__limit=0.0))


def test_norms_are_computed_in_float32_of_bfloat16_gradients():
  grads = gradients(3, jax.numpy.bfloat16, kernel=(5, 8))
  updates, states = run(scale_by_fira(ProjectedAdam(2, 2, matrices), 0.25), grads)
  assert updates[0]["kernel"].dtype == jax.numpy.bfloat16 and states[0].norm["kernel"].dtype == np.float32
  assert np.isfinite(updates[-1]["kernel"].astype(np.float32)).all()


def test_a_kernel_whose_decomposition_fails_has_no_update_before_its_first_projector():
  grads = gradients(4, np.float32, **STACK)
  tx = scale_by_fira(ProjectedAdam(2, 2, matrices, directions=failing), 0.25)
  (first, *_), (state, *_) = run(tx, [with_failure(grads[0], 1), *grads[1:]])
  np.testing.assert_array_equal(np.any(first["up"] != 0, axis=(1, 2)), [True, False, True])
  assert failures(state) == 1 and state.norm["up"][1] == 0
  updates, states = run(tx, [grads[0], grads[1], with_failure(grads[2], 1), grads[3]])
  assert [int(failures(state)) for state in states] == [0, 0, 1, 0]
  kept = [same_bits(states[1].projector["up"][layer], states[2].projector["up"][layer]) for layer in range(3)]
  assert kept == [False, True, False]
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, states)))


# --- in the train step --------------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_metrics_are_logged():
  config = small_model.config("fira", fira__refresh_every=3)
  state, step, losses = small_model.first_state(config, 1), small_model.step(config, 1), []
  for _ in range(10):
    state, report = step(state, small_model.shard_batch(small_model.rows(config, 0), 1))
    report = host(report)
    losses.append(float(report["loss"]))
    assert 0 < report["residual_share"] <= 1 and 0 <= report["limited"] <= 4 and report["svd_failed"] == 0
  assert losses[-1] < losses[0] - 0.3


# --- the config ---------------------------------------------------------------------------------------------------

MISTAKES = {
  "no scale": (dict(fira__scale=0.0), "fira.scale (=0.0) must be greater than 0; set --config.fira.scale"),
  "limit": (
    dict(fira__limit=0.9),
    "fira.limit (=0.9) must be at least 1, or 0 for no limit; below 1 all updates would",
  ),
  "negative": (dict(fira__limit=-1.0), "fira.limit (=-1.0) must be at least 1, or 0 for no limit"),
  "no number": (dict(fira__limit=float("nan")), "fira.limit (=nan) must be a finite number"),
  "optimizer": (dict(optimizer__name="lion"), "optimizer.name (='lion') is not supported by --config.method=fira"),
  "frozen": (dict(frozen_dtype="bfloat16"), "--config.method=fira has no frozen kernels"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_invalid_config_raises_an_error_with_a_remedy(tmp_path, name):
  changes, sentence = MISTAKES[name]
  with pytest.raises(UserError) as caught:
    resolve(tiny_config(tmp_path, method="fira", **changes), devices=8)
  assert sentence in str(caught.value)


def test_the_defaults_are_those_of_the_authors(tmp_path):
  config = resolved(tmp_path, method="fira")
  assert (config.learning_rate, config.min_lr_ratio, config.optimizer.eps) == (1e-2, 0.1, 1e-6)
  assert (config.fira.refresh_every, config.fira.scale, config.fira.limit) == (200, 0.25, 1.01)
  assert fira.warnings(config) == []
