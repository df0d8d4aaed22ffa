"""FRUGAL compared with an implementation in NumPy, what happens when projectors change, and its settings."""

import jax
import numpy as np
import pytest
import small_model
from projected import (
  SIDES,
  equations,
  failing,
  gradients,
  matrices,
  positive_directions,
  projector_by_hand,
  run,
  with_failure,
)
from small_model import host, same_bits
from tiny import resolved, tiny_config

from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.methods import frugal, projectors
from switchlora_jax.methods.frugal import scale_by_frugal
from switchlora_jax.methods.galore import ProjectedAdam, failures

pytestmark = pytest.mark.two_linear_layers

HYPER = dict(rank=2, refresh_every=4, sign_scale=0.5)
ADAM = ProjectedAdam(HYPER["rank"], HYPER["refresh_every"], matrices, eps=1e-8, directions=positive_directions)
STACK = {"up": (3, 5, 8), "down": (3, 8, 5)}


def adam_by_hand(grads, b1=0.9, b2=0.999, eps=1e-8):
  """The last direction of Adam with eps on the uncorrected √v."""
  m = v = 0
  for grad in grads:
    m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
  return np.sqrt(1 - b2 ** len(grads)) / (1 - b1 ** len(grads)) * m / (np.sqrt(v) + eps)


def frugal_by_hand(grads, rank, refresh_every, sign_scale):
  """The updates of one kernel [in, out]: Adam sees only the gradients since the last change of the projector."""
  updates = []
  for t, grad in enumerate(grads):
    since = t - t % refresh_every
    basis = projector_by_hand(grads[since], rank)
    if grad.shape[0] <= grad.shape[1]:
      down, up = lambda x, basis=basis: basis.T @ x, lambda x, basis=basis: basis @ x
    else:
      down, up = lambda x, basis=basis: x @ basis, lambda x, basis=basis: x @ basis.T
    step = adam_by_hand([down(x) for x in grads[since : t + 1]])
    updates.append(up(step) + sign_scale * np.sign(grad - up(down(grad))))
  return updates


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_25_updates_are_those_of_numpy(sides, x64):
  """With 7 projectors. Adam of a leaf that is not projected does not start anew."""
  grads = gradients(25, kernel=sides, norm=(5,))
  tx = scale_by_frugal(ADAM, HYPER["sign_scale"])
  updates, states = run(tx, grads)
  for ours, ref in zip(updates, frugal_by_hand([grad["kernel"] for grad in grads], **HYPER), strict=True):
    np.testing.assert_allclose(ours["kernel"], ref, rtol=0, atol=1e-10)
  expected = adam_by_hand([grad["norm"] for grad in grads])
  np.testing.assert_allclose(updates[-1]["norm"], expected, rtol=0, atol=1e-10)
  assert [int(state.age["kernel"]) for state in states[:6]] == [1, 2, 3, 4, 1, 2]


def test_stacked_layers_are_updated_like_single_layers(x64):
  grads = gradients(6, **STACK)
  updates, _ = run(scale_by_frugal(ADAM, HYPER["sign_scale"]), grads)
  for name in STACK:
    for layer in range(3):
      expected = frugal_by_hand([grad[name][layer] for grad in grads], **HYPER)
      np.testing.assert_allclose(updates[-1][name][layer], expected[-1], rtol=0, atol=1e-10)


def test_signs_of_rounding_errors_are_not_applied():
  """If the projector has all directions, nothing is left for signSGD."""
  grads = gradients(2, np.float32, kernel=(4, 6))
  with_signs, _ = run(scale_by_frugal(ProjectedAdam(4, 2, matrices), 1.0), grads)
  without, _ = run(scale_by_frugal(ProjectedAdam(4, 2, matrices), 0.0), grads)
  assert same_bits(with_signs, without) and with_signs[-1]["kernel"].any()


@pytest.mark.parametrize(("dtype", "tall"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_a_gradient_of_rank_at_most_r_has_no_signs(dtype, tall):
  """Rank 4 with r = 8: the rest is rounding errors, also those of projectors, gradients and products in bfloat16."""
  (factors,) = gradients(1, a=(128, 4), b=(4, 300))
  grad = (factors["a"] @ factors["b"] * np.logspace(-3, 0, 300)).astype(dtype)
  grads = [{"kernel": grad.T if tall else grad}]
  (with_signs,), _ = run(scale_by_frugal(ProjectedAdam(8, 2, matrices), 1.0), grads)
  (without,), _ = run(scale_by_frugal(ProjectedAdam(8, 2, matrices), 0.0), grads)
  assert same_bits(with_signs, without) and with_signs["kernel"].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rest_of_a_gradient_of_full_rank_has_signs(dtype):
  """The tolerance leaves out 2 · 2⁻⁵ · 0.4 of the elements in bfloat16, 2.5%, and 1 of 40,000 in float32."""
  (grads,) = gradients(1, dtype, kernel=(64, 96))
  projected = projectors.leading_directions(grads["kernel"], 8)
  signs = np.asarray(frugal.rest_signs(grads["kernel"], projected.T @ grads["kernel"], projected), np.float32)
  exact = np.asarray(grads["kernel"], np.float64)
  left = projector_by_hand(exact, 8)
  expected = np.sign(exact - left @ (left.T @ exact))
  assert set(np.unique(signs)) <= {-1, 0, 1} and signs.dtype == np.float32
  share = np.mean(signs == expected)
  assert share > (0.96 if dtype == "bfloat16" else 0.999)


def test_with_coordinates_exactly_the_other_rows_have_signs():
  """Also in bfloat16, in which the projection of a row to its axis is exact."""
  for dtype in ("float32", "bfloat16"):
    (grads,) = gradients(1, dtype, kernel=(16, 24))
    axes = projectors.random_coordinates(grads["kernel"], 4, jax.random.key(0))
    signs = np.asarray(frugal.rest_signs(grads["kernel"], axes.T @ grads["kernel"], axes), np.float32)
    chosen = np.asarray(axes, bool).any(1)
    assert chosen.sum() == 4 and not signs[chosen].any()
    kept = signs[~chosen] == np.sign(np.asarray(grads["kernel"], np.float32)[~chosen])
    assert kept.mean() > (0.95 if dtype == "bfloat16" else 0.999)


def test_products_of_the_rest_are_not_rounded_to_tf32():
  """The CPU ignores the precision of a product; GPUs may round its factors to 10 bits unless it is HIGHEST."""
  (grads,) = gradients(1, np.float32, kernel=(4, 6))
  tx = scale_by_frugal(ProjectedAdam(2, 2, matrices), 1.0)
  traced = jax.make_jaxpr(tx.update)(grads, tx.init(grads))
  highest = (jax.lax.Precision.HIGHEST,) * 2
  found = [
    (equation.outvars[0].aval.shape, equation.params["precision"] == highest)
    for equation in equations(traced.jaxpr)
    if equation.primitive.name == "dot_general"
  ]
  assert sorted(found) == [((2, 6), True), ((4, 6), False), ((4, 6), True)], "PᵀG, P·N and P·(PᵀG)"


def test_a_failed_decomposition_keeps_moments_and_age_and_is_repeated():
  """Before its first projector, a kernel has no update, not that of signSGD either."""
  grads = gradients(5, np.float32, **STACK)
  tx = scale_by_frugal(ProjectedAdam(2, 2, matrices, directions=failing))
  (first, *_), (state, *_) = run(tx, [with_failure(grads[0], 1)])
  np.testing.assert_array_equal(np.any(first["up"] != 0, axis=(1, 2)), [True, False, True])
  assert failures(state) == 1
  updates, states = run(tx, [grads[0], grads[1], with_failure(grads[2], 1), *grads[3:]])
  assert [int(failures(state)) for state in states] == [0, 0, 1, 0, 0]
  ages = [state.age["up"].tolist() for state in states]
  assert ages == [[1, 1, 1], [2, 2, 2], [1, 3, 1], [2, 1, 2], [1, 1, 1]]
  kept = [same_bits(states[1].projector["up"][layer], states[2].projector["up"][layer]) for layer in range(3)]
  assert kept == [False, True, False]
  low = np.swapaxes(states[3].projector["up"][1], 0, 1) @ grads[3]["up"][1]
  np.testing.assert_allclose(states[3].mu["up"][1], 0.1 * low, rtol=1e-4, atol=1e-6)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, states)))


# --- in the train step --------------------------------------------------------------------------------------------


def test_the_loss_falls_and_moments_start_anew_with_a_projector():
  config = small_model.config("frugal", frugal__refresh_every=3)
  state, step, losses, ages = small_model.first_state(config, 1), small_model.step(config, 1), [], []
  for _ in range(10):
    state, report = step(state, small_model.shard_batch(small_model.rows(config, 0), 1))
    losses.append(float(report["loss"]))
    ages.append(set(np.concatenate([age for age in jax.tree.leaves(host(state.opt_state.age))])))
  assert ages[:5] == [{1}, {2}, {3}, {1}, {2}]
  assert losses[-1] < losses[0] - 0.3 and report["svd_failed"] == 0


# --- the config ---------------------------------------------------------------------------------------------------

MISTAKES = {
  "scale": (dict(frugal__sign_scale=-1.0), "frugal.sign_scale (=-1.0) must not be negative; set --config.frugal.sign"),
  "no number": (dict(frugal__sign_scale=float("nan")), "frugal.sign_scale (=nan) must be a finite number"),
  "optimizer": (dict(optimizer__name="muon"), "optimizer.name (='muon') is not supported by --config.method=frugal"),
  "frozen": (dict(frozen_dtype="bfloat16"), "--config.method=frugal has no frozen kernels"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_invalid_config_raises_an_error_with_a_remedy(tmp_path, name):
  changes, sentence = MISTAKES[name]
  with pytest.raises(UserError) as caught:
    resolve(tiny_config(tmp_path, method="frugal", **changes), devices=8)
  assert sentence in str(caught.value)


def test_the_defaults_are_those_of_the_authors(tmp_path):
  config = resolved(tmp_path, method="frugal")
  assert (config.learning_rate, config.min_lr_ratio, config.optimizer.eps) == (1e-3, 0.1, 1e-8)
  assert (config.frugal.refresh_every, config.frugal.sign_scale) == (200, 1.0)


def test_a_run_without_signs_is_warned(tmp_path):
  assert frugal.warnings(resolved(tmp_path, method="frugal")) == []
  (warning,) = frugal.warnings(resolved(tmp_path, method="frugal", frugal__sign_scale=0.0))
  assert warning.startswith("with frugal.sign_scale = 0 only the projected gradient is used")
