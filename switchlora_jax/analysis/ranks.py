"""What the weights have learnt: their singular values, and the effective rank of W_t - W_0."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from switchlora_jax.lowrank.kernel_storage import KERNEL, frozen_layers, load_kernel
from switchlora_jax.lowrank.layers import ADAPTER, merge
from switchlora_jax.models.weights import in_block

KINDS = ("q", "k", "v", "o", "gate", "up", "down")  # of linear layers, as in Figures 10 and 11


def singular_values(kernels) -> np.ndarray:
  """Those of each of the kernels [layers, in, out], [layers, min(in, out)], the largest first."""
  return np.linalg.svd(kernels, compute_uv=False)


def effective_ranks(values: np.ndarray) -> np.ndarray:
  """The participation ratio, as below, of each layer's singular values [layers, count]; [layers]."""
  squares = values.astype(np.float64) ** 2
  fourth = np.sum(squares**2, -1)
  return np.divide(np.sum(squares, -1) ** 2, fourth, out=np.zeros_like(fourth), where=fourth > 0)


def ranks(values: np.ndarray, largest: np.ndarray, side: int) -> np.ndarray:
  """How many singular values [layers, count] of W_t - W_0 are more than the rounding of float32; [layers].

  NumPy's rule for the rank of a matrix, σ > ε·side·σ₁, but with the σ₁ of W_t: it is rounded, not the difference.

  Args:
    largest: the largest singular value of W_t, [layers]. side: of the matrices, the longer.
  """
  return np.sum(values > np.finfo(np.float32).eps * side * largest[:, None], -1)


def participation_ratio(matrix):
  """(Σσ²)² / Σσ⁴ over the singular values of [in, out]: 1 if one dominates, min(in, out) if all are alike; 0 of zeros.

  From traces of the smaller Gram matrix, without a decomposition.
  """
  matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
  gram = matrix @ matrix.T
  fourth = jnp.sum(gram**2)
  return jnp.where(fourth > 0, jnp.trace(gram) ** 2 / jnp.where(fourth > 0, fourth, 1), 0.0)


def make_learnt_rank(first):
  """(params, frozen, scale) -> the mean participation ratio of W_t - W_0 over all block kernels, [].

  One layer is merged at a time; what it takes is another copy of W_0, drawn again from the seed rather than kept.

  Args:
    first: the run's first program.
  """

  def learnt_rank(params, frozen, scale):
    start = first.create()
    now, then = block_layers(params, frozen), block_layers(start.params, start.frozen)

    def ratio(layer):
      kernels = [in_force(*arrays, s) for arrays, s in zip(layer, (scale, first.scale), strict=True)]
      return participation_ratio((kernels[0] - kernels[1]).astype(jnp.float32))

    in_force = lambda base, adapter, s: merge(load_kernel(base), *adapter, s) if adapter else load_kernel(base)
    return jnp.mean(jnp.concatenate([jax.lax.map(ratio, (now[path], then[path])) for path in now]))

  everywhere = first.abstract.step.sharding
  return jax.jit(learnt_rank, static_argnums=2, out_shardings=everywhere)


def block_layers(params, frozen) -> dict:
  """{path of a layer in the blocks: (its base arrays, its adapter or ())}, stacked along layers, in sorted order."""
  flat = flatten_dict(params)
  adapted = {path: (base, tuple(flat[*path, name] for name in ADAPTER)) for path, base in frozen_layers(frozen).items()}
  plain = {path[:-1]: ({KERNEL: kernel}, ()) for path, kernel in flat.items() if in_block(path)}
  return dict(sorted((adapted | plain).items()))
