"""LDAdam compared with an implementation in NumPy, its error feedback, and its settings."""

import jax
import numpy as np
import pytest
import small_model
from projected import SIDES, failing, gradients, matrices, positive_directions, projector_by_hand, run, with_failure
from small_model import host
from tiny import resolved, tiny_config

from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.methods import ldadam
from switchlora_jax.methods.galore import failures
from switchlora_jax.methods.ldadam import scale_by_ldadam

pytestmark = pytest.mark.two_linear_layers

STACK = {"up": (3, 5, 8), "down": (3, 8, 5)}


def adam_by_hand(grads, b1=0.908, b2=0.99, eps=1e-8):
  """The last direction of Adam."""
  m = v = 0
  for grad in grads:
    m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
  return m / (1 - b1 ** len(grads)) / (np.sqrt(v / (1 - b2 ** len(grads))) + eps)


def ldadam_by_hand(grads, rank, rho, error_feedback=True, b1=0.908, b2=0.99, eps=1e-8):
  """The directions of one kernel [in, out]; a kernel with in > out is transposed."""
  grads = [grad if grad.shape[0] <= grad.shape[1] else grad.T for grad in grads]
  small, large = grads[0].shape
  old, m, v = np.zeros((small, rank)), np.zeros((rank, large)), np.zeros((rank, large))
  error, directions = np.zeros((small, large)), []
  for t, grad in enumerate(grads):
    total = grad + error
    if t == 0:
      new, m_hat, v_hat = projector_by_hand(total, rank), m, v
    else:
      m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
      followed = rho * old @ m_hat + (1 - rho) * total
      new = np.linalg.qr(followed @ followed.T @ old)[0]
    turn = new.T @ old
    transported = turn @ m
    v = (1 - b2**t) * np.abs(turn**2 @ (v_hat - m_hat**2) + (turn @ m_hat) ** 2)
    low = new.T @ total
    if error_feedback:
      error = total - new @ low + b1 / (1 - b1) * (old @ m - new @ transported)
    m, v = b1 * transported + (1 - b1) * low, b2 * v + (1 - b2) * low**2
    directions.append(new @ (m / (1 - b1 ** (t + 1)) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)))
    old = new
  return directions


@pytest.mark.parametrize("error_feedback", [True, False])
@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_25_updates_are_those_of_numpy(sides, error_feedback, x64):
  """The error feedback amplifies differences from update to update."""
  grads = gradients(25, kernel=sides, norm=(5,))
  settings = dict(projected=matrices, directions=positive_directions)
  updates, states = run(scale_by_ldadam(2, 0.8, error_feedback, **settings), grads)
  expected = ldadam_by_hand([grad["kernel"] for grad in grads], 2, 0.8, error_feedback)
  for ours, ref in zip(updates, expected, strict=True):
    ours = ours["kernel"] if sides[0] < sides[1] else ours["kernel"].T
    np.testing.assert_allclose(ours, ref, rtol=0, atol=1e-10)
  np.testing.assert_allclose(updates[-1]["norm"], adam_by_hand([grad["norm"] for grad in grads]), rtol=0, atol=1e-10)
  assert (states[-1].error["kernel"] is not None) == error_feedback and states[-1].error["norm"] is None


@pytest.mark.parametrize("sides", [(4, 8), (8, 4)])
def test_it_is_adam_if_the_directions_stay_axes(sides, x64):
  """Gradients whose rows have disjoint supports: the power iteration keeps the axes, up to their signs.

  Elements without a gradient have moments of about 1e-16, which are divided by eps = 1e-8.
  """
  support = np.kron(np.eye(4), np.ones((1, 2)))
  orient = lambda x: x if sides == (4, 8) else x.T
  grads = [{"kernel": orient(grad["kernel"] * support)} for grad in gradients(6, kernel=(4, 8))]
  basis = jax.numpy.asarray(np.eye(4)[:, [2, 0, 3, 1]])
  updates, _ = run(scale_by_ldadam(4, 0.8, projected=matrices, directions=lambda grad, rank: basis), grads)
  for t, update in enumerate(updates):
    expected = adam_by_hand([grad["kernel"] for grad in grads[: t + 1]])
    np.testing.assert_allclose(update["kernel"], expected, rtol=0, atol=1e-6)


def test_with_all_directions_the_momentum_is_that_of_adam_and_nothing_is_lost(x64):
  """A projector with all directions turns, the moments turn with it, and E stays 0. The division by √v turns too."""
  grads = gradients(4, kernel=(4, 6))
  _, states = run(scale_by_ldadam(4, 0.8, projected=matrices), grads)
  momentum = states[-1].projector["kernel"] @ states[-1].mu["kernel"]
  expected = sum(0.092 * 0.908 ** (3 - t) * grad["kernel"] for t, grad in enumerate(grads))
  np.testing.assert_allclose(momentum, expected, rtol=0, atol=1e-5)  # the first projector is found in float32
  np.testing.assert_allclose(states[-1].error["kernel"], np.zeros((4, 6)), rtol=0, atol=1e-4)


def test_a_failed_first_decomposition_is_repeated_and_the_kernel_does_not_move():
  grads = gradients(3, np.float32, **STACK)
  tx = scale_by_ldadam(2, projected=matrices, directions=failing)
  updates, states = run(tx, [with_failure(grads[0], 1), *grads[1:]])
  moved = [np.any(update["up"] != 0, axis=(1, 2)).tolist() for update in updates]
  assert moved == [[True, False, True], [True] * 3, [True] * 3]
  assert [int(failures(state)) for state in states] == [1, 0, 0] and not states[0].error["up"][1].any()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, states)))


def test_gradients_of_0_keep_the_projector():
  grads = gradients(2, np.float32, kernel=(5, 8))
  tx = scale_by_ldadam(2, 0.0, error_feedback=False, projected=matrices)
  _, states = run(tx, [grads[0], {"kernel": 0 * grads[1]["kernel"]}])
  np.testing.assert_array_equal(states[1].projector["kernel"], states[0].projector["kernel"])


def test_moments_stored_in_bfloat16_keep_their_dtype():
  """They are those of float32 up to a rounding."""
  grads = gradients(2, np.float32, kernel=(5, 8))
  settings = dict(projected=matrices, error_feedback=False)
  narrow, wide = (scale_by_ldadam(2, **settings, moments_dtype=dtype) for dtype in ("bfloat16", "float32"))
  _, states = run(wide, grads[:1])
  rounded = jax.tree.map(lambda x: x.astype("bfloat16"), (states[0].mu, states[0].nu))
  mu, nu = (jax.tree.map(lambda x: x.astype(np.float32), moments) for moments in rounded)
  _, (ours,) = run(narrow, grads[1:], states[0]._replace(mu=rounded[0], nu=rounded[1]))
  _, (ref,) = run(wide, grads[1:], states[0]._replace(mu=mu, nu=nu))
  assert ours.mu["kernel"].dtype == ours.nu["kernel"].dtype == jax.numpy.bfloat16
  for moment in ("mu", "nu"):
    found, expected = getattr(ours, moment)["kernel"], getattr(ref, moment)["kernel"]
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-8, atol=1e-6)


# --- in the train step --------------------------------------------------------------------------------------------


def test_the_loss_falls():
  config = small_model.config("ldadam")
  state, step, losses = small_model.first_state(config, 1), small_model.step(config, 1), []
  for _ in range(10):
    state, report = step(state, small_model.shard_batch(small_model.rows(config, 0), 1))
    losses.append(float(host(report)["loss"]))
  assert losses[-1] < losses[0] - 0.3 and report["svd_failed"] == 0


# --- the config ---------------------------------------------------------------------------------------------------

MISTAKES = {
  "rank 0": (dict(rank=0), "rank (=0) must be at least 1; set --config.rank or use --config.method=full"),
  "rank": (dict(rank=17), "rank (=17) exceeds the smaller side of every kernel (16); lower --config.rank"),
  "rho": (dict(ldadam__rho=1.0), "ldadam.rho (=1.0) must be at least 0 and less than 1; set --config.ldadam.rho"),
  "optimizer": (dict(optimizer__name="sgd"), "optimizer.name (='sgd') is not supported by --config.method=ldadam"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_invalid_config_raises_an_error_with_a_remedy(tmp_path, name):
  changes, sentence = MISTAKES[name]
  with pytest.raises(UserError) as caught:
    resolve(tiny_config(tmp_path, method="ldadam", **changes), devices=8)
  assert sentence in str(caught.value)


def test_the_defaults_are_those_of_the_authors(tmp_path):
  config = resolved(tmp_path, method="ldadam")
  assert (config.learning_rate, config.min_lr_ratio, config.ldadam.rho) == (1e-3, 0.1, 0.908)
  assert (config.optimizer.b1, config.optimizer.b2, config.optimizer.eps) == (0.908, 0.99, 1e-8)
  assert len(ldadam.describe(config)) == 2
  assert len(ldadam.describe(resolved(tmp_path, method="ldadam", ldadam__error_feedback=False))) == 1
