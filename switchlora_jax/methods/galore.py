"""GaLore: full-rank training with Adam's moments of block kernels in a low-rank projection of their gradients.

Algorithm 2 of Zhao et al. 2024 (arXiv 2403.03507), as in the authors' code. Kernels are [in, out] here, the transpose
of theirs. `optax.contrib.galore` is a different algorithm: it projects the larger side.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map

from switchlora_jax.errors import UserError
from switchlora_jax.methods import full
from switchlora_jax.methods.base import Method
from switchlora_jax.methods.optimizers import Coefficients, adam_options
from switchlora_jax.models.weights import in_block

LEARNING_RATE = 1e-2  # this and the ratio: defaults of GaLore's authors
MIN_LR_RATIO = 0.1
ACCEPTED = {"adam": Coefficients(eps=1e-6)}  # of its projected gradients


class GaLoreState(NamedTuple):
  """State of `scale_by_galore`.

  `small` and `large` are the smaller and the larger side of a projected kernel; `small` is the input if they are equal.

  Attributes:
    count: [] int32, number of updates so far.
    mu, nu: first and second moments: [..., r, large] for a projected leaf, else of the shape of the parameter.
    projector: [..., small, r] with orthonormal columns; None for a leaf that is not projected.
    failed: [...] int32 for a projected leaf: 1 for each kernel whose last decomposition was not finite and that
      therefore kept its projector, else 0. None for a leaf that is not projected.
  """

  count: Any
  mu: Any
  nu: Any
  projector: Any
  failed: Any


def leading_directions(matrix, rank: int):
  """The first `rank` left singular vectors of [small, large], as columns; computed in float32 as by the authors."""
  left, _, _ = jnp.linalg.svd(matrix.astype(jnp.float32), full_matrices=False)
  return left[:, :rank].astype(matrix.dtype)


def refresh(grad, projector, due, decompose: Callable):
  """New projectors of one leaf, from `decompose`, for the kernels marked by `due` [...]; the others keep theirs.

  Shapes: grad [..., in, out], projector [..., small, r] or None for a leaf that is not projected.
  """
  if projector is None:
    return None

  def refresh_kernel(kernel):
    grad, projector, due = kernel
    return jax.lax.cond(due, lambda: decompose(grad).astype(projector.dtype), lambda: projector)

  kernels = lambda x: x.reshape(-1, *x.shape[-2:])
  # One kernel at a time: a batched decomposition needs the workspace of all of them at once.
  found = jax.lax.map(refresh_kernel, (kernels(_wide(grad)), kernels(projector), due.reshape(-1)))
  return found.reshape(projector.shape)


def refresh_all(grads, projectors, failed, due, decompose: Callable):
  """Refresh the projectors of all kernels if `due` [] bool, else of those marked by `failed`.

  Returns:
    The projectors and `failed` of all leaves after the refresh.
  """
  due_kernels = jax.tree.map(lambda before: due | (before > 0), failed)
  found = jax.tree.map(partial(refresh, decompose=decompose), grads, projectors, due_kernels)
  good = jax.tree.map(lambda p: jnp.all(jnp.isfinite(p), axis=(-2, -1)), found)
  kept = jax.tree.map(lambda hit, new, old: jnp.where(hit[..., None, None], new, old), good, found, projectors)
  return kept, jax.tree.map(lambda hit: (~hit).astype(jnp.int32), good)


def scale_by_galore(
  rank: int,
  refresh_every: int,
  scale: float,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  *,
  projected: Callable,
  directions: Callable = leading_directions,
  moments_dtype=None,
) -> optax.GradientTransformationExtraArgs:
  """Adam on projected gradients: R = PᵀG, Adam's direction N of R, update `scale`·P·N.

  P is recomputed from the gradient at every `refresh_every`-th update. The moments are neither reset nor rotated then.
  eps is added to √v before its bias is corrected, for all leaves, projected or not.

  A kernel whose decomposition fails keeps its projector and is decomposed again at the next update. A kernel that has
  no projector yet does not move.

  If a refresh is due at a step that the train step skips, zero gradients are decomposed and the result is discarded,
  which costs the time of a refresh per skipped step.

  Args:
    rank: number of directions kept; all of them if the smaller side of a kernel is smaller than the rank.
    projected: from the parameters to a tree of bools, true for the leaves [..., in, out] to project.
    directions: ([small, large], rank) -> [small, min(rank, small)], the function that computes P. The signs of its
      columns do not matter.
    moments_dtype: dtype of the stored moments; None: that of the parameters.
  """

  def init(params):
    projector = jax.tree.map(partial(_no_directions, rank=rank), projected(params), params)
    low = jax.eval_shape(partial(jax.tree.map, _project), params, projector)
    moments = lambda: optax.tree.zeros_like(low, dtype=moments_dtype)
    failed = jax.tree.map(lambda p: jnp.zeros(p.shape[:-2], jnp.int32), projector)
    return GaLoreState(jnp.zeros((), jnp.int32), moments(), moments(), projector, failed)

  def update(updates, state, params=None, **_):
    del params
    due = state.count % refresh_every == 0
    # This cond must not be under a vmap, which would turn it into a select that decomposes in every step.
    decompose = lambda grad: directions(grad, rank)
    found = lambda: refresh_all(updates, state.projector, state.failed, due, decompose)
    any_due = due | (failures(state) > 0)
    projector, failed = jax.lax.cond(any_due, found, lambda: (state.projector, state.failed))
    low = jax.tree.map(_project, updates, projector)
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(low, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(low, state.nu, b2, 2)
    unbias = jnp.sqrt(1 - b2**count) / (1 - b1**count)

    def direction(grad, m, v, projector):
      step = unbias.astype(m.dtype) * m / (jnp.sqrt(v) + eps)
      return step if projector is None else scale * _project_back(step, projector, grad.shape)

    stored = lambda moments: optax.tree.cast(moments, moments_dtype)
    state = GaLoreState(count, stored(mu), stored(nu), projector, failed)
    return jax.tree.map(direction, updates, mu, nu, projector), state

  return optax.GradientTransformationExtraArgs(init, update)


def failures(state: GaLoreState) -> jax.Array:
  """[] int32: number of kernels whose last decomposition failed."""
  return sum((jnp.sum(failed, dtype=jnp.int32) for failed in jax.tree.leaves(state.failed)), jnp.zeros((), jnp.int32))


def _no_directions(is_projected: bool, param, rank: int):
  """The projector of a leaf before its first refresh: zeros, for an update of 0; None if it is not projected."""
  if not is_projected:
    return None
  small = min(param.shape[-2:])
  return jnp.zeros((*param.shape[:-2], small, min(rank, small)), param.dtype)


def _wide(x):
  """Transposed, if needed, so that the smaller of the last two sides is first."""
  return x if x.shape[-2] <= x.shape[-1] else x.mT


def _project(grad, projector):
  """R = PᵀG, [..., r, large]."""
  return grad if projector is None else projector.mT @ _wide(grad)


def _project_back(low, projector, shape):
  """P·N, [..., in, out]."""
  full_rank = projector @ low
  return full_rank if full_rank.shape == shape else full_rank.mT


def check(config):
  """Raise `UserError` if the rank or a setting of the projection is invalid."""
  full.check(config)
  if config.rank < 1:
    raise UserError(f"rank (={config.rank}) must be at least 1; set --config.rank or use --config.method=full")
  if config.rank > config.model.hidden_size:  # the largest min(in, out) of any layer
    raise UserError(
      f"rank (={config.rank}) is more than a gradient has directions (min(in, out) = {config.model.hidden_size}); "
      f"lower --config.rank or use --config.method=full"
    )
  every, scale = config.galore.refresh_every, config.galore.scale
  if every < 1:
    raise UserError(f"galore.refresh_every (={every}) must be at least 1; set --config.galore.refresh_every")
  if not scale > 0:
    raise UserError(f"galore.scale (={scale}) must be greater than 0; set --config.galore.scale")


def describe(config) -> list[str]:
  """The number of decompositions, which take most of the extra time of the method."""
  every = config.galore.refresh_every
  refreshes = -(-(config.steps - config.warm_start_steps) // every)
  return [f"singular value decompositions of every block gradient: {refreshes}, one every {every} steps"]


def warnings(config) -> list[str]:
  """No warnings."""
  return []


def build(config) -> Method:
  """The layers of full-rank training; gradients of block kernels are projected, all others go to Adam directly."""
  projected = lambda params: path_aware_map(lambda path, _: in_block(path), params)
  settings = (config.rank, config.galore.refresh_every, config.galore.scale)
  galore = scale_by_galore(*settings, projected=projected, **adam_options(config))
  optimizer_metrics = lambda opt_state: {"svd_failed": failures(opt_state)}
  return full.build(config)._replace(optimizer=galore, optimizer_metrics=optimizer_metrics)
