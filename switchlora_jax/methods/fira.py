"""Fira: GaLore's Adam in a low-rank projection of the gradients, and the rest of the gradient scaled like Adam's part.

Chen et al. 2024 (arXiv 2410.01623), as in the authors' code. With the projected gradient R = PᵀG [r, large] of a kernel
and Adam's direction N of R, the update is

  α·P·N + S,   S = φ·(G − α·P·R),   φ_i = ‖N_i‖ / ‖R_i‖ for each column i of [r, large].

A norm-growth limiter scales S down if its norm exceeds `limit` times that of the update before. Kernels are [in, out]
here; the columns of R are those of G if in ≤ out, else its rows.

With α = 1, G − α·P·R is the part of the gradient outside the projection, as in the paper's equation. The authors' code
multiplies every projection back by α, so that with their α = 0.25 the rest contains 0.75 of the projected gradient. The
limiter compares norms before Adam's correction of the bias, also as there.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from switchlora_jax.errors import UserError
from switchlora_jax.methods import full, projectors
from switchlora_jax.methods.base import Method
from switchlora_jax.methods.galore import ProjectedAdam, failures, projected_adam
from switchlora_jax.methods.norm_growth import TINY, check_limit, limit_norm_growth, norm_dtype, norm_over
from switchlora_jax.methods.optimizers import Coefficients
from switchlora_jax.methods.projectors import oriented, wide

LEARNING_RATE = 1e-2  # this, the ratio and eps: defaults of Fira's authors
MIN_LR_RATIO = 0.1
ACCEPTED = {"adam": Coefficients(eps=1e-6)}  # of its projected gradients


class FiraState(NamedTuple):
  """State of `scale_by_fira`.

  Attributes:
    count, mu, nu, projector, failed: as of `galore.GaLoreState`.
    norm: [...] for a projected leaf, in float32 or wider: ‖S‖ of each kernel in the last update, without the correction
      of Adam's bias; 0 before the first. None for a leaf that is not projected.
    limited: [] int32, number of kernels whose S was scaled down by the limiter in the last update.
    residual_share: [] float32, ‖S‖ / ‖update‖ over all projected kernels in the last update.
  """

  count: Any
  mu: Any
  nu: Any
  projector: Any
  failed: Any
  norm: Any
  limited: Any
  residual_share: Any


def scale_by_fira(adam: ProjectedAdam, scale: float, limit: float = 1.01) -> optax.GradientTransformationExtraArgs:
  """Adam on projected gradients, and the scaled rest of the gradients; see the docstring of the module.

  A kernel that has no projector yet does not move. Adam's bias is corrected by the number of all updates, also for a
  kernel that gets its projector late.

  Args:
    adam: the projection and Adam's coefficients.
    scale: α.
    limit: largest ratio of ‖S‖ to that of the update before; 0: no limit.
  """

  def init(params):
    state = adam.init(params)
    norm = jax.tree.map(lambda p: jnp.zeros(p.shape[:-2], norm_dtype(p.dtype)), state.projector)
    return FiraState(*state, norm, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

  def update(updates, state, params=None, **_):
    del params
    state, _ = adam.refresh(updates, state)
    low, state = adam.average(updates, state)
    unbias = adam.unbias(state.count)
    steps = jax.tree.map(lambda m, v: adam.direction(m, v, unbias), state.mu, state.nu)
    scaled_rest = lambda grad, *others: _scaled_rest(grad, *others, scale)
    rest = jax.tree.map(scaled_rest, updates, low, steps, state.projector)
    leaves, structure = jax.tree.flatten(rest)
    limited = lambda s, norm: limit_norm_growth(s / unbias.astype(s.dtype), norm, limit)
    parts = [limited(*leaf) for leaf in zip(leaves, jax.tree.leaves(state.norm), strict=True)]
    rest = structure.unflatten([s * unbias.astype(s.dtype) for s, _, _ in parts])
    norms, hits = structure.unflatten([norm for _, norm, _ in parts]), [hit for _, _, hit in parts]

    def direction(grad, step, projector, rest):
      return step if projector is None else oriented(scale * (projector @ step) + rest, grad.shape)

    found = jax.tree.map(direction, updates, steps, state.projector, rest)
    state = state._replace(
      norm=norms,
      limited=sum((jnp.sum(hit, dtype=jnp.int32) for hit in hits), jnp.zeros((), jnp.int32)),
      residual_share=_share(rest, jax.tree.map(lambda x, p: None if p is None else x, found, state.projector)),
    )
    return found, adam.stored(state)

  return optax.GradientTransformationExtraArgs(init, update)


def _scaled_rest(grad, low, step, projector, scale):
  """S before the limiter, [..., small, large]; None for a leaf that is not projected."""
  if projector is None:
    return None
  factor = norm_over(step, -2) / (norm_over(low, -2) + TINY)
  return (wide(grad) - scale * (projector @ low)) * factor.astype(grad.dtype)


def _share(part, whole):
  """‖part‖ / ‖whole‖ over all leaves, [] float32; 0 if there is nothing."""
  square = lambda x: jnp.square(x.astype(norm_dtype(x.dtype)))
  norm = lambda tree: jnp.sqrt(sum((jnp.sum(square(x)) for x in jax.tree.leaves(tree)), jnp.zeros(())))
  size = norm(whole)
  return jnp.where(size > 0, norm(part) / jnp.where(size > 0, size, 1), 0).astype(jnp.float32)


def check(config):
  """Raise `UserError` if the rank or a setting of the projection, the scale or the limiter is invalid."""
  full.check(config)
  projectors.check(config, "fira")
  if not config.fira.scale > 0:
    raise UserError(f"fira.scale (={config.fira.scale}) must be greater than 0; set --config.fira.scale")
  check_limit(config, "fira", "limit")


def describe(config) -> list[str]:
  """The number of decompositions, which take most of the extra time of the method."""
  return projectors.describe(config, config.fira)


def warnings(config) -> list[str]:
  """No warnings."""
  return []


def build(config) -> Method:
  """The layers of full-rank training; gradients of block kernels are projected, all others go to Adam directly."""
  fira = config.fira
  optimizer = scale_by_fira(projected_adam(config, fira), fira.scale, fira.limit)
  return full.build(config)._replace(optimizer=optimizer, optimizer_metrics=_metrics)


def _metrics(state: FiraState):
  return {
    "svd_failed": failures(state),
    "limited": state.limited,
    "residual_share": state.residual_share,
  }
