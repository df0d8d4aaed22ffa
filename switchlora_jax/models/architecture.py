"""The architecture of a decoder: the keys of `config.model`, their checks, and the shapes of its linear layers.

The defaults are those of LLaMA 1. Other values give LLaMA 2 and 3, Mistral, Qwen 2 and 3 and their relatives; see
`interop.families`.
"""

import math
from typing import NamedTuple

from switchlora_jax.errors import UserError
from switchlora_jax.models.rotary import Rope, check_rope


class Architecture(NamedTuple):
  """A resolved `config.model`.

  Attributes:
    vocab_size: number of rows of the embedding.
    hidden_size: width of the residual stream.
    intermediate_size: width inside the MLP.
    num_layers: number of blocks.
    num_heads: query heads per block.
    num_kv_heads: heads of keys and values; each serves num_heads / num_kv_heads query heads.
    head_dim: size of a head, even.
    norm_eps: ε of RMSNorm.
    tied_embeddings: whether the head is the transposed embedding.
    qkv_bias: whether q, k and v have a bias; the other linear layers have none.
    qk_norm: whether each head of q and k is normalised by an RMSNorm before the rotation.
    rope: the rotary positions.
    max_position: number of positions that the model is used with; None: not known.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  norm_eps: float = 1e-6
  tied_embeddings: bool = False
  qkv_bias: bool = False
  qk_norm: bool = False
  rope: Rope = Rope()
  max_position: int | None = None

  def linear_shapes(self) -> dict[str, tuple[int, int]]:
    """{name: (in, out)} of the linear layers of a block."""
    hidden, inner = self.hidden_size, self.intermediate_size
    q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
    attention = {"q": (hidden, q), "k": (hidden, kv), "v": (hidden, kv), "o": (q, hidden)}
    return attention | {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}

  def plain_shapes(self) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the plain weights, which are the `params` of the full-rank model; see `models.weights`."""
    hidden, layers = self.hidden_size, self.num_layers
    linear = self.linear_shapes()
    found = {"embed/embedding": (self.vocab_size, hidden), "norm/scale": (hidden,)}
    found |= {f"blocks/{name}_norm/scale": (layers, hidden) for name in ("attention", "mlp")}
    found |= {f"blocks/{name}/kernel": (layers, *shape) for name, shape in linear.items()}
    if self.qkv_bias:
      found |= {f"blocks/{name}_bias/bias": (layers, linear[name][1]) for name in "qkv"}
    if self.qk_norm:
      found |= {f"blocks/{name}_norm/scale": (layers, self.head_dim) for name in "qk"}
    return found if self.tied_embeddings else found | {"head/kernel": (hidden, self.vocab_size)}


def architecture_of(keys) -> Architecture:
  """The architecture that a mapping of keys of `config.model` describes; it may have further keys.

  Keys that `Architecture` has a default for may be missing. `num_kv_heads` and `head_dim` may be missing or None:
  num_heads, and hidden_size / num_heads. An `Architecture` is returned as it is.
  """
  if isinstance(keys, Architecture):
    return keys
  found = {name: keys[name] for name in Architecture._fields if name in keys}
  derived = derived_keys(found["hidden_size"], found["num_heads"])
  found |= {name: value for name, value in derived.items() if found.get(name) is None}
  return Architecture(**found | {"rope": Rope(**dict(found.get("rope", {})))})


def derived_keys(hidden_size: int, num_heads: int) -> dict[str, int]:
  """The defaults of `num_kv_heads` and `head_dim`."""
  return {"num_kv_heads": num_heads, "head_dim": hidden_size // num_heads}


def smaller_sides(keys) -> dict[str, int]:
  """{name: min(in, out)} of the linear layers of a block, from the keys of `config.model`."""
  return {name: min(shape) for name, shape in architecture_of(keys).linear_shapes().items()}


def layers_of_full_rank(keys, rank: int) -> str:
  """`k, v (128)`: the linear layers of a block whose min(in, out) is at most a rank, and that number; "" if none is."""
  found = {name: side for name, side in smaller_sides(keys).items() if side <= rank}
  return f"{', '.join(found)} ({', '.join(map(str, dict.fromkeys(found.values())))})" if found else ""


def check_architecture(keys, seq_len: int = 1) -> None:
  """Raise `UserError` if keys of `config.model`, resolved or not, do not fit together; sizes are positive.

  Args:
    seq_len: the length of training.
  """
  if keys["head_dim"] is None:
    _check_default_head_dim(keys["hidden_size"], keys["num_heads"])
  elif keys["head_dim"] < 2 or keys["head_dim"] % 2:
    raise UserError(
      f"model.head_dim (={keys['head_dim']}) must be a positive even integer, for rotary positions; set "
      f"--config.model.head_dim"
    )
  model = architecture_of(keys)
  if model.num_kv_heads < 1 or model.num_heads % model.num_kv_heads:
    raise UserError(
      f"model.num_kv_heads (={model.num_kv_heads}) must be a divisor of model.num_heads (={model.num_heads}); set "
      f"--config.model.num_kv_heads"
    )
  if not 0 < model.norm_eps < 1:
    raise UserError(f"model.norm_eps (={model.norm_eps:g}) must lie between 0 and 1; set --config.model.norm_eps")
  if model.max_position is not None and model.max_position < seq_len:
    raise UserError(
      f"seq_len (={seq_len}) must be at most model.max_position (={model.max_position}); lower --config.seq_len, or "
      f"raise --config.model.max_position; weights trained with fewer positions then need a scaling in "
      f"--config.model.rope"
    )
  check_rope(model.rope, model.head_dim)


def _check_default_head_dim(hidden: int, heads: int):
  if hidden % heads:
    small = [n for n in range(1, math.isqrt(hidden) + 1) if hidden % n == 0]
    divisors = [n for n in (*small, *(hidden // n for n in small)) if hidden // n % 2 == 0]
    nearest = min(divisors or [1], key=lambda n: abs(n - heads))
    raise UserError(
      f"model.num_heads (={heads}) must divide model.hidden_size (={hidden}); try --config.model.num_heads={nearest}, "
      f"or set --config.model.head_dim"
    )
  if hidden // heads % 2:
    raise UserError(
      f"the head size (model.hidden_size / model.num_heads = {hidden} / {heads} = {hidden // heads}) must be even, "
      f"for rotary positions; change --config.model.num_heads or --config.model.hidden_size"
    )
