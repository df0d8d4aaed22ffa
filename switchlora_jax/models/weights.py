"""Plain weights: merge the adapters of a model into its kernels, and split kernels into a base and an adapter.

Plain weights are the `params` of the full-rank model. Where a low-rank model has `lora_a`, `lora_b` and a frozen
`kernel` (perhaps with a residual), they have one `kernel`. Embedding, norms and head are the same in both.
"""

from flax.traverse_util import flatten_dict, unflatten_dict

from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.kernel_storage import KERNEL, frozen_layers, load_kernel, store_kernel
from switchlora_jax.lowrank.layers import ADAPTER, merge


def merged(params, frozen, scale) -> dict:
  """The plain weights: each `kernel + scale·AᵀB`, and all other parameters unchanged; layers may be stacked."""
  flat = flatten_dict(params)
  for path, base in frozen_layers(frozen).items():
    flat[*path, KERNEL] = merge(load_kernel(base), *(flat.pop((*path, name)) for name in ADAPTER), scale)
  return unflatten_dict(flat)


def split(weights, params, frozen, scale) -> tuple[dict, dict]:
  """Split plain weights into `params` and `frozen` with the adapters of the given `params`.

  Each new kernel is the plain kernel minus `scale·AᵀB`, so that the function is that of the plain weights.

  Args:
    params, frozen: collections of the low-rank model, for the adapters, the names and the dtypes of kernels.
  Returns:
    The new params and frozen. Frozen arrays have the dtypes of `frozen`, other parameters those of `weights`.
  Raises:
    UserError: the weights are those of another architecture: arrays are missing, or unknown to the low-rank model.
  """
  flat, weights, base = flatten_dict(params), flatten_dict(weights), {}
  layers = frozen_layers(frozen)
  expected = {path for path in flat if path[-1] not in ADAPTER} | {(*path, KERNEL) for path in layers}
  _check_names(weights.keys(), expected)
  for path, like in layers.items():
    kernel = merge(weights[*path, KERNEL], *(flat[*path, name] for name in ADAPTER), -scale)
    base |= {(*path, name): value for name, value in store_kernel(kernel, like).items()}
  flat |= {path: value for path, value in weights.items() if path in flat}
  return unflatten_dict(flat), unflatten_dict(base)


def _check_names(found, expected):
  """Raise `UserError` unless two sets of paths are equal; a missing array would keep its random initial values."""
  if found != expected:
    names = lambda paths: ", ".join(sorted(map("/".join, paths))) or "none"
    raise UserError(
      f"plain weights must have the arrays of the model that continues from them; missing: {names(expected - found)}; "
      f"not in the model: {names(found - expected)}; start from a model of the same architecture, or select the "
      f"architecture of the weights in --config.model"
    )


def is_norm(path: tuple[str, ...]) -> bool:
  """Whether the array at a path of trainable parameters is the scale or the bias of a norm."""
  return path[-1] in ("scale", "bias")


def is_linear(path: tuple[str, ...]) -> bool:
  """Whether the array at a path of trainable parameters belongs to a linear layer of a block: a kernel or a factor."""
  return path[0] == "blocks" and not is_norm(path)


def in_block(path: tuple[str, ...]) -> bool:
  """Whether the array at a path of plain weights is the kernel of a linear layer of a block."""
  return path[0] == "blocks" and path[-1] == KERNEL
