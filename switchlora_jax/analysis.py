"""What training has changed: the effective rank of W_t - W_0."""

import jax
import jax.numpy as jnp

from switchlora_jax import weights


def participation_ratio(matrix):
  """(Σσ²)² / Σσ⁴ over the singular values of [in, out]: 1 if one dominates, min(in, out) if all are alike; 0 of zeros.

  From traces of the smaller Gram matrix, without a decomposition.
  """
  matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
  gram = matrix @ matrix.T
  fourth = jnp.sum(gram**2)
  return jnp.where(fourth > 0, jnp.trace(gram) ** 2 / jnp.where(fourth > 0, fourth, 1), 0.0)


def make_learnt_rank(first):
  """(state, scale) -> the mean participation ratio of W_t - W_0 over all block kernels, [].

  Args:
    first: the run's first program; W_0 is drawn again from its seed rather than kept.
  """

  def learnt_rank(params, frozen, scale):
    start = first.create()
    now, then = weights.merged(params, frozen, scale), weights.merged(start.params, start.frozen, first.scale)
    stacks = [a - b for a, b in zip(*map(weights.block_kernels, (now, then)), strict=True)]
    ratios = [jax.lax.map(participation_ratio, stack.astype(jnp.float32)) for stack in stacks]
    return jnp.mean(jnp.concatenate(ratios))

  return jax.jit(learnt_rank, static_argnums=2)
