"""Algorithms 1 and 2 of SwitchLoRA (arXiv 2406.06564): in each step, swap a few LoRA vectors with other candidates.

Invariant: a switch changes A, B, the spares and W, but not `W + s·B·A`. In the layout of `layers`, it keeps
`kernel + scale·AᵀB` with one LoRA vector per row of `lora_a [r, in]` and `lora_b [r, out]`.

All positions in a layer follow from `cursor`, the number k of vectors loaded so far per factor. Load k of A goes to
slot `k mod r` and load k of B to slot `(k + r//2) mod r`. Both exchange their vector with spare `k mod (c - r)`, unless
`draw_spare_indices` draws the spares at random. The authors' code stores all c candidates and writes an evicted vector
back to its own position. Swapping with c - r spares visits the same vectors in the same order. Layers without stored
spares load fresh random vectors instead, and do not keep the evicted ones. With `Choice`, the slots are those whose
vectors have the noisiest gradients.

The functions are pure and independent of models and configs. They take any pytrees `params`, `frozen` and `candidates`
that have the arrays of a layer under one path, with or without leading axes along which layers are stacked.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from switchlora_jax.lowrank.kernel_storage import STORAGE, load_kernel, store_kernel
from switchlora_jax.lowrank.layers import ADAPTER, LORA_A, LORA_B
from switchlora_jax.lowrank.spares import (
  FreshVectors,
  gather_rows,
  no_spares,
  replicate,
  scatter_rows,
  stack_shape,
  switchable,
)


class SwitchSchedule(NamedTuple):
  """How often vectors are switched, and for how long their counterparts are frozen.

  Attributes:
    interval: steps between two switches of one vector at the start (interval₀ of Algorithm 2, 40 in the paper); 0
      disables switching.
    freeze_steps: N, steps for which the counterpart is frozen, including the step of the switch.
    total_steps: T, the number of steps of the run.
    decay_point: p, the fraction of T after which the rate has fallen to `decay_to` of its start.
    decay_to: d, 1/3 in the paper (0.3 in the authors' code).
    start: the first step that may switch; the decay counts from it. 0 in the paper.
    curve: a function from the step to the relative rate in [0, 1]; None: exponential decay by p and d, as in the paper.
  """

  interval: int = 40
  freeze_steps: int = 5
  total_steps: int = 40_000
  decay_point: float = 0.1
  decay_to: float = 1 / 3
  start: int = 0
  curve: Callable | None = None

  def rate(self, step):
    """The switching rate at `step` t relative to the start, [], at least 1e-8 and 0 before `start`.

    It is `curve(t)`, or d^((t - start + 1) / (p·T)).
    """
    if self.curve:
      relative = self.curve(step)
    else:
      relative = self.decay_to ** ((step - self.start + 1) / (self.decay_point * self.total_steps))
    relative = jnp.maximum(relative, 1e-8)
    return jnp.where(step < self.start, 0, relative) if self.start else relative

  def window(self, rank: int, spares: int) -> int:
    """K, the largest number of vectors per factor that one step can switch; 0 if the interval is 0."""
    if self.interval == 0:
      return 0
    return min(rank // self.interval + 1, spares, rank // 2)


class Switched(NamedTuple):
  """The result of `switch`.

  Attributes:
    params, frozen, candidates: the new collections.
    reset, freeze: masks for the optimizer, trees like `params`: [..., r, 1] bool for switchable LoRA vectors, else
      False.
    count: [] int32, number of vectors switched per factor, summed over all layers.
    moved: [] float32 or wider, Frobenius norm of the change of all kernels.
  """

  params: Any
  frozen: Any
  candidates: Any
  reset: Any
  freeze: Any
  count: jax.Array
  moved: jax.Array


class Layer(NamedTuple):
  """The arrays of L stacked layers that a switch rewrites; the fields have the names of the arrays."""

  kernel: jax.Array  # [L, in, out]
  lora_a: jax.Array  # [L, r, in]
  lora_b: jax.Array  # [L, r, out]
  spare_a: jax.Array | None = None  # [L, c - r, in]; None: candidates are fresh
  spare_b: jax.Array | None = None  # [L, c - r, out]
  kernel_tail: jax.Array | None = None  # [L, in, out], the int8 residual of a narrow kernel
  kernel_scale: jax.Array | None = None  # [L, in, 1], of an int8 kernel

  @property
  def frozen(self) -> dict[str, jax.Array]:
    """The arrays that store the kernels, as in a layer's `frozen` collection."""
    return {name: array for name in STORAGE if (array := getattr(self, name)) is not None}

  def rank_and_spares(self) -> tuple[int, int]:
    """r and c - r."""
    rank = self.lora_a.shape[1]
    return rank, min(self.kernel.shape[1:]) - rank


class Clock(NamedTuple):
  """Cursors, freeze timers and ages of L stacked layers; the fields have the names of the arrays."""

  cursor: jax.Array  # [L] int32, number of vectors loaded so far, per factor
  timer_a: jax.Array  # [L, r] int32, steps for which a vector of A remains frozen
  timer_b: jax.Array  # [L, r] int32
  age_a: jax.Array | None = None  # [L, r] int32, steps since a vector of A was loaded; None: slots are sequential
  age_b: jax.Array | None = None


class Choice(NamedTuple):
  """Which vectors a step may switch, in place of the sequential order.

  A vector can be switched if it is at least `min_age` steps old, is not frozen, and its value is below `below` times
  the median of its factor and layer. In even steps A is switched at even slots and B at odd ones, in odd steps the
  reverse; among these, the vectors with the smallest values are switched first. The schedule limits their number, so
  that a layer with fewer such vectors switches less.

  Attributes:
    values: {path: ([..., r] of A, [..., r] of B)} float, a value of each vector; vectors with NaN are not switched.
      `methods.switchlora` passes the signal-to-noise ratio of the gradient of the counterpart.
    min_age: in steps.
    below: relative to the median.
  """

  values: dict
  min_age: int = 40
  below: float = 1.0


def switch_count(uniform, expected):
  """`switch_num` of Algorithm 2: ⌊s⌋ + Bernoulli(s - ⌊s⌋), from a uniform number in [0, 1) and s = `expected`."""
  whole = jnp.floor(expected)
  return (whole + (uniform < expected - whole)).astype(jnp.int32)


def swap(vectors, spares, slots, indices, active, fresh=None):
  """Algorithm 1, line 2, for one factor of L layers: exchange `vectors[slots]` with `spares[indices]` where `active`.

  With `fresh` vectors, these are loaded, and the evicted ones are not kept.

  Inactive rows are overwritten with themselves. Their slots and indices must differ from those of active rows, which
  holds within a window. Both writes depend on both reads, so that XLA can update the arrays in place.

  Spares may be narrower than vectors. A vector is then rounded when it becomes a spare, and the kernel is corrected
  by the rounded vector when it returns.

  Shapes: vectors [L, r, d], spares [L, c - r, d], slots, indices, active [L, K], fresh [L, K, d].

  Returns:
    The new vectors, the new spares, and evicted minus loaded rows [L, K, d] in float32 or wider (0 where inactive).
  """
  old = gather_rows(vectors, slots, active)
  new = gather_rows(spares, indices, active).astype(vectors.dtype) if fresh is None else fresh
  mask = active[:, :, None]
  vectors = scatter_rows(vectors, slots, active, jnp.where(mask, new, old))  # P[:, i] ← C(P)[j]
  if fresh is None:
    evicted = jnp.where(mask, old, new).astype(spares.dtype)
    spares = scatter_rows(spares, indices, active, evicted)  # C(P)[j] ← P[:, i]
  wide = jnp.promote_types(vectors.dtype, jnp.float32)
  return vectors, spares, jnp.where(mask, old.astype(wide) - new.astype(wide), 0)


def swap_factors(layers: Layer, slots_a, slots_b, indices_a, indices_b, active, fresh_a=None, fresh_b=None):
  """Algorithm 1, line 2, for both factors of L layers, with the correction that lines 1 and 4 add to the kernel.

  The slots of A and B are disjoint, so the counterpart of a switched vector is not switched in the same step. Lines 1
  and 4 of both factors are therefore one product of rank 2K.

  Returns:
    The layers, whose kernels are unchanged, and the factors left [L, 2K, in] and right [L, 2K, out] of the decrease
    leftᵀ·right of AᵀB.
  """
  lora_a, spare_a, evicted_a = swap(layers.lora_a, layers.spare_a, slots_a, indices_a, active, fresh_a)
  lora_b, spare_b, evicted_b = swap(layers.lora_b, layers.spare_b, slots_b, indices_b, active, fresh_b)
  counterparts_b = replicate(jnp.take_along_axis(lora_b, slots_a[:, :, None], 1))
  counterparts_a = replicate(jnp.take_along_axis(lora_a, slots_b[:, :, None], 1))
  layers = layers._replace(lora_a=lora_a, lora_b=lora_b, spare_a=spare_a, spare_b=spare_b)
  return layers, jnp.concatenate([evicted_a, counterparts_a], 1), jnp.concatenate([counterparts_b, evicted_b], 1)


def add_to_kernels(frozen, left, right, active_layers):
  """Algorithm 1, lines 1 and 4: kernel[l] += left[l]ᵀ·right[l] for the active layers l, in place.

  The product is written as a sum of outer products, which XLA fuses into one pass over the kernel. It needs no
  temporary of the size of the kernels, or one of the size of a single layer if there is a residual to update. The sum
  is computed in the dtype of `left`, float32 or wider, and rounded once to the dtypes in which the kernel is stored.
  The loop visits active layers only, so a step without a switch does no work.

  Args:
    frozen: the arrays that store the stacked kernels, {"kernel": [L, in, out]} or with scale and residual.
    left, right: [L, n, in] and [L, n, out]. active_layers: [L] bool.
  """
  terms = left.shape[1]
  chunk = min(terms, 32)  # with more terms per fusion, XLA stores partial sums in memory
  chunks = -(-terms // chunk)
  left, right = (jnp.pad(x, ((0, 0), (0, chunks * chunk - terms), (0, 0))) for x in (left, right))
  active_first = jnp.argsort(~active_layers)

  def add_chunk(number, frozen):
    layer, first = active_first[number // chunks], number % chunks * chunk
    x, y = (jax.lax.dynamic_slice(rows, (layer, first, 0), (1, chunk, rows.shape[2])) for rows in (left, right))
    old = {name: jax.lax.dynamic_slice_in_dim(stack, layer, 1) for name, stack in frozen.items()}  # [1, in, out]
    new = store_kernel(load_kernel(old) + sum(x[:, k, :, None] * y[:, k, None, :] for k in range(chunk)), old)
    return {name: jax.lax.dynamic_update_slice_in_dim(stack, new[name], layer, 0) for name, stack in frozen.items()}

  return jax.lax.fori_loop(0, jnp.sum(active_layers) * chunks, add_chunk, frozen)


def sequential_slots(cursor, window: int, rank: int):
  """([L, K] of A, [L, K] of B): the slots of the next K loads, in the order of the authors' code."""
  loads = cursor[:, None] + jnp.arange(window)[None]
  return loads % rank, (loads + rank // 2) % rank


def chosen_slots(clock: Clock, window: int, step, *, values, choice: Choice):
  """The slots that `choice` selects, and how many of them can be switched.

  The slots of A and B must be disjoint. In even steps A takes even slots and B odd ones, in odd steps the other way
  round.

  Args:
    values: the values of L layers, ([L, r] of A, [L, r] of B).
  Returns:
    ([L, K] of A, [L, K] of B), each with the slots to switch first in front, and the number of these per factor [L].
  """
  even = (jnp.arange(values[0].shape[1]) + step)[None] % 2 == 0

  def of_factor(values, timer, age, own):
    below = values < choice.below * jnp.nanmedian(values, 1, keepdims=True)  # NaN is not below
    found, slots = jax.lax.top_k(
      -jnp.where(below & own & (age >= choice.min_age) & (timer == 0), values, jnp.inf), window
    )
    return slots, jnp.sum(jnp.isfinite(found), 1, dtype=jnp.int32)

  slots_a, count_a = of_factor(values[0], clock.timer_a, clock.age_a, even)
  slots_b, count_b = of_factor(values[1], clock.timer_b, clock.age_b, ~even)
  return (slots_a, slots_b), jnp.minimum(count_a, count_b)


def switch_layers(layers: Layer, cursor, count, window: int, scale, slots=None, indices=None, draw=None):
  """Algorithm 1 for `count` [L] vectors per factor of L layers, starting at `cursor` [L].

  Args:
    window: K, an upper bound of `count`.
    slots: the vectors to switch, a pair ([L, K] for A, [L, K] for B); None: in sequential order.
    indices: the spares to load, likewise; None: in sequential order.
    draw: if candidates are fresh, from the numbers of the loads [L, K] to the vectors ([L, K, in], [L, K, out]).
  Returns:
    The layers, and the squared norm of the change of all kernels, [].
  """
  rank, spares = layers.rank_and_spares()
  loads = cursor[:, None] + jnp.arange(window)[None]  # [L, K], the numbers of the next loads
  active = jnp.arange(window)[None] < count[:, None]
  slots_a, slots_b = slots or sequential_slots(cursor, window, rank)
  indices_a, indices_b = indices or (loads % spares, loads % spares)

  def switch_once(_, carry):
    fresh = draw(loads) if draw else ()
    layers, left, right = swap_factors(carry[0], slots_a, slots_b, indices_a, indices_b, active, *fresh)
    right = scale * right
    return layers._replace(**add_to_kernels(layers.frozen, left, right, count > 0)), norm_squared(left, right)

  zero = jnp.zeros((), jnp.promote_types(layers.lora_a.dtype, jnp.float32))
  # A loop with 0 or 1 iterations: XLA copies arrays that pass through a conditional.
  return jax.lax.fori_loop(0, jnp.any(count > 0).astype(jnp.int32), switch_once, (layers, zero))


def norm_squared(left, right):
  """Σ ‖left[l]ᵀ·right[l]‖² over layers, for left [L, K, in] and right [L, K, out], without forming the products."""
  gram = lambda rows: jnp.einsum("lkd,ljd->lkj", rows, rows)
  return jnp.sum(gram(left) * gram(right))


def marked(slots, active, rank: int):
  """[L, r] bool: the slots [L, K] of a factor that are active [L, K]."""
  return jnp.any((slots[:, :, None] == jnp.arange(rank)[None, None]) & active[:, :, None], 1)


def freeze(timer, hit, freeze_steps: int, skip):
  """Algorithm 2, lines 8 and 13: start the timers of the vectors marked by `hit`.

  Returns:
    A mask of the vectors that are frozen in this step, [L, r] bool, and the timers after it, [L, r] int32.
  """
  running = jnp.where(hit, freeze_steps, timer)
  return running > 0, jnp.where(skip, timer, jnp.maximum(running - 1, 0))


def available(clock: Clock):
  """[L]: the number of vectors per factor that can be switched now without switching a frozen one.

  The cursors of A and B are r//2 slots apart, and the frozen slots of a factor are right behind the cursor of the other
  factor. Each of them reduces by one the number of slots that the factor's own cursor can advance.
  """
  half = clock.timer_a.shape[1] // 2
  frozen = [jnp.sum(timer > 0, 1, dtype=jnp.int32) for timer in (clock.timer_a, clock.timer_b)]
  return half - jnp.maximum(*frozen)


def switch_stack(layers: Layer, clock: Clock, uniforms, choose, indices, draw, schedule, scale, step, skip):
  """Algorithm 2, lines 4 to 14, for L stacked layers; `uniforms` [L], `indices` and `draw` as in `switch_layers`.

  One draw gives the count of both factors, as in the authors' code.

  Args:
    choose: (clock, window, step) -> as `chosen_slots`; None: slots in sequential order.
    schedule: a `SwitchSchedule`.

  Returns:
    layers, clock, {name of a factor: (reset, freeze)} with masks [L, r], count [L], and the squared norm of the
    change of the kernels.
  """
  rank, spares = layers.rank_and_spares()
  window = schedule.window(rank, spares)
  drawn = switch_count(uniforms, rank * schedule.rate(step) / schedule.interval)  # lines 5 and 10
  if choose:
    slots, most = choose(clock, window, step)
  else:
    slots, most = sequential_slots(clock.cursor, window, rank), available(clock)
  count = jnp.where(skip, 0, jnp.clip(drawn, 0, jnp.minimum(window, most)))
  layers, moved = switch_layers(layers, clock.cursor, count, window, scale, slots, indices, draw)  # lines 6, 7, 11, 12
  active = jnp.arange(window)[None] < count[:, None]
  # Algorithm 1, line 3: a switch of a_k resets b_k, and a switch of b_k resets a_k.
  reset_b, reset_a = (marked(of_factor, active, rank) for of_factor in slots)
  frozen_a, timer_a = freeze(clock.timer_a, reset_a, schedule.freeze_steps, skip)  # line 8
  frozen_b, timer_b = freeze(clock.timer_b, reset_b, schedule.freeze_steps, skip)  # line 13
  clock = clock._replace(cursor=clock.cursor + count, timer_a=timer_a, timer_b=timer_b)
  if choose:
    older = lambda age, loaded: jnp.where(loaded, 0, age) + ~jnp.asarray(skip)
    clock = clock._replace(age_a=older(clock.age_a, reset_b), age_b=older(clock.age_b, reset_a))
  return layers, clock, {LORA_A: (reset_a, frozen_a), LORA_B: (reset_b, frozen_b)}, count, moved


# The collection of each array; arrays that are not listed are in `candidates`.
COLLECTION = dict.fromkeys(ADAPTER, "params") | dict.fromkeys(STORAGE, "frozen")


def switch(
  params,
  frozen,
  candidates=None,
  *,
  schedule: SwitchSchedule,
  scale,
  step,
  uniforms,
  spare_indices=None,
  fresh: FreshVectors | None = None,
  choice: Choice | None = None,
  skip=False,
) -> Switched:
  """Algorithm 2 for one step and all layers that can switch; `kernel + scale·AᵀB` does not change.

  Where a kernel in 16 or 8 bits has a residual, this holds for their sum. The layer computes with the kernel alone, so
  its function changes by at most the rounding of the kernel to its dtype, regardless of the number of switches.

  Args:
    params, frozen, candidates: the collections of `layers.SwitchLoRADense`, nested under equal paths. `candidates` is
      empty or None if no layer can switch.
    schedule: switching rate and freeze time.
    scale: s = α/r.
    step: t, from 0.
    uniforms: {path: [...] in [0, 1)} from `draw_uniforms`, or one number for all layers.
    spare_indices: from `draw_spare_indices`; None: sequential order, as in the authors' code.
    fresh: how layers without spares draw the vectors that they load.
    choice: which vectors to switch; None: in sequential order. The layers must store ages, see `SwitchLoRADense`.
    skip: [] bool; if true, nothing changes, including timers and cursors.
  Returns:
    The new collections, the masks for the optimizer and the metrics, see `Switched`.
  Raises:
    ValueError: a layer has no spares, and `fresh` is None; or it has no ages, and `choice` is given.
  """
  candidates = candidates or {}
  flat = {"params": flatten_dict(params), "frozen": flatten_dict(frozen), "candidates": flatten_dict(candidates)}
  reset, frozen_now = dict.fromkeys(flat["params"], False), dict.fromkeys(flat["params"], False)
  total, moved, number = jnp.zeros((), jnp.int32), 0.0, 0
  for path in switchable(candidates):
    lead = stack_shape(candidates, path)
    numbers = number + jnp.arange(math.prod(lead))
    number += math.prod(lead)
    find = lambda name, path=path: flat[COLLECTION.get(name, "candidates")].get((*path, name))
    stack = lambda x, lead=lead: None if x is None else x.reshape(-1, *x.shape[len(lead) :])
    layers, clock = (kind(*(stack(find(name)) for name in kind._fields)) for kind in (Layer, Clock))
    if schedule.window(*layers.rank_and_spares()) == 0:
      continue
    draws = uniforms[path] if isinstance(uniforms, dict) else jnp.full(lead, uniforms)
    indices = spare_indices and tuple(rows.reshape(-1, rows.shape[-1]) for rows in spare_indices[path])
    draw = None
    if layers.spare_a is None:
      if fresh is None:
        raise ValueError(f"{no_spares(path)}; pass fresh=FreshVectors(key)")
      rank, sizes, dtype = layers.lora_a.shape[1], layers.kernel.shape[1:], layers.lora_a.dtype
      draw = partial(fresh.draw, numbers, rank=rank, sizes=sizes, dtype=dtype)
    choose = None
    if choice:
      if clock.age_a is None:
        raise ValueError(
          f"{'/'.join(path) or 'the layer'} stores no ages, which choice needs; create it with ages=True"
        )
      values = tuple(stack(of_factor) for of_factor in choice.values[path])
      choose = partial(chosen_slots, values=values, choice=choice)
    layers, clock, masks, count, norm2 = switch_stack(
      layers, clock, draws.reshape(-1), choose, indices, draw, schedule, scale, step, skip
    )
    for name, value in (layers._asdict() | clock._asdict()).items():
      if value is not None:
        flat[COLLECTION.get(name, "candidates")][*path, name] = value.reshape(*lead, *value.shape[1:])
    for name, both in masks.items():
      reset[*path, name], frozen_now[*path, name] = (mask.reshape(*lead, -1, 1) for mask in both)
    total, moved = total + jnp.sum(count, dtype=jnp.int32), moved + norm2
  return Switched(*map(unflatten_dict, (*flat.values(), reset, frozen_now)), total, jnp.sqrt(moved))


def expected_loads(schedule: SwitchSchedule, rank: int, first_step: int = 0) -> float:
  """The expected number of vectors that a run loads per factor of a layer, from `first_step` on.

  Divided by the number of spares, it is the number of cycles through them. If that is far below 1, most candidates are
  never used and switching can have little effect.

  Args:
    rank: r, LoRA vectors per factor.
  """
  first, last = max(first_step, schedule.start), schedule.total_steps
  if schedule.interval == 0 or first >= last:
    return 0.0
  if schedule.curve:  # at 10,000 steps or fewer
    points = np.linspace(first, last - 1, min(last - first, 10_000))
    total = (last - first) * float(jnp.mean(jax.vmap(schedule.rate)(points)))
  else:  # a geometric sum
    ratio = schedule.decay_to ** (1 / (schedule.decay_point * last))
    powers = first - schedule.start + 1, last - schedule.start + 1
    total = last - first if ratio == 1 else (ratio ** powers[0] - ratio ** powers[1]) / (1 - ratio)
  return total * rank / schedule.interval
