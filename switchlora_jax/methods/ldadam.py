"""LDAdam: Adam in a low-dimensional subspace that follows the gradient in every update.

Robert et al. 2024 (arXiv 2410.16103). For a kernel with gradient G [small, large], projector P [small, r], moments
m and v [r, large], and an error buffer E [small, large], update t is

  A = G + E                                    the gradient, and what the projection has lost so far
  P' = QR(B·Bᵀ·P),  B = ρ·P·m̂ + (1−ρ)·A        one power iteration; the first P has leading singular vectors of A
  Q = P'ᵀ·P,  m ← Q·m,  v ← (1−β2ᵗ⁻¹)·|Q²·(v̂ − m̂²) + (Q·m̂)²|     the moments in the new subspace, Q² elementwise
  R = P'ᵀ·A,  m' and v' as in Adam from R,  direction P'·m̂' / (√v̂' + ε)
  E' = A − P'·R + β1/(1−β1)·(P·m − P'·Q·m)      with m before the change of the subspace

m̂ and v̂ are the moments of the update before, with corrected bias. Signs of the columns of P do not matter. The authors
keep E in the memory of the gradients. Here it is part of the optimizer state, of the size of the parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from switchlora_jax.errors import UserError
from switchlora_jax.methods import full, projectors
from switchlora_jax.methods.base import Method
from switchlora_jax.methods.galore import ProjectedAdam, failures, refresh_all
from switchlora_jax.methods.optimizers import Coefficients, adam_options
from switchlora_jax.methods.projectors import block_kernels, leading_directions, oriented, wide

LEARNING_RATE = 1e-3  # this and the coefficients: defaults of LDAdam's authors
MIN_LR_RATIO = 0.1
ACCEPTED = {"adam": Coefficients(b1=0.908, b2=0.99)}  # of its projected gradients


class LDAdamState(NamedTuple):
  """State of `scale_by_ldadam`.

  Attributes:
    count, mu, nu, projector: as of `galore.GaLoreState`.
    failed: [...] int32 for a projected leaf: 1 for each kernel whose first decomposition was not finite, so that it
      has no projector yet, else 0. None for a leaf that is not projected.
    error: E of a projected leaf, of the shape of the parameter. None for a leaf that is not projected, and without
      error feedback.
  """

  count: Any
  mu: Any
  nu: Any
  projector: Any
  failed: Any
  error: Any


class _Kernels(NamedTuple):
  """The result of an update for one projected leaf."""

  direction: Any
  mu: Any
  nu: Any
  projector: Any
  error: Any


def scale_by_ldadam(
  rank: int,
  rho: float = 0.908,
  error_feedback: bool = True,
  b1: float = 0.908,
  b2: float = 0.99,
  eps: float = 1e-8,
  *,
  projected: Callable,
  directions: Callable = leading_directions,
  moments_dtype=None,
) -> optax.GradientTransformationExtraArgs:
  """LDAdam for projected leaves, Adam for the others; see the docstring of the module.

  A kernel whose first decomposition fails does not move, and is decomposed again at the next update. A kernel whose
  power iteration has no finite result, or whose gradients are 0, keeps its projector. Adam's bias is corrected by the
  number of all updates, also for a kernel that gets its projector late.

  Args:
    rho: ρ, share of the momentum in the matrix whose leading directions are followed.
    error_feedback: whether to keep E; without it E is 0.
    others: see `galore.ProjectedAdam`.
  """
  adam = ProjectedAdam(rank, 1, projected, b1, b2, eps, directions, None, moments_dtype)

  def init(params):
    state = adam.init(params)
    error = jax.tree.map(
      lambda p, old: jnp.zeros_like(p) if error_feedback and old is not None else None, params, state.projector
    )
    return LDAdamState(*state, error=error)

  def update(updates, state, params=None, **_):
    del params
    total = jax.tree.map(lambda g, e: g if e is None else g + e, updates, state.error)
    missing = jax.tree.map(lambda p: ~jnp.any(p != 0, axis=(-2, -1)), state.projector)
    any_missing = sum((jnp.sum(x) for x in jax.tree.leaves(missing)), jnp.zeros((), jnp.int32)) > 0
    # This cond must not be under a vmap, which would turn it into a select that decomposes in every step.
    decompose = lambda: refresh_all(total, state.projector, missing, lambda grad, _: directions(grad, rank))
    first, failed = jax.lax.cond(
      any_missing, decompose, lambda: (state.projector, jax.tree.map(jnp.zeros_like, state.failed))
    )
    before, count = _Bias(b1, b2, state.count), optax.safe_increment(state.count)
    after = _Bias(b1, b2, count)

    def moments(grad, m, v):
      return b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2

    def leaf(total, m, v, projector, first, missing):
      m, v = (x.astype(jnp.promote_types(x.dtype, total.dtype)) for x in (m, v))
      if projector is None:
        m, v = moments(total, m, v)
        return _Kernels(after.direction(m, v, eps), m, v, None, None)
      total, shape = wide(total), total.shape
      m_hat, v_hat = before.corrected(m, v)
      followed = _followed(projector, rho * (projector @ m_hat) + (1 - rho) * total)
      new = jnp.where(missing[..., None, None], first, followed)
      change = new.mT @ projector
      m_moved = change @ m
      v_moved = before.second(m) * jnp.abs(change**2 @ (v_hat - m_hat**2) + (change @ m_hat) ** 2)
      low = new.mT @ total
      error = total - new @ low + b1 / (1 - b1) * (projector @ m - new @ m_moved)
      error = jnp.where(jnp.any(new != 0, axis=(-2, -1), keepdims=True), error, 0)  # else it would grow meanwhile
      m, v = moments(low, m_moved, v_moved)
      direction = new @ after.direction(m, v, eps)
      error = oriented(error, shape) if error_feedback else None
      return _Kernels(oriented(direction, shape), m, v, new, error)

    found = jax.tree.map(leaf, total, state.mu, state.nu, state.projector, first, missing)
    part = lambda name: jax.tree.map(lambda kernels: getattr(kernels, name), found, is_leaf=_is_result)
    state = LDAdamState(count, part("mu"), part("nu"), part("projector"), failed, part("error"))
    return part("direction"), adam.stored(state)

  return optax.GradientTransformationExtraArgs(init, update)


def _is_result(node):
  return isinstance(node, _Kernels)


class _Bias(NamedTuple):
  """The correction of Adam's bias after `count` updates; 0 of moments that have had none."""

  b1: float
  b2: float
  count: Any

  def second(self, like):
    """1 − β2ᵗ in the dtype of `like`."""
    return (1 - self.b2**self.count).astype(like.dtype)

  def corrected(self, m, v):
    """m̂ and v̂."""
    first, second = (1 - self.b1**self.count).astype(m.dtype), self.second(v)
    some = self.count > 0
    return m / jnp.where(some, first, 1), v / jnp.where(some, second, 1)

  def direction(self, m, v, eps):
    """m̂ / (√v̂ + ε)."""
    m_hat, v_hat = self.corrected(m, v)
    return m_hat / (jnp.sqrt(v_hat) + eps)


def _followed(projector, matrix):
  """QR(B·Bᵀ·P) for B = `matrix`, in float32 or wider; P where that is not finite or B is 0."""
  dtype = jnp.promote_types(matrix.dtype, jnp.float32)
  matrix, old = matrix.astype(dtype), projector.astype(dtype)
  largest = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
  matrix = matrix / jnp.where(largest > 0, largest, 1)  # its scale does not matter, and squares could underflow
  new = _orthonormal(matrix @ (matrix.mT @ old))
  good = (largest > 0) & jnp.all(jnp.isfinite(new), axis=(-2, -1), keepdims=True)
  return jnp.where(good, new, old).astype(projector.dtype)


def _orthonormal(x):
  """The factor Q of the QR decomposition of x [..., small, rank], one matrix at a time.

  jaxlib divides a batch of decompositions over the thread pool of the CPU, and waits for it in a thread of that pool.
  Two batches at once wait for each other for ever on two cores (jaxlib 0.10.2).
  """
  matrices = x.reshape(-1, *x.shape[-2:])
  return jax.lax.map(lambda matrix: jnp.linalg.qr(matrix)[0], matrices).reshape(x.shape)


def check(config):
  """Raise `UserError` if the rank or ρ is invalid."""
  full.check(config)
  projectors.check_rank(config)
  if not 0 <= config.ldadam.rho < 1:
    raise UserError(f"ldadam.rho (={config.ldadam.rho}) must be at least 0 and less than 1; set --config.ldadam.rho")


def describe(config) -> list[str]:
  """What takes the extra time and memory of the method."""
  lines = ["power iterations of every block gradient: one in each step"]
  if config.ldadam.error_feedback:
    lines.append("error feedback: a buffer of the size of the block kernels")
  return lines


def warnings(config) -> list[str]:
  """No warnings."""
  return []


def build(config) -> Method:
  """The layers of full-rank training; gradients of block kernels are projected, all others go to Adam directly."""
  settings = (config.rank, config.ldadam.rho, config.ldadam.error_feedback)
  optimizer = scale_by_ldadam(*settings, projected=block_kernels, **adam_options(config))
  optimizer_metrics = lambda opt_state: {"svd_failed": failures(opt_state)}
  return full.build(config)._replace(optimizer=optimizer, optimizer_metrics=optimizer_metrics)
