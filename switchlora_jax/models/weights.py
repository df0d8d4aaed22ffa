"""The plain weights of a model, whatever its layers: adapters merged in, or split off again.

Plain weights are the `params` of the full-rank model: what a low-rank layer keeps as `lora_a`, `lora_b`
and a frozen `kernel`, its tail included, is one `kernel` there; embedding, norms and head are the same.
"""

from flax.traverse_util import flatten_dict, unflatten_dict

from switchlora_jax.lowrank.kernel_storage import KERNEL, bases, read, write
from switchlora_jax.lowrank.layers import merge

ADAPTER = ("lora_a", "lora_b")


def merged(params, frozen, scale) -> dict:
  """Plain weights: each `kernel + scale·AᵀB`; what has no adapter stays as it is. Stacked layers or not."""
  flat = flatten_dict(params)
  for path, base in bases(frozen).items():
    flat[*path, KERNEL] = merge(read(base), *(flat.pop((*path, name)) for name in ADAPTER), scale)
  return unflatten_dict(flat)


def split(weights, params, frozen, scale) -> tuple[dict, dict]:
  """Collections like `params` and `frozen`, with their adapters and the function of the plain `weights`.

  What is frozen has the dtypes of `frozen`, what is trained those of `weights`.
  """
  flat, weights, base = flatten_dict(params), flatten_dict(weights), {}
  for path, like in bases(frozen).items():
    kernel = merge(weights[*path, KERNEL], *(flat[*path, name] for name in ADAPTER), -scale)
    base |= {(*path, name): value for name, value in write(kernel, like).items()}
  flat |= {path: value for path, value in weights.items() if path in flat}
  return unflatten_dict(flat), unflatten_dict(base)


def in_block(path: tuple[str, ...]) -> bool:
  """Whether the array under a path of plain weights is the kernel of a linear layer inside a block."""
  return path[0] == "blocks" and path[-1] == "kernel"
