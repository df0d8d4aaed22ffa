"""Rotary positions, and their scalings for contexts that are longer than in the original training.

Position p rotates pair i of a head by the angle p · base^(−2i / head_dim). A scaling changes these frequencies. The
results are those of `transformers`, except that `dynamic` is fixed: it is computed for `max_position` whatever the
length of a sequence, so that cached keys stay valid.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from switchlora_jax.errors import UserError


class Rope(NamedTuple):
  """A resolved `config.model.rope`.

  Attributes:
    base: θ; the frequencies are powers of 1/θ.
    scaling: one of `USED`.
    factor: context length / original context length.
    original_length: positions of the original training; not used by `none` and `linear`.
    low_freq_factor, high_freq_factor: llama3: wavelengths above original_length / low_freq_factor are scaled.
      Wavelengths below original_length / high_freq_factor are not scaled. Others are interpolated.
    beta_fast, beta_slow: yarn: frequencies with more than beta_fast rotations in original_length are not scaled.
      Frequencies with less than beta_slow rotations are scaled. Others are interpolated.
    attention_factor: yarn: factor of the rotated q and k; None: 0.1 · ln(factor) + 1.
  """

  base: float = 10_000.0
  scaling: str = "none"
  factor: float = 1.0
  original_length: int = 0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None


USED = {  # keys beside `base` and `scaling` that a scaling uses
  "none": (),
  "linear": ("factor",),
  "dynamic": ("factor", "original_length"),
  "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
  "yarn": ("factor", "original_length", "beta_fast", "beta_slow", "attention_factor"),
}


def check_rope(rope: Rope, head_dim: int) -> None:
  """Raise `UserError` if a key of `config.model.rope` is invalid."""
  key = "model.rope"
  if rope.scaling not in USED:
    raise UserError(f"{key}.scaling (={rope.scaling!r}) must be one of {', '.join(USED)}; set --config.{key}.scaling")
  if not rope.base > 1:
    raise UserError(f"{key}.base (={rope.base:g}) must be greater than 1; set --config.{key}.base")
  for name, default in Rope._field_defaults.items():
    if name not in ("base", "scaling", *USED[rope.scaling]) and getattr(rope, name) != default:
      users = [scaling for scaling, used in USED.items() if name in used]
      raise UserError(
        f"{key}.{name} (={getattr(rope, name)}) is not used with {key}.scaling={rope.scaling}; leave it at {default}, "
        f"or set --config.{key}.scaling to {' or '.join(users)}"
      )
  if not rope.factor >= 1:
    raise UserError(f"{key}.factor (={rope.factor:g}) must be at least 1; set --config.{key}.factor")
  if "original_length" in USED[rope.scaling] and rope.original_length < 1:
    raise UserError(
      f"{key}.original_length (={rope.original_length}) must be the number of positions of the original training with "
      f"{key}.scaling={rope.scaling}; set --config.{key}.original_length"
    )
  if rope.scaling == "dynamic" and head_dim < 4:
    raise UserError(
      f"the size of a head (={head_dim}) must be at least 4 with {key}.scaling=dynamic; set --config.model.head_dim"
    )
  if rope.attention_factor is not None and not rope.attention_factor > 0:
    raise UserError(
      f"{key}.attention_factor (={rope.attention_factor:g}) must be greater than 0; set --config.{key}.attention_factor"
    )
  if rope.scaling == "llama3" and not 0 < rope.low_freq_factor < rope.high_freq_factor:
    raise UserError(
      f"{key}.low_freq_factor (={rope.low_freq_factor:g}) must be greater than 0 and less than {key}.high_freq_factor "
      f"(={rope.high_freq_factor:g}); set both"
    )
  if rope.scaling == "yarn" and not 0 < rope.beta_slow < rope.beta_fast:
    raise UserError(
      f"{key}.beta_slow (={rope.beta_slow:g}) must be greater than 0 and less than {key}.beta_fast "
      f"(={rope.beta_fast:g}); set both"
    )


def frequencies(rope: Rope, head_dim: int, max_position: int | None, dtype=jnp.float32):
  """Radians per position of the pairs of a head, [head_dim / 2].

  Args:
    max_position: positions that the model is used with; only `dynamic` depends on it.
  """
  exponents = -jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim
  match rope.scaling:
    case "linear":
      return rope.base**exponents / rope.factor
    case "dynamic":
      return fixed_base(rope, head_dim, max_position) ** exponents
    case "llama3":
      return _llama3(rope, rope.base**exponents)
    case "yarn":
      return _yarn(rope, rope.base**exponents, head_dim)
  return rope.base**exponents


def extends(rope: Rope, max_position: int | None) -> bool:
  """Whether positions go beyond those of the original training."""
  return (max_position or 0) > rope.original_length


def fixed_base(rope: Rope, head_dim: int, max_position: int | None) -> float:
  """The base with which `dynamic` scaling for `max_position` has the frequencies of no scaling."""
  if not extends(rope, max_position):
    return rope.base
  reach = (max_position or 0) / rope.original_length
  return rope.base * (rope.factor * reach - (rope.factor - 1)) ** (head_dim / (head_dim - 2))


def _llama3(rope: Rope, plain):
  turns = rope.original_length * plain / (2 * math.pi)
  share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
  return _interpolated(plain, rope.factor, share)


def _yarn(rope: Rope, plain, head_dim: int):
  """arXiv 2309.00071, section 3.2; the bounds are rounded to whole pairs, as by `transformers`."""
  pair_of = lambda turns: head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.base))
  first = max(math.floor(pair_of(rope.beta_fast)), 0)
  last = min(math.ceil(pair_of(rope.beta_slow)), head_dim - 1)
  pairs = jnp.arange(head_dim // 2, dtype=plain.dtype)
  return _interpolated(plain, rope.factor, 1 - (pairs - first) / ((last - first) or 0.001))


def _interpolated(plain, factor: float, share):
  """`share` of the plain frequencies, limited to [0, 1], and the rest of those divided by the factor."""
  share = jnp.clip(share, 0, 1)
  return share * plain + (1 - share) * plain / factor


def rotary_angles(rope: Rope, length: int, head_dim: int, max_position: int | None = None, dtype=jnp.float32):
  """Rotary angles [length, head_dim / 2] of positions 0 to length - 1; see `frequencies`."""
  return jnp.outer(jnp.arange(length, dtype=dtype), frequencies(rope, head_dim, max_position, dtype))


def score_factor(rope: Rope) -> float:
  """Factor of the scores of attention: the square of yarn's factor of q and k, else 1."""
  if rope.scaling != "yarn":
    return 1.0
  factor = rope.attention_factor
  return (0.1 * math.log(rope.factor) + 1.0 if factor is None else factor) ** 2


def rotate(x, angles):
  """Rotate the two halves of each head by the angles of its position; x [..., length, head_size]."""
  cos, sin = (jnp.expand_dims(f(angles), range(x.ndim - 2)).astype(x.dtype) for f in (jnp.cos, jnp.sin))
  first, second = jnp.split(x, 2, -1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
