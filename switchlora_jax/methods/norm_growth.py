"""The norm-growth limiter of Fira (Chen et al. 2024, arXiv 2410.01623), which APOLLO uses as well."""

import jax
import jax.numpy as jnp

TINY = 1e-8  # added to norms that divide, as by the authors of both


def norm_dtype(dtype):
  """The dtype of norms of arrays of a dtype: float32 or wider."""
  return jnp.promote_types(dtype, jnp.float32)


def norm_over(x, axis) -> jax.Array:
  """Euclidean norms over one or two axes, which are kept with size 1; summed in float32 or wider."""
  return jnp.sqrt(jnp.sum(jnp.square(x.astype(norm_dtype(x.dtype))), axis, keepdims=True))


def limit_norm_growth(update, previous_norm, gamma: float) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Scale an update down to `gamma` times the norm of the previous one, if it is larger.

  The norm of an update can therefore grow by at most the factor `gamma` per step, apart from `gamma`·1e-8. It can fall
  by any factor.

  Args:
    update: [..., in, out]; each matrix is limited on its own.
    previous_norm: [...] Frobenius norms of the previous updates, as returned, in float32 or wider. A matrix whose
      previous norm is 0 is not limited: it has no previous update, or that one was 0 and would keep it at 0.
    gamma: at least 1; 1.01 in both papers.
  Returns:
    The limited update, its Frobenius norms [...], and whether each matrix was limited, [...] bool.
  """
  norm, limit = norm_over(update, (-2, -1))[..., 0, 0], gamma * (previous_norm + TINY)
  limited = (previous_norm > 0) & (norm > limit)
  factor = jnp.where(limited, limit / jnp.where(limited, norm, 1), 1)
  return factor[..., None, None].astype(update.dtype) * update, jnp.where(limited, limit, norm), limited
