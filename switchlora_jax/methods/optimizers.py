"""The optimizers that `config.optimizer` selects, for the methods that leave the choice to the user.

All are Optax transformations without learning rate, sign and weight decay; the train step applies these.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import path_aware_map
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.optimizer import scale_by_vector_adam
from switchlora_jax.models.weights import is_linear


class Coefficients(NamedTuple):
  """Default coefficients of an optimizer; None: it has no such coefficient.

  Attributes:
    b1: decay rate of the first moment.
    b2: decay rate of the second moment; for lion, of the momentum.
    eps: added to the square root of the second moment.
  """

  b1: float = 0.9
  b2: float | None = 0.999
  eps: float | None = 1e-8


ADAM = {"adam": Coefficients()}
OPTIMIZERS = ADAM | {
  "muon": Coefficients(b1=0.95),
  "lion": Coefficients(b2=0.99, eps=None),
  "sgd": Coefficients(b2=None, eps=None),
}
NARROW = 2**-8  # relative spacing of bfloat16: a decay by less is rounded away
MUON_RMS = 0.2  # of Muon's directions, as of Adam's, so that one learning rate suits both (arXiv 2502.16982, eq. 4)


def check(config, accepted: dict[str, Coefficients]):
  """Raise `UserError` if a key of `config.optimizer` is invalid.

  Args:
    accepted: the optimizers of the method, {name: default coefficients}.
  """
  chosen = config.optimizer
  if chosen.name not in OPTIMIZERS:
    raise UserError(
      f"optimizer.name (={chosen.name!r}) must be one of {', '.join(OPTIMIZERS)}; set --config.optimizer.name"
    )
  if chosen.name not in accepted:
    raise UserError(
      f"optimizer.name (={chosen.name!r}) is not supported by --config.method={config.method}, which supports "
      f"{', '.join(accepted)}; set --config.optimizer.name={next(iter(accepted))}, or use "
      f"--config.method=full or lora"
    )
  for key, default in accepted[chosen.name]._asdict().items():
    if chosen[key] is not None and default is None:
      raise UserError(f"optimizer.{key} (={chosen[key]}) is not a coefficient of {chosen.name}; leave it unset")
  for key in ("b1", "b2"):
    if chosen[key] is not None and not 0 <= chosen[key] < 1:
      raise UserError(
        f"optimizer.{key} (={chosen[key]}) must be at least 0 and less than 1; set --config.optimizer.{key}"
      )
  if chosen.eps is not None and not chosen.eps > 0:
    raise UserError(f"optimizer.eps (={chosen.eps}) must be greater than 0; set --config.optimizer.eps")
  if not chosen.weight_decay >= 0:
    raise UserError(
      f"optimizer.weight_decay (={chosen.weight_decay}) must not be negative; set --config.optimizer.weight_decay"
    )
  if chosen.moments_dtype not in (None, "bfloat16", config.param_dtype):
    raise UserError(
      f"optimizer.moments_dtype (={chosen.moments_dtype!r}) must be bfloat16 or that of --config.param_dtype "
      f"(={config.param_dtype!r}); set --config.optimizer.moments_dtype"
    )


def warnings(config) -> list[str]:
  """Warn if second moments, or weights, are stored in a dtype in which they cannot decay."""
  chosen, found = config.optimizer, []
  moments = chosen.moments_dtype == "bfloat16" and chosen.b2 is not None and chosen.name != "lion"
  if moments and 1 - chosen.b2 < NARROW:
    found.append(
      f"second moments stored in bfloat16 (moments_dtype, param_dtype) round away a decay by less than 2⁻⁸, so that "
      f"with optimizer.b2 = {chosen.b2} they grow and do not fall; set --config.optimizer.b2=0.99 or a lower value"
    )
  decay = chosen.weight_decay * max(config.learning_rate, config.rest_learning_rate)
  if config.param_dtype == "bfloat16" and 0 < decay < NARROW:
    found.append(
      f"weights stored in bfloat16 round away a decay by less than 2⁻⁸ per step, and learning rate × weight_decay is "
      f"at most {decay:.2g}; set --config.param_dtype=float32, or leave out --config.optimizer.weight_decay"
    )
  return found


def adam_options(config) -> dict[str, Any]:
  """`b1`, `b2`, `eps` and `moments_dtype` of a resolved config, as arguments of optimizers that contain Adam."""
  chosen = config.optimizer
  return dict(b1=chosen.b1, b2=chosen.b2, eps=chosen.eps, moments_dtype=_moments_dtype(config))


def _moments_dtype(config):
  """The dtype of stored moments; None for that of the parameters."""
  stored = config.optimizer.moments_dtype
  return None if stored == config.param_dtype else jnp.dtype(stored)


def make_optimizer(config, vectors: Callable | None = None) -> optax.GradientTransformation:
  """The optimizer that a resolved config selects.

  Muon orthogonalises the momentum of the linear layers of the blocks, and uses Adam (b1 = 0.9) for all other arrays.

  Args:
    vectors: marks the leaves whose rows are LoRA vectors; see `scale_by_vector_adam`. Other optimizers ignore it.
  """
  chosen, dtype = config.optimizer, _moments_dtype(config)
  options = adam_options(config)
  if vectors:
    options |= {"vectors": vectors, "count_per_element": config.count_per_element}
  match chosen.name:
    case "adam":
      return scale_by_vector_adam(**options)
    case "muon":
      adam = scale_by_vector_adam(**options | {"b1": ADAM["adam"].b1})
      return optax.partition({"muon": _muon(chosen.b1, dtype), "adam": adam}, _muon_labels)
    case "lion":
      return optax.scale_by_lion(chosen.b1, chosen.b2, mu_dtype=dtype)
    case "sgd":
      return optax.trace(chosen.b1, accumulator_dtype=dtype)


def _muon_labels(params):
  return path_aware_map(lambda path, _: "muon" if is_linear(path) else "adam", params)


def _muon(momentum: float, dtype):
  """Muon on stacked matrices [layers, in, out], with directions of the root mean square of Adam's."""
  stacked = lambda params: jax.tree.map(lambda _: MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), params)
  muon = scale_by_muon(beta=momentum, mu_dtype=dtype, weight_dimension_numbers=stacked)
  scaled = lambda updates, params: jax.tree.map(lambda u: MUON_RMS * max(u.shape[-2:]) ** 0.5 * u, updates)
  return optax.chain(muon, optax.stateless(scaled))
