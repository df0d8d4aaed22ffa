"""The norm-growth limiter of Fira (Chen et al. 2024, arXiv 2410.01623), which APOLLO uses as well."""

import jax
import jax.numpy as jnp

from switchlora_jax.errors import UserError

TINY = 1e-8  # added to norms that divide, as by the authors of both


def norm_dtype(dtype):
  """The dtype of norms of arrays of a dtype: float32 or wider."""
  return jnp.promote_types(dtype, jnp.float32)


def norm_over(x, axis) -> jax.Array:
  """Euclidean norms over one or two axes, which are kept with size 1; summed in float32 or wider."""
  return jnp.sqrt(jnp.sum(jnp.square(x.astype(norm_dtype(x.dtype))), axis, keepdims=True))


def check_limit(config, section: str, key: str):
  """Raise `UserError` if the largest ratio of norms, a key of a section of the config, is invalid."""
  limit = config[section][key]
  if limit != 0 and not limit >= 1:
    raise UserError(
      f"{section}.{key} (={limit}) must be at least 1, or 0 for no limit; below 1 all updates would shrink to 0; "
      f"set --config.{section}.{key}"
    )


def limit_norm_growth(update, previous_norm, gamma: float) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Scale an update down to `gamma` times the norm of the previous one, if it is larger.

  The norm of an update can therefore grow by at most the factor `gamma` per step, apart from `gamma`·1e-8. It can fall
  by any factor.

  Args:
    update: [..., in, out]; each matrix is limited on its own.
    previous_norm: [...] Frobenius norms of the previous updates, as returned, in float32 or wider. A matrix whose
      previous norm is 0 is not limited: it has no previous update, or that one was 0 and would keep it at 0.
    gamma: at least 1; 1.01 in both papers. 0: no limit.
  Returns:
    The limited update, its Frobenius norms [...], and whether each matrix was limited, [...] bool.
  """
  norm, limit = norm_over(update, (-2, -1))[..., 0, 0], jnp.where(gamma == 0, jnp.inf, gamma) * (previous_norm + TINY)
  limited = (previous_norm > 0) & (norm > limit)
  factor = jnp.where(limited, limit / jnp.where(limited, norm, 1), 1)
  return factor[..., None, None].astype(update.dtype) * update, jnp.where(limited, limit, norm), limited
