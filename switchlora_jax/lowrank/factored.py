"""Linear layers without a dense base kernel: a trained low-rank product, alone or with a trained sparse matrix.

The arrays of a layer are in two collections:

  params   lora_a [r, in], lora_b [r, out]: the factors, as in `lowrank.layers`; of a layer with a sparse part also
           sparse_values [k].
  frozen   of a layer with a sparse part: sparse_support [k] int32, the positions of the values in the flattened kernel
           [in · out], unique and ascending.

In the notation of `lowrank.layers`, `FactoredDense` computes `y = s·B·A x`, and `SparseFactoredDense` computes
`y = (s·B·A + S) x` with k nonzero elements in S.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from switchlora_jax.lowrank.layers import KERNEL_STD, LORA_A, LORA_B, adapter_scale

VALUES, SUPPORT = "sparse_values", "sparse_support"
SAVED = "linear"  # checkpoint name under which the models save the outputs of linear layers


def low_rank_kernel(lora_a, lora_b, scale, dtype=None):
  """The kernel `scale·AᵀB`, [..., in, out], in the wider of the factors' dtype and `dtype`.

  Args:
    lora_a: [..., r, in].
    lora_b: [..., r, out].
    scale: s = α/r.
    dtype: the factors are cast to it before they are multiplied; None: that of the factors.
  """
  dtype = dtype or lora_a.dtype
  wide = jnp.promote_types(lora_a.dtype, dtype)
  return scale * jnp.matmul(lora_a.mT.astype(dtype), lora_b.astype(dtype), preferred_element_type=wide)


def support_size(in_features: int, out_features: int, density: float) -> int:
  """k, the number of elements of the sparse part: the share `density` of the kernel, at least 1."""
  return max(1, round(density * in_features * out_features))


def draw_support(key, in_features: int, out_features: int, density: float):
  """k positions in the flattened kernel [in · out], drawn uniformly without replacement: [k] int32, ascending."""
  size = in_features * out_features
  chosen = jax.random.choice(key, size, (support_size(in_features, out_features, density),), replace=False)
  return jnp.sort(chosen).astype(jnp.int32)


def add_at_support(kernel, support, values):
  """A kernel [..., in, out] plus the sparse matrix with `values` [..., k] at the positions `support` [..., k]."""
  if kernel.ndim > 2:
    return jax.vmap(add_at_support)(kernel, support, values)
  at_support = kernel.reshape(-1).at[support]
  return at_support.add(values.astype(kernel.dtype), indices_are_sorted=True, unique_indices=True).reshape(kernel.shape)


def at_support(kernel, support):
  """The elements of a kernel [in, out] at the positions `support` [k]: [k]."""
  return kernel.reshape(-1).at[support].get(indices_are_sorted=True, unique_indices=True)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def factored_dense(x, lora_a, lora_b, scale):
  """`scale·(x·Aᵀ)·B` for x [..., in]; returns [..., out] in x's dtype.

  With p = r·(in + out) weights this takes 6p operations per token, forward and backward; full rank takes 6·in·out.
  The gradients of the factors are summed over the tokens in the dtype of the factors.
  """
  return _narrow(x, lora_a, scale) @ lora_b.astype(x.dtype)


def _narrow(x, lora_a, scale):
  """`scale·x·Aᵀ`, [..., r]; kept for the backward pass."""
  return checkpoint_name(scale * (x @ lora_a.T.astype(x.dtype)), SAVED)


def _factored_forward(x, lora_a, lora_b, scale):
  narrow = _narrow(x, lora_a, scale)
  return narrow @ lora_b.astype(x.dtype), (x, narrow, lora_a, lora_b)


def _factored_backward(scale, residuals, dy):
  x, narrow, lora_a, lora_b = residuals
  d_narrow = scale * (dy @ lora_b.T.astype(x.dtype))
  dx = d_narrow @ lora_a.astype(x.dtype)
  return dx, _summed_product(d_narrow, x, lora_a.dtype), _summed_product(narrow, dy, lora_b.dtype)


factored_dense.defvjp(_factored_forward, _factored_backward)


def _summed_product(left, right, dtype):
  """`leftᵀ·right` summed over all leading axes, accumulated in the wider of their dtype and `dtype`."""
  left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
  return jnp.matmul(left.T, right, preferred_element_type=jnp.promote_types(left.dtype, dtype)).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def sparse_factored_dense(x, lora_a, lora_b, values, support, scale):
  """`x · (scale·AᵀB + S)` for x [..., in]; returns [..., out] in x's dtype.

  The forward and the backward pass each multiply once with the merged weight, which the backward pass computes again.
  The gradient G = xᵀ·dy of the merged weight gives all others: `scale·B·Gᵀ`, `scale·A·G`, and G at the support. This
  takes 6·in·out operations per token, as full rank, and 8·r·in·out per batch. G is an array of one layer, [in, out] in
  the dtype of the values.
  """
  return x @ _merged(x.dtype, lora_a, lora_b, values, support, scale)


def _merged(dtype, lora_a, lora_b, values, support, scale):
  return add_at_support(low_rank_kernel(lora_a, lora_b, scale, dtype), support, values).astype(dtype)


def _sparse_forward(x, *factors_and_scale):
  return sparse_factored_dense(x, *factors_and_scale), (x, *factors_and_scale[:-1])


def _sparse_backward(scale, residuals, dy):
  x, lora_a, lora_b, values, support = residuals
  dx = dy @ _merged(x.dtype, lora_a, lora_b, values, support, scale).T
  gradient = _summed_product(x, dy, values.dtype)
  scaled = (scale * gradient).astype(x.dtype)
  d_a = _summed_product(lora_b.T.astype(x.dtype), scaled.T, lora_a.dtype)
  d_b = _summed_product(lora_a.T.astype(x.dtype), scaled, lora_b.dtype)
  return dx, d_a, d_b, at_support(gradient, support), None


sparse_factored_dense.defvjp(_sparse_forward, _sparse_backward)


class FactoredDense(nn.Module):
  """A linear layer without bias whose kernel is a trainable low-rank product.

  The factors are initialised so that the elements of `scale·AᵀB` have the standard deviation of a plain kernel and both
  factors have equal norms, as after a refactorisation. A zero factor, as in LoRA, would be a stationary point of a
  transformer: with all kernels 0, no factor of a block has a gradient.

  Attributes:
    features: number of outputs.
    rank: r, the number of rows of each factor.
    alpha: the product is scaled by `alpha / rank`.
    dtype: dtype of the computation.
    param_dtype: dtype of the stored arrays.
  """

  features: int
  rank: int
  alpha: float = 1.0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @property
  def scale(self) -> float:
    """s = α/r."""
    return adapter_scale(self.rank, self.alpha)

  @nn.compact
  def __call__(self, x):
    """Map x [..., in] to [..., features], in `dtype`."""
    return factored_dense(x.astype(self.dtype), *self._factors(x.shape[-1]), self.scale)

  def _factors(self, in_features: int):
    ratio = (self.features / in_features) ** 0.5
    variance = KERNEL_STD / (self.scale * self.rank**0.5)  # the product of both standard deviations
    a, b = (nn.initializers.normal((variance * x) ** 0.5) for x in (ratio, 1 / ratio))
    lora_a = self.param(LORA_A, a, (self.rank, in_features), self.param_dtype)
    return lora_a, self.param(LORA_B, b, (self.rank, self.features), self.param_dtype)


class SparseFactoredDense(FactoredDense):
  """A linear layer without bias whose kernel is a trainable low-rank product plus a trainable sparse matrix.

  Initialised as in SLTrain (Han et al. 2024, arXiv 2406.02214): A and the sparse values are uniform in ±1/√in, and B is
  zero. The support is drawn uniformly at initialisation, is stored in `frozen`, and is never changed.

  A layer stores r·(in + out) + k trained elements and k int32 positions, with k = density·in·out.

  Attributes:
    density: δ, the share of the elements of the kernel in the sparse part.
  """

  density: float = 0.03

  @nn.compact
  def __call__(self, x):
    """Map x [..., in] to [..., features], in `dtype`."""
    size = (x.shape[-1], self.features, self.density)
    draw = lambda: draw_support(self.make_rng("params"), *size)
    support = self.variable("frozen", SUPPORT, draw).value
    values = self.param(VALUES, _uniform(x.shape[-1]), (support_size(*size),), self.param_dtype)
    factors = self._factors(x.shape[-1])
    return sparse_factored_dense(x.astype(self.dtype), *factors, values, support, self.scale)

  def _factors(self, in_features: int):
    lora_a = self.param(LORA_A, _uniform(in_features), (self.rank, in_features), self.param_dtype)
    return lora_a, self.param(LORA_B, nn.initializers.zeros, (self.rank, self.features), self.param_dtype)


def _uniform(in_features: int):
  """An initialiser, uniform in ±1/√in."""
  bound = in_features**-0.5
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


# --- factors of a given product ---------------------------------------------------------------------------------------


def refactored(lora_a, lora_b):
  """Factors of the same product AᵀB = UΣVᵀ from its singular value decomposition: `√Σ·Uᵀ` and `√Σ·Vᵀ`.

  The decomposition of the r × r core of the QR decompositions of both factors replaces that of the product [in, out].
  It is computed in float32 or wider. Factors stay as they are if a result is not finite or the product has a singular
  value of exactly 0, because two rows of zeros would have no gradient.

  Shapes: lora_a [r, in], lora_b [r, out] with r ≤ min(in, out), and the same for the result.
  """
  wide = jnp.promote_types(lora_a.dtype, jnp.float32)
  with jax.default_matmul_precision("highest"):
    (q_a, r_a), (q_b, r_b) = (jnp.linalg.qr(x.mT.astype(wide)) for x in (lora_a, lora_b))
    left, values, right = jnp.linalg.svd(r_a @ r_b.mT, full_matrices=False)
    root = jnp.sqrt(values)[:, None]
    new = (root * (left.mT @ q_a.mT)).astype(lora_a.dtype), (root * (right @ q_b.mT)).astype(lora_b.dtype)
  usable = jnp.all(values > 0) & jnp.all(jnp.isfinite(new[0])) & jnp.all(jnp.isfinite(new[1]))
  return tuple(jnp.where(usable, x, old) for x, old in zip(new, (lora_a, lora_b), strict=True))


def best_factors(kernel, rank: int, scale):
  """The factors of the best approximation of a kernel by `scale·AᵀB`: A [r, in] and B [r, out] of equal norms.

  It is the truncated singular value decomposition, computed in float32 or wider.
  """
  wide = jnp.promote_types(kernel.dtype, jnp.float32)
  left, values, right = jnp.linalg.svd(kernel.astype(wide) / scale, full_matrices=False)
  root = jnp.sqrt(values[:rank])[:, None]
  return root * left.mT[:rank], root * right[:rank]


def factors_beside_support(kernel, support, rank: int, scale):
  """Factors of equal norms that approximate a kernel by `scale·AᵀB` where it has no support.

  They start as `best_factors` of the kernel with zeros at the support, so its elements there do not matter. Each of 30
  rounds sets these elements to those of the product, and takes one step of alternating least squares, by a QR
  decomposition. No round increases the error.

  A kernel that is a product of this rank plus a sparse matrix of this support is recovered up to rounding. Measured in
  float32 at density 0.03 with normal factors and values, the relative error of the kernel falls from 0.07 to 3e-7 for
  rank 32 of [256, 700], from 0.08 to 3e-7 for rank 64 of [256, 256], and from 0.08 to 2e-6 for rank 85. Another kernel
  is approximated: with normal elements and rank 64 of [256, 256], the error falls from 0.60 to 0.59.

  Args:
    kernel: [in, out].
    support: [k] int32, positions in the flattened kernel.
  Returns:
    A [r, in] and B [r, out] in float32 or wider.
  """
  wide = jnp.promote_types(kernel.dtype, jnp.float32)
  kernel = jnp.asarray(kernel, wide)
  zeros = add_at_support(kernel, support, -at_support(kernel, support))
  start = best_factors(zeros, rank, scale)
  with jax.default_matmul_precision("highest"):

    def improved(_, factors):
      low = low_rank_kernel(*factors, scale)
      filled = add_at_support(kernel, support, at_support(low - kernel, support)) / scale
      columns, _ = jnp.linalg.qr(filled @ factors[1].mT)
      return columns.mT, columns.mT @ filled

    return refactored(*jax.lax.fori_loop(0, 30, improved, start))
