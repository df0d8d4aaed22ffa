"""APOLLO: full-rank training in which each channel or matrix has a learning rate, estimated in a random projection.

Algorithm 1 of Zhu et al. 2024 (arXiv 2412.05270), written from the paper. Where the paper leaves a detail open, it
follows the updates of the authors' package: Adam's bias is corrected after the limiter, and 1e-8 is added to norms that
divide. Kernels are [in, out] here. `apollo_mini` is the variant with rank 1 and one learning rate per matrix.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from switchlora_jax.errors import UserError
from switchlora_jax.methods import full
from switchlora_jax.methods.base import Method
from switchlora_jax.methods.norm_growth import TINY, check_limit, limit_norm_growth, norm_dtype, norm_over
from switchlora_jax.methods.optimizers import Coefficients, adam_options
from switchlora_jax.methods.projectors import block_kernels, check_rank, oriented, wide

LEARNING_RATE = 1e-2  # this and the ratio: those of GaLore, which APOLLO's authors use as well
MIN_LR_RATIO = 0.1
ACCEPTED = {"adam": Coefficients(eps=1e-6)}  # of its projected gradients
SCALE_TYPES = {"channel": -2, "tensor": (-2, -1)}  # axes of a wide kernel that share one scale factor


class ApolloState(NamedTuple):
  """State of `scale_by_apollo`; a projected kernel has 2·r·large + 1 numbers.

  `small` and `large` are the smaller and the larger side of a projected kernel; `small` is the input if they are equal.
  Projections are not stored: each is drawn again from its key in every update.

  Attributes:
    count: [] int32, number of updates so far.
    mu, nu: first and second moments: [..., r, large] for a projected leaf, else of the shape of the parameter.
    norm: [...] for a projected leaf, in float32 or wider: Frobenius norm of each kernel's last update, without `scale`
      and the correction of Adam's bias; 0 before the first. None for a leaf that is not projected.
    mean_factor: [] mean over all channels or kernels of the last scale factors s, before the correction of the bias.
    limited_share: [] share of the kernels whose last update was scaled down by the norm-growth limiter.
  """

  count: Any
  mu: Any
  nu: Any
  norm: Any
  mean_factor: Any
  limited_share: Any


def draw_projection(key, shape, dtype) -> jax.Array:
  """Projections [..., r, small] with independent elements from N(0, 1/r); each kernel has its own key."""
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(prod(shape[:-2])))
  drawn = jax.vmap(lambda key: jax.random.normal(key, shape[-2:], dtype))(keys)
  return drawn.reshape(shape) / shape[-2] ** 0.5


def scale_by_apollo(
  rank: int,
  refresh_every: int,
  scale: float,
  scale_type: str = "channel",
  norm_growth: float = 1.01,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  *,
  seed: int,
  projected: Callable,
  draw: Callable = draw_projection,
  moments_dtype=None,
) -> optax.GradientTransformationExtraArgs:
  """The gradient itself, scaled by the ratio that Adam has in a random projection.

  With R = PG [r, large] for a kernel whose smaller side is first, and Adam's direction N of R, the update is
  `scale`·G·s. For "channel" s has a factor ‖N_j‖ / ‖R_j‖ for each column j of R, for "tensor" it is ‖N‖ / ‖R‖. The
  norm-growth limiter applies to it. Leaves that are not projected use Adam.

  P is drawn from the seed, the number of the refresh, the number of the leaf in the tree and the number of the kernel
  in the leaf. It is drawn anew at every `refresh_every`-th update. The moments are neither reset nor rotated then.
  eps is added to √v before its bias is corrected, for all leaves.

  Args:
    rank: number of rows of P; at most the smaller side of a kernel is used.
    scale_type: "channel" or "tensor".
    norm_growth: largest ratio of the norms of a kernel's successive updates; 0: no limit.
    seed: of the projections.
    projected: from the parameters to a tree of bools, true for the leaves [..., in, out] to project.
    draw: (key, [..., min(rank, small), small], float32 or wider) -> projections of that shape and dtype.
    moments_dtype: dtype of the stored moments; None: that of the parameters.
  """
  axes = SCALE_TYPES[scale_type]

  def low_shape(shape):
    return (*shape[:-2], min(rank, *shape[-2:]), max(shape[-2:]))

  def init(params):
    chosen = projected(params)
    shapes = jax.tree.map(lambda is_projected, p: low_shape(p.shape) if is_projected else p.shape, chosen, params)
    moments = lambda: jax.tree.map(lambda p, shape: jnp.zeros(shape, moments_dtype or p.dtype), params, shapes)
    norms = lambda is_projected, p: jnp.zeros(p.shape[:-2], norm_dtype(p.dtype)) if is_projected else None
    zero = lambda: jnp.zeros((), norm_dtype(jnp.result_type(*jax.tree.leaves(params))))
    return ApolloState(
      jnp.zeros((), jnp.int32), moments(), moments(), jax.tree.map(norms, chosen, params), zero(), zero()
    )

  def update(updates, state, params=None, **_):
    del params
    key = jax.random.fold_in(jax.random.key(seed), state.count // refresh_every)
    grads, tree = jax.tree.flatten(updates)
    norms = tree.flatten_up_to(state.norm)

    def project(number, grad, norm):
      if norm is None:
        return grad
      large = wide(grad)
      shape = (*low_shape(grad.shape)[:-1], large.shape[-2])
      return draw(jax.random.fold_in(key, number), shape, norm.dtype).astype(grad.dtype) @ large

    low = [project(number, *leaf) for number, leaf in enumerate(zip(grads, norms, strict=True))]
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(low, tree.flatten_up_to(state.mu), b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(low, tree.flatten_up_to(state.nu), b2, 2)
    unbias = jnp.sqrt(1 - b2**count) / (1 - b1**count)
    factors, limits = [], []

    def direction(grad, low, m, v, norm):
      step = m / (jnp.sqrt(v) + eps)
      if norm is not None:
        factor = _ratio(norm_over(step, axes), norm_over(low, axes))
        factors.append(factor)
        scaled = oriented(factor.astype(grad.dtype) * wide(grad), grad.shape)
        step, norm, limited = limit_norm_growth(scaled, norm, norm_growth)
        limits.append(limited)
        step = scale * step
      return unbias.astype(step.dtype) * step, norm

    steps, norms = zip(*map(direction, grads, low, mu, nu, norms), strict=True)
    stored = lambda moments: optax.tree.cast(tree.unflatten(moments), moments_dtype)
    means = [_mean(factors, state.mean_factor), _mean(limits, state.limited_share)]
    state = ApolloState(count, stored(mu), stored(nu), tree.unflatten(norms), *means)
    return tree.unflatten(steps), state

  return optax.GradientTransformationExtraArgs(init, update)


def _ratio(numerator, denominator):
  """The quotient; 0 where the denominator is 0: there the gradient is 0, and its factor would dominate the mean."""
  return jnp.where(denominator > 0, numerator / (denominator + TINY), 0)


def _mean(arrays: list, like) -> jax.Array:
  """The mean over the elements of all arrays, [] in the dtype of `like`; 0 if there are none."""
  total = sum((jnp.sum(x, dtype=like.dtype) for x in arrays), jnp.zeros_like(like))
  return total / max(1, sum(x.size for x in arrays))


def check(config):
  """Raise `UserError` if the rank or a setting of `config.apollo` is invalid."""
  full.check(config)
  check_rank(config)
  scale_type = config.apollo.scale_type
  if scale_type not in SCALE_TYPES:
    raise UserError(
      f"apollo.scale_type (={scale_type!r}) must be one of {', '.join(SCALE_TYPES)}; set --config.apollo.scale_type"
    )
  check_section(config, "apollo")


def check_section(config, name: str):
  """Raise `UserError` if a setting that `config.apollo` and `config.apollo_mini` share is invalid."""
  every, scale = config[name].refresh_every, config[name].scale
  if every < 1:
    raise UserError(f"{name}.refresh_every (={every}) must be at least 1; set --config.{name}.refresh_every")
  if not scale > 0:
    raise UserError(f"{name}.scale (={scale}) must be greater than 0; set --config.{name}.scale")
  check_limit(config, name, "norm_growth")


def describe(config) -> list[str]:
  """The granularity of the scale factors, and the number of projections."""
  return describe_section(config, "apollo", config.rank, config.apollo.scale_type)


def describe_section(config, name: str, rank: int, scale_type: str) -> list[str]:
  """The line that `describe` prints for a section of the config."""
  every = config[name].refresh_every
  draws = -(-(config.steps - config.warm_start_steps) // every)
  return [
    f"one learning rate per {scale_type}, from random projections to rank {rank}: {draws}, one every {every} steps"
  ]


def warnings(config) -> list[str]:
  """Warn if channels are scaled by a projection to a single direction."""
  if config.rank > 1 or config.apollo.scale_type != "channel":
    return []
  return [
    "rank 1 projects each channel to a single number, which is often near 0, so that its scale factor is often very "
    "large; set --config.apollo.scale_type=tensor, or use --config.method=apollo_mini"
  ]


def build(config) -> Method:
  """The layers of full-rank training; gradients of block kernels are scaled, all other parameters use Adam."""
  return build_section(config, "apollo", config.rank, config.apollo.scale_type)


def build_section(config, name: str, rank: int, scale_type: str) -> Method:
  """The method with the settings of a section of the config."""
  section = config[name]
  settings = (rank, section.refresh_every, section.scale, scale_type, section.norm_growth)
  apollo = scale_by_apollo(*settings, seed=config.seed, projected=block_kernels, **adam_options(config))
  return full.build(config)._replace(optimizer=apollo, optimizer_metrics=metrics)


def metrics(opt_state: ApolloState) -> dict[str, jax.Array]:
  """`scale_factor` and `limited_share`, of the last update that was not skipped."""
  return {"scale_factor": opt_state.mean_factor, "limited_share": opt_state.limited_share}
