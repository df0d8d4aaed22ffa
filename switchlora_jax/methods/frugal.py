"""FRUGAL: Adam in a low-rank projection of the gradients, and signSGD, which has no state, on the rest of them.

Zmushko et al. 2024 (arXiv 2411.07837). With the projected gradient R = PᵀG of a kernel and Adam's direction N of R, the
update is

  P·N + λ·sign(G − P·R).

Adam starts anew whenever P changes: its moments and its step count are 0 then. The moments therefore never mix
coordinates of two subspaces, which GaLore's do.

The sign is 0 where the rest is not larger than its rounding errors; see `rest_signs`.

The authors choose the part with a state in several ways: singular vectors, random subspaces, columns, or whole layers,
which is their default. This module has those of `methods.projectors`, so that `config.rank` has the meaning that it has
for GaLore; whole layers are not among them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from switchlora_jax.errors import UserError
from switchlora_jax.methods import full, projectors
from switchlora_jax.methods.base import Method
from switchlora_jax.methods.galore import ProjectedAdam, failures, projected_adam
from switchlora_jax.methods.norm_growth import norm_dtype, norm_over
from switchlora_jax.methods.optimizers import ADAM
from switchlora_jax.methods.projectors import oriented, wide

LEARNING_RATE = 1e-3  # this and the ratio: of the authors' runs, with Adam's rate for full rank
MIN_LR_RATIO = 0.1
ACCEPTED = ADAM  # of its projected gradients


class FrugalState(NamedTuple):
  """State of `scale_by_frugal`.

  Attributes:
    count, mu, nu, projector, failed: as of `galore.GaLoreState`.
    age: [...] int32 for a projected leaf: number of updates with the present projector of each kernel. None for a leaf
      that is not projected.
  """

  count: Any
  mu: Any
  nu: Any
  projector: Any
  failed: Any
  age: Any


def scale_by_frugal(adam: ProjectedAdam, sign_scale: float = 1.0) -> optax.GradientTransformationExtraArgs:
  """Adam on projected gradients, signSGD on the rest of the gradients; see the docstring of the module.

  A kernel that has no projector yet does not move. A kernel whose decomposition fails keeps its moments with its
  projector.

  Args:
    adam: the projection and Adam's coefficients.
    sign_scale: λ, learning rate of signSGD / learning rate of Adam.
  """

  def init(params):
    state = adam.init(params)
    return FrugalState(*state, age=jax.tree.map(jnp.zeros_like, state.failed))

  def update(updates, state, params=None, **_):
    del params
    state, refreshed = adam.refresh(updates, state)
    started = lambda moments: jax.tree.map(_started, moments, refreshed)
    state = state._replace(
      mu=started(state.mu),
      nu=started(state.nu),
      age=jax.tree.map(lambda age, new: jnp.where(new, 0, age) + 1, state.age, refreshed),
    )
    low, state = adam.average(updates, state, jax.lax.Precision.HIGHEST)

    def direction(grad, low, m, v, projector, age):
      if projector is None:
        return adam.direction(m, v, adam.unbias(state.count))
      step = projector @ adam.direction(m, v, adam.unbias(age)[..., None, None])
      step += sign_scale * rest_signs(wide(grad), low, projector)
      has_projector = jnp.any(projector != 0, axis=(-2, -1), keepdims=True)
      return oriented(jnp.where(has_projector, step, 0), grad.shape)

    found = jax.tree.map(direction, updates, low, state.mu, state.nu, state.projector, state.age)
    return found, adam.stored(state)

  return optax.GradientTransformationExtraArgs(init, update)


def rest_signs(grad, low, projector):
  """sign(G − P·R), and 0 where |G − P·R| is at most the tolerance of its column.

  If G has at most r directions, the rest consists of rounding errors, which must have no signs. The tolerance is 32·eps
  of float32, in which P is computed, times the norm of the column of G; measured were 10·eps at most, for [512, 1024].
  In bfloat16, in which G and P are stored, it is 2⁻⁵ times the root mean square of the column. The product is computed
  in float32 or wider, and not in TF32.

  Args:
    grad: G [..., small, large].
    low: R [..., r, large].
    projector: P [..., small, r].
  Returns:
    [..., small, large] in the dtype of G.
  """
  if projector.shape[-1] == projector.shape[-2]:  # P has all directions
    return jnp.zeros_like(grad)
  dtype = norm_dtype(grad.dtype)
  inside = jnp.matmul(projector, low, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)
  rest = grad.astype(dtype) - inside
  norm = norm_over(grad, -2)
  tolerance = max(32 * jnp.finfo(jnp.float32).eps, 4 * jnp.finfo(grad.dtype).eps / grad.shape[-2] ** 0.5)
  return jnp.where(jnp.abs(rest) > tolerance * norm, jnp.sign(rest), 0).astype(grad.dtype)


def _started(moment, refreshed):
  """0 for the kernels with a new projector; unchanged for a leaf that is not projected."""
  return moment if refreshed is None else jnp.where(refreshed[..., None, None], 0, moment)


def check(config):
  """Raise `UserError` if the rank or a setting of the projection or of signSGD is invalid."""
  full.check(config)
  projectors.check(config, "frugal")
  if not config.frugal.sign_scale >= 0:
    raise UserError(
      f"frugal.sign_scale (={config.frugal.sign_scale}) must not be negative; set --config.frugal.sign_scale"
    )


def describe(config) -> list[str]:
  """The number of decompositions, which take most of the extra time of the method."""
  return projectors.describe(config, config.frugal)


def warnings(config) -> list[str]:
  """Warn if the rest of the gradient is not used."""
  if config.frugal.sign_scale:
    return []
  return ["with frugal.sign_scale = 0 only the projected gradient is used; set --config.frugal.sign_scale=1"]


def build(config) -> Method:
  """The layers of full-rank training; gradients of block kernels are projected, all others go to Adam directly."""
  optimizer = scale_by_frugal(projected_adam(config, config.frugal), config.frugal.sign_scale)
  optimizer_metrics = lambda opt_state: {"svd_failed": failures(opt_state)}
  return full.build(config)._replace(optimizer=optimizer, optimizer_metrics=optimizer_metrics)
