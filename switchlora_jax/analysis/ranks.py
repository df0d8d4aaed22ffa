"""Singular values and ranks of the weights W_t and of their change W_t − W_0 (Figures 10 and 11 of the paper)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from switchlora_jax.lowrank.kernel_storage import KERNEL
from switchlora_jax.lowrank.kinds import kind_of, linear_layers
from switchlora_jax.lowrank.layers import LORA_A
from switchlora_jax.models.weights import in_block

KINDS = ("q", "k", "v", "o", "gate", "up", "down")  # kinds of linear layers, as in Figures 10 and 11


def singular_values(kernels) -> np.ndarray:
  """Singular values of kernels [layers, in, out], in descending order: [layers, min(in, out)]."""
  return np.linalg.svd(kernels, compute_uv=False)


def effective_ranks(values: np.ndarray) -> np.ndarray:
  """The `participation_ratio` of each layer from its singular values [layers, count]: [layers]."""
  squares = values.astype(np.float64) ** 2
  fourth = np.sum(squares**2, -1)
  return np.divide(np.sum(squares, -1) ** 2, fourth, out=np.zeros_like(fourth), where=fourth > 0)


def ranks(values: np.ndarray, largest: np.ndarray, side: int) -> np.ndarray:
  """The numerical rank of W_t − W_0 in float32, per layer: [layers].

  NumPy's rule counts σ > ε·side·σ₁. Here σ₁ is that of W_t, because float32 rounding affects W_t, not the difference.

  Args:
    values: singular values of W_t − W_0, [layers, count].
    largest: the largest singular value of W_t, [layers].
    side: the longer side of the matrices.
  """
  return np.sum(values > np.finfo(np.float32).eps * side * largest[:, None], -1)


def participation_ratio(matrix):
  """The effective rank (Σσ²)² / Σσ⁴ of a matrix [in, out].

  It is 1 if one singular value dominates, min(in, out) if all are equal, and 0 for a matrix of zeros. It is computed
  from traces of the smaller Gram matrix, without a decomposition.
  """
  matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
  gram = matrix @ matrix.T
  fourth = jnp.sum(gram**2)
  return jnp.where(fourth > 0, jnp.trace(gram) ** 2 / jnp.where(fourth > 0, fourth, 1), 0.0)


def make_learnt_rank(first):
  """The jitted (params, frozen, scale) -> mean effective rank of W_t − W_0 over all kernels of the blocks, [].

  W_0 is recomputed from the seed instead of being stored, so the function needs memory for a second copy of the weights
  while it runs. It merges one layer at a time.

  Args:
    first: the first phase of the run.
  """

  def learnt_rank(params, frozen, scale):
    start = first.create()
    now, then = block_layers(params, frozen), block_layers(start.params, start.frozen)

    def ratio(layer):
      kernels = [merged(arrays, s) for arrays, s in zip(layer, (scale, first.scale), strict=True)]
      return participation_ratio((kernels[0] - kernels[1]).astype(jnp.float32))

    merged = lambda arrays, s: kind_of(arrays).merged(arrays, s) if LORA_A in arrays else arrays[KERNEL]
    return jnp.mean(jnp.concatenate([jax.lax.map(ratio, (now[path], then[path])) for path in now]))

  replicated = first.abstract.step.sharding
  return jax.jit(learnt_rank, static_argnums=2, out_shardings=replicated)


def block_layers(params, frozen) -> dict:
  """{path of a linear layer: its arrays by name} of the blocks, stacked along layers, sorted by path."""
  plain = {path[:-1]: {KERNEL: kernel} for path, kernel in flatten_dict(params).items() if in_block(path)}
  return dict(sorted((linear_layers(params, frozen) | plain).items()))
