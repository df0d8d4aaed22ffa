"""Transport of Adam's moments through a switch, in place of their reset.

The gradient of the vector b_k is s·Ga_k with the gradient G of the merged weight, so the moments of b_k belong to its
counterpart a_k. A switch replaces a_k by a'. The least-squares approximation of a' by all vectors a_j of the factor is
Σ_j c_j a_j with c = (AAᵀ + εI)⁻¹A a', which gives an estimate of the first moment that b_k would have with a':

  m(b_k) ← Σ_j c_j m(b_j)

The part of a' outside the span of A contributes nothing, because G is not known there. The second moment is the mean
over all vectors, for counterparts of the length of a':

  v(b_k) ← ‖a'‖² · Σ_j v(b_j) / Σ_j ‖a_j‖²

The vectors of A are treated in the same way. Step counts do not change. Not in the paper.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.scipy.linalg import cho_factor, cho_solve

from switchlora_jax.lowrank.layers import LORA_A, LORA_B
from switchlora_jax.lowrank.optimizer import is_vector_adam

RIDGE = 1e-3  # ε / the mean of ‖a_j‖²: bounds c where vectors of a factor are nearly parallel


def transport_moments(opt_state, before, after, switched):
  """Transport the moments of the vectors whose counterparts were switched.

  Args:
    opt_state: an optimizer state that is or contains a `VectorAdamState`.
    before, after: the parameters before and after the switch.
    switched: `Switched.reset`, which marks those vectors: [..., r, 1] bool, or False for other parameters.
  Returns:
    The optimizer state; where nothing is marked, it is bitwise the same.
  """
  before, after, switched = map(flatten_dict, (before, after, switched))
  marked = {path: mask for path, mask in switched.items() if jnp.ndim(mask)}

  def transported(state):
    if not is_vector_adam(state):
      return state
    mu, nu = flatten_dict(state.mu), flatten_dict(state.nu)
    for (*path, name), mask in marked.items():
      own, counterpart = (*path, name), (*path, {LORA_A: LORA_B, LORA_B: LORA_A}[name])
      mu[own], nu[own] = transport(mu[own], nu[own], before[counterpart], after[counterpart], mask)
    return state._replace(mu=unflatten_dict(mu), nu=unflatten_dict(nu))

  return jax.tree.map(transported, opt_state, is_leaf=is_vector_adam)


def transport(mu, nu, before, after, switched):
  """The moments of one factor, for any number of stacked layers.

  Args:
    mu, nu: moments of the factor, [..., r, d].
    before, after: the other factor before and after the switch, [..., r, e].
    switched: [..., r, 1] bool, the rows that differ between `before` and `after`.
  Returns:
    mu and nu, in their dtypes.
  """
  wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))

  def moved(_, moments):
    mu, nu = map(wide, moments)
    old, new = wide(before), wide(after)
    lengths = lambda rows: jnp.sum(rows * rows, -1, keepdims=True)  # ‖a_j‖², [..., r, 1]
    tiny = jnp.finfo(old.dtype).tiny
    ridge = RIDGE * jnp.mean(lengths(old), -2, keepdims=True) + tiny**0.5
    gram = old @ old.mT
    gram += ridge * jnp.broadcast_to(jnp.eye(old.shape[-2], dtype=old.dtype), gram.shape)
    coefficients = cho_solve(cho_factor(gram), old @ new.mT).mT  # [..., r, r], a row c for each new vector
    total = jnp.sum(lengths(old), -2, keepdims=True)
    mean = jnp.where(total > 0, jnp.sum(nu, -2, keepdims=True) / jnp.maximum(total, tiny), 0)
    mu, nu = jnp.where(switched, coefficients @ mu, mu), jnp.where(switched, lengths(new) * mean, nu)
    return tuple(x.astype(moment.dtype) for x, moment in zip((mu, nu), moments, strict=True))

  # A loop with 0 or 1 iterations: steps without a switch do no work, and XLA copies arrays that pass a conditional.
  return jax.lax.fori_loop(0, jnp.any(switched).astype(jnp.int32), moved, (mu, nu))
