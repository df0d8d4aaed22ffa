"""GaLore: every weight is trained; Adam's moments of the blocks live in a low-rank projection of their gradients.

Zhao et al. 2024b, Algorithm 2, as the authors' code has it. The sides of a kernel are [in, out] here, which
is the transpose of theirs. `optax.contrib.galore` is another algorithm: it projects the larger side.
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
from switchlora_jax.methods.base import Method, cosine
from switchlora_jax.models.weights import in_block

LEARNING_RATE = 1e-2  # of GaLore's authors, as is the ratio
MIN_LR_RATIO = 0.1


class GaLoreState(NamedTuple):
  """State of `scale_by_galore`; `small` and `large` are the sides of a projected leaf, the input first if equal.

  Attributes:
    count: [] int32, updates so far.
    mu, nu: first and second moments: [..., r, large] of a projected leaf, else like the parameter.
    projector: [..., small, r], orthonormal columns; None where a leaf is not projected.
    failed: [...] int32 of a projected leaf, 1 for a kernel whose last decomposition gave no finite numbers, so that
      it kept its projector; else 0. None where a leaf is not projected.
  """

  count: Any
  mu: Any
  nu: Any
  projector: Any
  failed: Any


def leading_directions(matrix, rank: int):
  """The first `rank` left singular vectors of [small, large] as columns; found in float32, as the authors do."""
  left, _, _ = jnp.linalg.svd(matrix.astype(jnp.float32), full_matrices=False)
  return left[:, :rank].astype(matrix.dtype)


def refresh(grad, projector, wanted, decompose: Callable):
  """What `decompose` finds for the kernels of a leaf that are `wanted` [...]; the others keep their projectors.

  Shapes: grad [..., in, out], projector [..., small, r]; None where the leaf is not projected.
  """
  if projector is None:
    return None

  def one(kernel):
    grad, projector, wanted = kernel
    return jax.lax.cond(wanted, lambda: decompose(grad).astype(projector.dtype), lambda: projector)

  kernels = lambda x: x.reshape(-1, *x.shape[-2:])
  # One layer at a time: a batched decomposition would need the workspace of all of them at once.
  found = jax.lax.map(one, (kernels(_wide(grad)), kernels(projector), wanted.reshape(-1)))
  return found.reshape(projector.shape)


def refresh_all(grads, projectors, failed, due, decompose: Callable):
  """(projectors, failed) of all leaves after a refresh: of every kernel if it is `due`, else of those that failed."""
  wanted = jax.tree.map(lambda before: due | (before > 0), failed)
  found = jax.tree.map(partial(refresh, decompose=decompose), grads, projectors, wanted)
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
) -> optax.GradientTransformationExtraArgs:
  """Adam on projected gradients: R = PᵀG, Adam's step N of R, update `scale`·P·N.

  P is found anew from the gradient at every `refresh_every`-th update; the moments are neither reset nor
  rotated then. eps is added to √v before its bias is corrected, on every leaf, projected or not.

  `update` takes, besides the usual, `skip`: [] bool; where true the update is 0, the state stays as it was
  and nothing is decomposed, so that a refresh that was due is due again at the next update. So it is for a kernel
  whose decomposition failed; until one succeeds it keeps its projector, and without any it does not move.

  Args:
    rank: directions kept; all of them where a side is smaller.
    projected: from the parameters to a tree of bools, true for leaves [..., in, out] to project.
    directions: ([small, large], rank) -> [small, min(rank, small)]; to give recorded ones. Their sign is free.
  """

  def init(params):
    projector = jax.tree.map(partial(_no_directions, rank=rank), projected(params), params)
    low = jax.eval_shape(partial(jax.tree.map, _project), params, projector)
    moments = lambda: optax.tree.zeros_like(low)
    failed = jax.tree.map(lambda p: jnp.zeros(p.shape[:-2], jnp.int32), projector)
    return GaLoreState(jnp.zeros((), jnp.int32), moments(), moments(), projector, failed)

  def update(updates, state, params=None, *, skip=False, **_):
    """As optax: (step of each parameter, new state); nothing moves where `skip` [] bool."""
    del params
    due = state.count % refresh_every == 0
    # Under vmap a cond becomes a select, which would decompose at every step; it must stay outside of any.
    decompose = lambda grad: directions(grad, rank)
    found = lambda: refresh_all(updates, state.projector, state.failed, due, decompose)
    any_due = (due | (failures(state) > 0)) & jnp.logical_not(skip)
    projector, failed = jax.lax.cond(any_due, found, lambda: (state.projector, state.failed))
    low = jax.tree.map(_project, updates, projector)
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(low, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(low, state.nu, b2, 2)
    unbias = jnp.sqrt(1 - b2**count) / (1 - b1**count)

    def direction(grad, m, v, projector):
      step = unbias.astype(m.dtype) * m / (jnp.sqrt(v) + eps)
      step = step if projector is None else scale * _project_back(step, projector, grad.shape)
      return jnp.where(skip, 0, step)

    new_state = GaLoreState(count, mu, nu, projector, failed)
    kept = jax.tree.map(lambda new, old: jnp.where(skip, old, new), new_state, state)
    return jax.tree.map(direction, updates, mu, nu, projector), kept

  return optax.GradientTransformationExtraArgs(init, update)


def failures(state: GaLoreState) -> jax.Array:
  """[] int32: kernels whose last decomposition failed."""
  return sum((jnp.sum(failed, dtype=jnp.int32) for failed in jax.tree.leaves(state.failed)), jnp.zeros((), jnp.int32))


def _no_directions(hit: bool, param, rank: int):
  """The projector of a leaf before its first refresh: zeros, so that nothing moves; None where it is not projected."""
  if not hit:
    return None
  small = min(param.shape[-2:])
  return jnp.zeros((*param.shape[:-2], small, min(rank, small)), param.dtype)


def _wide(x):
  """The smaller of the last two sides first."""
  return x if x.shape[-2] <= x.shape[-1] else x.mT


def _project(grad, projector):
  """R = PᵀG, [..., r, large]."""
  return grad if projector is None else projector.mT @ _wide(grad)


def _project_back(low, projector, shape):
  """P·N, [..., in, out]."""
  full_rank = projector @ low
  return full_rank if full_rank.shape == shape else full_rank.mT


def check(config):
  """Raise `UserError` unless there are directions to keep, and a way to find and to scale them."""
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
  """How often the projectors are found anew, which is what the method costs in time."""
  every = config.galore.refresh_every
  refreshes = -(-(config.steps - config.warm_start_steps) // every)
  return [f"singular value decompositions of every block gradient: {refreshes}, one every {every} steps"]


def build(config) -> Method:
  """The layers of full-rank training; the kernels of the blocks are projected, Adam sees the rest as it is."""
  schedule = cosine(config, end=config.min_lr_ratio)
  projected = lambda params: path_aware_map(lambda path, _: in_block(path), params)
  galore = scale_by_galore(config.rank, config.galore.refresh_every, config.galore.scale, projected=projected)
  optimizer_metrics = lambda opt_state: {"svd_failed": failures(opt_state)}
  return full.build(config)._replace(optimizer=galore, schedule=schedule, optimizer_metrics=optimizer_metrics)
