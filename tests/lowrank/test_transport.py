"""Transport of Adam's moments: the formulas in numpy, what stays the same, and gradients that it predicts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_model import host, same_bits

from switchlora_jax.lowrank.optimizer import VectorAdamState, scale_by_vector_adam
from switchlora_jax.lowrank.transport import RIDGE, transport, transport_moments

R, IN, OUT, LAYERS = 6, 24, 17, 3


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


def switched_rows(*rows):
  """[LAYERS, R, 1] bool: these rows of the first layer, and none of the others."""
  mask = np.zeros((LAYERS, R, 1), bool)
  mask[0, list(rows)] = True
  return mask


def reference(mu, nu, before, after, switched):
  """The formulas of the module for one layer, row by row in float64."""
  mu, nu, (old_mu, old_nu) = mu.copy(), nu.copy(), (mu, nu)
  squares = np.sum(before**2, 1)
  inverse = np.linalg.inv(before @ before.T + RIDGE * squares.mean() * np.eye(len(before)))
  for k in np.flatnonzero(switched):
    mu[k] = inverse @ before @ after[k] @ old_mu
    nu[k] = after[k] @ after[k] * old_nu.sum(0) / squares.sum()
  return mu, nu


def test_the_formulas_in_float64(x64):
  mu, nu, before = draw(0, LAYERS, R, OUT), draw(1, LAYERS, R, OUT) ** 2, draw(2, LAYERS, R, IN)
  mask = switched_rows(1, 4)
  after = np.where(mask, draw(3, LAYERS, R, IN), before)
  found = jax.jit(transport)(mu, nu, before, after, mask)
  expected = zip(*(reference(*arrays) for arrays in zip(mu, nu, before, after, mask[..., 0], strict=True)), strict=True)
  for x, y in zip(found, map(np.stack, expected), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-13)


def test_the_first_moment_is_that_of_the_gradients_with_the_new_vector(x64):
  """Of a vector in the span of the old ones; the moment of b_k is a_k·M for an average gradient M [in, out]."""
  gradient, before = draw(0, IN, OUT), draw(1, LAYERS, R, IN)
  mask, inside = switched_rows(2), draw(2, R) @ before[0]
  after = np.where(mask, inside, before)
  mu, nu = before @ gradient, np.ones((LAYERS, R, OUT))
  found = transport(mu, nu, before, after, mask)[0]
  np.testing.assert_allclose(found[0, 2], inside @ gradient, rtol=0.02)
  orthogonal = inside - np.linalg.lstsq(before[0].T, inside, rcond=None)[0] @ before[0]
  found = transport(mu, nu, before, np.where(mask, orthogonal, before), mask)[0]
  np.testing.assert_allclose(found[0, 2], 0, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_other_rows_and_layers_keep_their_bits(dtype):
  mu, nu, before = (jnp.asarray(draw(seed, LAYERS, R, IN), dtype) for seed in range(3))
  mask = switched_rows(0)
  after = jnp.where(mask, jnp.asarray(draw(3, LAYERS, R, IN), dtype), before)
  found = host(transport(mu, nu**2, before, after, mask))
  for x, y in zip(found, host((mu, nu**2)), strict=True):
    assert x.dtype == y.dtype and same_bits(x[1:], y[1:]) and same_bits(x[0, 1:], y[0, 1:])
    assert not same_bits(x[0, 0], y[0, 0])
  assert same_bits(transport(mu, nu**2, before, after, switched_rows()), (mu, nu**2))


def test_vectors_that_are_zero_or_parallel_give_finite_moments():
  """B is zero at the start with switch.init=lora."""
  mask, ones = switched_rows(0, 1), np.ones((LAYERS, R, IN), np.float32)
  for before in (0 * ones, ones, 1e-18 * ones, 1e15 * ones):
    after = np.where(mask, 2 * before, before)
    mu, nu = transport(ones, ones, before, after, mask)
    assert np.all(np.isfinite(mu)) and np.all(np.isfinite(nu)) and np.all(nu >= 0)


def test_it_finds_the_moments_in_a_chain_and_leaves_other_parameters(x64):
  params = {"q": {"lora_a": draw(0, R, IN), "lora_b": draw(1, R, OUT)}, "norm": draw(2, IN)}
  adam = scale_by_vector_adam(vectors=lambda p: {"q": {"lora_a": True, "lora_b": True}, "norm": False})
  tx = optax.chain(optax.identity(), adam)
  _, state = tx.update(params, tx.init(params), params)
  rows = lambda *marked: np.isin(np.arange(R), marked)[:, None]
  after = {"q": {"lora_a": np.where(rows(3), draw(3, R, IN), params["q"]["lora_a"]), "lora_b": params["q"]["lora_b"]}}
  switched = {"q": {"lora_a": rows(), "lora_b": rows(3)}, "norm": False}
  moved = transport_moments(state, params, after | {"norm": params["norm"]}, switched)
  assert jax.tree.structure(moved) == jax.tree.structure(state) and isinstance(moved[1], VectorAdamState)
  assert same_bits(moved[1].count, state[1].count)
  expected = transport(
    state[1].mu["q"]["lora_b"], state[1].nu["q"]["lora_b"], params["q"]["lora_a"], after["q"]["lora_a"], rows(3)
  )
  for name, theirs in zip(("mu", "nu"), expected, strict=True):
    ours, old = getattr(moved[1], name), getattr(state[1], name)
    assert same_bits(ours["q"]["lora_b"], theirs) and not same_bits(ours["q"]["lora_b"], old["q"]["lora_b"])
    assert same_bits((ours["norm"], ours["q"]["lora_a"]), (old["norm"], old["q"]["lora_a"]))
