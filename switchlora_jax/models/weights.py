"""Plain weights: merge the linear layers of a model into plain kernels, and store plain kernels in such layers.

Plain weights are the `params` of the full-rank model. Where another model has a layer with factors `lora_a` and
`lora_b` (see `lowrank.kinds`), they have one `kernel`. Embedding, norms and head are the same in both.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.kernel_storage import KERNEL, without_residual
from switchlora_jax.lowrank.kinds import kind_of, linear_layers
from switchlora_jax.lowrank.layers import LORA_A


def merged(params, frozen, scale) -> dict:
  """The plain weights: the merged kernel of each layer with factors, and all other parameters unchanged.

  Layers may be stacked. For layers with a base kernel, it is `kernel + scale·AᵀB`.
  """
  flat = flatten_dict(params)
  for path, arrays in linear_layers(params, frozen).items():
    for name in arrays:
      flat.pop((*path, name), None)
    flat[*path, KERNEL] = kind_of(arrays).merged(arrays, scale)
  return unflatten_dict(flat)


def split(weights, params, frozen, scale) -> tuple[dict, dict]:
  """Store plain weights in the layers of a model with `params` and `frozen`.

  Where a layer has a base kernel, its adapter stays the same and the new base kernel is the plain kernel minus
  `scale·AᵀB`, so that the function is that of the plain weights. Layers without one store an approximation; see
  `is_exact` and `relative_error`.

  Args:
    params, frozen: collections of the model, for the adapters, the names and the dtypes of kernels.
  Returns:
    The new params and frozen. Frozen arrays and factors have the dtypes of `frozen` and `params`, other parameters
    those of `weights`.
  Raises:
    UserError: the weights are those of another architecture: arrays are missing, or unknown to the model.
  """
  layers = linear_layers(params, frozen)
  flat, flat_frozen, weights = flatten_dict(params), flatten_dict(frozen), flatten_dict(weights)
  rest = {path for path in flat if path[:-1] not in layers}
  _check_names(weights.keys(), rest | {(*path, KERNEL) for path in layers})
  for path, like in layers.items():
    for name, value in kind_of(like).stored(weights[*path, KERNEL], like, scale).items():
      (flat if (*path, name) in flat else flat_frozen)[*path, name] = value
  return unflatten_dict(flat | {path: weights[path] for path in rest}), unflatten_dict(flat_frozen)


def is_exact(params, frozen) -> bool:
  """Whether `split` keeps the function of any plain weights, up to rounding in the dtype of the parameters.

  False if a base kernel is stored in a narrower dtype.
  """
  wide = lambda arrays: KERNEL not in arrays or arrays[KERNEL].dtype.itemsize >= arrays[LORA_A].dtype.itemsize
  return all(kind_of(arrays).exact and wide(arrays) for arrays in linear_layers(params, frozen).values())


def relative_error(plain, params, frozen, scale) -> jax.Array:
  """[] float32 or wider: ‖W - W'‖ / ‖W‖ over all merged kernels W', with the kernels W of the plain weights.

  W' are those of the forward pass, without the residuals of narrow base kernels.
  """
  flat, squares = flatten_dict(plain), jnp.zeros(2)

  def of_layer(layer):
    kernel, arrays = layer
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    rest = kernel - kind_of(arrays).merged(arrays, scale)
    return jnp.stack([jnp.sum(rest**2), jnp.sum(kernel**2)])

  for path, arrays in linear_layers(params, frozen).items():
    layers = (flat[*path, KERNEL], without_residual(arrays))
    # One layer at a time: those of a whole stack would take memory for further copies of it.
    squares += of_layer(layers) if layers[0].ndim == 2 else jnp.sum(jax.lax.map(of_layer, layers), 0)
  return jnp.sqrt(squares[0] / squares[1])


def _check_names(found, expected):
  """Raise `UserError` unless two sets of paths are equal; a missing array would keep its random initial values."""
  if found != expected:
    names = lambda paths: ", ".join(sorted(map("/".join, paths))) or "none"
    raise UserError(
      f"plain weights must have the arrays of the model that continues from them; missing: {names(expected - found)}; "
      f"not in the model: {names(found - expected)}; start from a model of the same architecture, or select the "
      f"architecture of the weights in --config.model"
    )


def is_vector(path: tuple[str, ...]) -> bool:
  """Whether the array at a path of trainable parameters is the scale of a norm or a bias."""
  return path[-1] in ("scale", "bias")


def is_linear(path: tuple[str, ...]) -> bool:
  """Whether the array at a path of trainable parameters belongs to a linear layer of a block: a kernel or a factor."""
  return path[0] == "blocks" and not is_vector(path)


def in_block(path: tuple[str, ...]) -> bool:
  """Whether the array at a path of plain weights is the kernel of a linear layer of a block."""
  return path[0] == "blocks" and path[-1] == KERNEL
