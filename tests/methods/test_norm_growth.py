"""The norm-growth limiter: its ratio, its first update, and updates of 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchlora_jax.methods.norm_growth import limit_norm_growth, norm_over

limit = jax.jit(limit_norm_growth)


def test_each_matrix_is_limited_by_its_own_previous_norm():
  """Norms 5: before 0 (no previous update), 4 (limited to 4.04), 4.96 (below the limit of 5.0096) and 10."""
  update = np.zeros((4, 2, 3), np.float32)
  update[:, 0, 0], update[:, 1, 2] = 3, -4
  before = np.array([0, 4, 4.96, 10], np.float32)
  limited, norm, acted = limit(update, before, 1.01)
  np.testing.assert_array_equal(acted, [False, True, False, False])
  np.testing.assert_allclose(norm, [5, 4.04, 5, 5], rtol=1e-6)
  np.testing.assert_array_equal(np.asarray(limited)[[0, 2, 3]], update[[0, 2, 3]])
  np.testing.assert_allclose(limited[1], update[1] * 4.04 / 5, rtol=1e-6)


def test_successive_updates_grow_by_at_most_gamma_and_may_fall():
  norm, norms, update = np.zeros(4, np.float32), [], np.zeros((4, 2, 3), np.float32)
  for size in (1, 100, 100, 0.5, 100):
    update[:, 0, 0] = size
    _, norm, _ = limit(update, norm, 1.01)
    norms.append(norm[0])
  np.testing.assert_allclose(norms, [1, 1.01, 1.01**2, 0.5, 0.505], rtol=1e-6)


def test_an_update_of_0_does_not_stop_the_next_one():
  """The ratio to it is infinite; a limit of 0 would keep all later updates at 0."""
  zero, update = np.zeros((4, 2, 3), np.float32), np.ones((4, 2, 3), np.float32)
  limited, norm, acted = limit(zero, np.ones(4, np.float32), 1.01)
  assert not np.any(limited) and not np.any(norm) and not np.any(acted)
  limited, norm, acted = limit(update, norm, 1.01)
  np.testing.assert_array_equal(limited, update)
  assert not np.any(acted)


@pytest.mark.parametrize("gamma", [0, jnp.inf])
def test_no_limit_is_gamma_0_or_infinity(gamma):
  update, before = np.ones((4, 2, 3), np.float32), np.array([0, 1e-6, 1, 9], np.float32)
  limited, norm, acted = limit(update, before, gamma)
  np.testing.assert_array_equal(limited, update)
  np.testing.assert_allclose(norm, 6**0.5, rtol=1e-6)
  assert not np.any(acted)


def test_norms_of_bfloat16_are_float32_and_the_update_keeps_its_dtype():
  ones = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
  limited, norm, _ = jax.eval_shape(limit_norm_growth, ones, jax.ShapeDtypeStruct((), jnp.float32), 1.01)
  assert (limited.dtype, norm.dtype, norm.shape) == (jnp.bfloat16, jnp.float32, ())
  norm = norm_over(np.ones((3, 43), jnp.bfloat16), (-2, -1))
  assert norm.dtype == jnp.float32 and norm.shape == (1, 1)
  np.testing.assert_allclose(norm, 129**0.5, rtol=1e-6)  # 11.375 in bfloat16
