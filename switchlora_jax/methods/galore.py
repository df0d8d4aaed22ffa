"""GaLore: full-rank training with Adam's moments of block kernels in a low-rank projection of their gradients.

Algorithm 2 of Zhao et al. 2024 (arXiv 2403.03507), as in the authors' code. Kernels are [in, out] here, the transpose
of theirs. `optax.contrib.galore` is a different algorithm: it projects the larger side. `ProjectedAdam` is what GaLore
shares with Fira and FRUGAL. `methods.projectors` lists the projectors other than GaLore's own.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from switchlora_jax.errors import UserError
from switchlora_jax.methods import full, projectors
from switchlora_jax.methods.base import Method
from switchlora_jax.methods.optimizers import Coefficients, adam_options
from switchlora_jax.methods.projectors import block_kernels, leading_directions, oriented, wide

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


def refresh(grad, projector, due, number, decompose: Callable):
  """New projectors of one leaf, from `decompose`, for the kernels marked by `due` [...]; the others keep theirs.

  Shapes: grad [..., in, out], projector [..., small, r] or None for a leaf that is not projected.

  Args:
    number: [...] int32, a different number for each kernel of all leaves.
    decompose: (gradient [small, large], number []) -> projector [small, r].
  """
  if projector is None:
    return None

  def refresh_kernel(kernel):
    grad, projector, due, number = kernel
    return jax.lax.cond(due, lambda: decompose(grad, number).astype(projector.dtype), lambda: projector)

  kernels = lambda x: x.reshape(-1, *x.shape[-2:])
  # One kernel at a time: a batched decomposition needs the workspace of all of them at once.
  found = jax.lax.map(refresh_kernel, (kernels(wide(grad)), kernels(projector), due.reshape(-1), number.reshape(-1)))
  return found.reshape(projector.shape)


def refresh_all(grads, projectors, due_kernels, decompose: Callable):
  """Refresh the projectors of the kernels marked by `due_kernels`, a tree of [...] bool.

  Returns:
    The projectors and `failed` of all leaves after the refresh.
  """
  found = jax.tree.map(
    partial(refresh, decompose=decompose), grads, projectors, due_kernels, _kernel_numbers(due_kernels)
  )
  good = jax.tree.map(lambda p: jnp.all(jnp.isfinite(p), axis=(-2, -1)), found)
  kept = jax.tree.map(lambda hit, new, old: jnp.where(hit[..., None, None], new, old), good, found, projectors)
  return kept, jax.tree.map(lambda hit: (~hit).astype(jnp.int32), good)


def _kernel_numbers(like):
  """A tree of [...] int32 like `like`, which numbers the kernels of all leaves."""
  leaves, structure = jax.tree.flatten(like)
  starts = itertools.accumulate((leaf.size for leaf in leaves), initial=0)
  numbers = [
    start + jnp.arange(leaf.size, dtype=jnp.int32).reshape(leaf.shape)
    for start, leaf in zip(starts, leaves, strict=False)
  ]
  return jax.tree.unflatten(structure, numbers)


class ProjectedAdam(NamedTuple):
  """Adam on projected gradients R = PᵀG, with a projector P that is recomputed from time to time.

  Its methods take any state with the fields of `GaLoreState`, and return it with some of them replaced.

  A kernel whose decomposition fails keeps its projector and is decomposed again at the next update. A kernel that has
  no projector yet has the projector 0.

  If a refresh is due at a step that the train step skips, zero gradients are decomposed and the result is discarded,
  which costs the time of a refresh per skipped step.

  Attributes:
    rank: number of directions kept; all of them if the smaller side of a kernel is smaller than the rank.
    refresh_every: number of updates between two refreshes of P.
    projected: from the parameters to a tree of bools, true for the leaves [..., in, out] to project.
    b1, b2, eps: coefficients of Adam; eps is added to √v before its bias is corrected, for all leaves.
    directions: ([small, large], rank) -> [small, min(rank, small)], the function that computes P. With a seed, it has
      two more arguments: the number of updates so far, and a random key.
    seed: seed of the keys of `directions`. A key depends on it, the number of updates and the number of the kernel.
    moments_dtype: dtype of the stored moments; None: that of the parameters.
    refresh_at: number of an update before which P is recomputed as well; None: only every `refresh_every` updates.
  """

  rank: int
  refresh_every: int
  projected: Callable
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-6
  directions: Callable = leading_directions
  seed: int | None = None
  moments_dtype: Any = None
  refresh_at: int | None = None

  def init(self, params) -> GaLoreState:
    """The state before the first update: zeros."""
    projector = jax.tree.map(partial(_no_directions, rank=self.rank), self.projected(params), params)
    low = jax.eval_shape(partial(jax.tree.map, project), params, projector)
    moments = lambda: optax.tree.zeros_like(low, dtype=self.moments_dtype)
    failed = jax.tree.map(lambda p: jnp.zeros(p.shape[:-2], jnp.int32), projector)
    return GaLoreState(jnp.zeros((), jnp.int32), moments(), moments(), projector, failed)

  def refresh(self, grads, state):
    """Recompute the projectors that are due, before an update.

    Returns:
      The state with new `projector` and `failed`, and a tree of [...] bool: the kernels with a new projector.
    """
    due = state.count % self.refresh_every == 0
    if self.refresh_at is not None:
      due |= state.count == self.refresh_at
    due_kernels = jax.tree.map(lambda before: due | (before > 0), state.failed)
    # This cond must not be under a vmap, which would turn it into a select that decomposes in every step.
    found = lambda: refresh_all(grads, state.projector, due_kernels, partial(self._decompose, state.count))
    any_due = due | (failures(state) > 0)
    projector, failed = jax.lax.cond(any_due, found, lambda: (state.projector, state.failed))
    refreshed = jax.tree.map(lambda due, failed: due & (failed == 0), due_kernels, failed)
    return state._replace(projector=projector, failed=failed), refreshed

  def _decompose(self, count, grad, number):
    if self.seed is None:
      return self.directions(grad, self.rank)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), count), number)
    return self.directions(grad, self.rank, count, key)

  def average(self, grads, state, precision=None):
    """R of each leaf, and the state with the next `count`, `mu` and `nu`, in the wider of their dtype and R's.

    Args:
      precision: of the product R, as of `jnp.matmul`.
    """
    low = jax.tree.map(partial(project, precision=precision), grads, state.projector)
    mu = optax.tree.update_moment(low, state.mu, self.b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(low, state.nu, self.b2, 2)
    return low, state._replace(count=optax.safe_increment(state.count), mu=mu, nu=nu)

  def unbias(self, count):
    """√(1-β2ᵗ) / (1-β1ᵗ): the direction is that times m / (√v + eps)."""
    return jnp.sqrt(1 - self.b2**count) / (1 - self.b1**count)

  def direction(self, m, v, unbias):
    """Adam's direction N of one leaf, from its moments."""
    return unbias.astype(m.dtype) * m / (jnp.sqrt(v) + self.eps)

  def stored(self, state):
    """The state with moments in the dtype in which they are stored."""
    stored = lambda moments: optax.tree.cast(moments, self.moments_dtype)
    return state._replace(mu=stored(state.mu), nu=stored(state.nu))


def projected_adam(config, section) -> ProjectedAdam:
  """The `ProjectedAdam` of a resolved config: it projects block kernels.

  Args:
    section: the section of the method, with `refresh_every` and the keys that select the projectors.
  """
  options = adam_options(config) | projectors.options(config, section)
  return ProjectedAdam(config.rank, section.refresh_every, block_kernels, **options)


def scale_by_galore(adam: ProjectedAdam, scale: float) -> optax.GradientTransformationExtraArgs:
  """Adam on projected gradients: R = PᵀG, Adam's direction N of R, update `scale`·P·N.

  P is recomputed at every `refresh_every`-th update. The moments are neither reset nor rotated then. A kernel that has
  no projector yet does not move. Adam's bias is corrected by the number of all updates, also for a kernel that gets its
  projector late.

  Args:
    adam: the projection and Adam's coefficients. The signs of the columns of P do not matter to an update.
    scale: factor of the update of projected leaves.
  """

  def update(updates, state, params=None, **_):
    del params
    state, _ = adam.refresh(updates, state)
    _, state = adam.average(updates, state)
    unbias = adam.unbias(state.count)

    def direction(grad, m, v, projector):
      step = adam.direction(m, v, unbias)
      return step if projector is None else scale * oriented(projector @ step, grad.shape)

    return jax.tree.map(direction, updates, state.mu, state.nu, state.projector), adam.stored(state)

  return optax.GradientTransformationExtraArgs(adam.init, update)


def failures(state) -> jax.Array:
  """[] int32: number of kernels whose last decomposition failed, from a state with the fields of `GaLoreState`."""
  return sum((jnp.sum(failed, dtype=jnp.int32) for failed in jax.tree.leaves(state.failed)), jnp.zeros((), jnp.int32))


def _no_directions(is_projected: bool, param, rank: int):
  """The projector of a leaf before its first refresh: zeros, for an update of 0; None if it is not projected."""
  if not is_projected:
    return None
  small = min(param.shape[-2:])
  return jnp.zeros((*param.shape[:-2], small, min(rank, small)), param.dtype)


def project(grad, projector, precision=None):
  """R = PᵀG, [..., r, large]; the gradient of a leaf that is not projected."""
  return grad if projector is None else jnp.matmul(projector.mT, wide(grad), precision=precision)


def check(config):
  """Raise `UserError` if the rank or a setting of the projection is invalid."""
  full.check(config)
  projectors.check(config, "galore")
  if not config.galore.scale > 0:
    raise UserError(f"galore.scale (={config.galore.scale}) must be greater than 0; set --config.galore.scale")


def describe(config) -> list[str]:
  """The number of decompositions, which take most of the extra time of the method."""
  return projectors.describe(config, config.galore)


def warnings(config) -> list[str]:
  """No warnings."""
  return []


def build(config) -> Method:
  """The layers of full-rank training; gradients of block kernels are projected, all others go to Adam directly."""
  galore = scale_by_galore(projected_adam(config, config.galore), config.galore.scale)
  optimizer_metrics = lambda opt_state: {"svd_failed": failures(opt_state)}
  return full.build(config)._replace(optimizer=galore, optimizer_metrics=optimizer_metrics)
