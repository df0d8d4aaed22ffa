"""Invariants of switching, over shapes, ranks, intervals, freeze times and random draws."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import same_bits

from switchlora_jax.lowrank.kernel_storage import load_kernel, store_new, without_residual
from switchlora_jax.lowrank.layers import SwitchLoRADense
from switchlora_jax.lowrank.spares import FreshVectors, coverage, draw_spare_indices
from switchlora_jax.lowrank.switching import Choice, SwitchSchedule, switch

SCALE = 0.5
STEPS = 12
# (layers, in, out, rank): fewer spares than slots, odd ranks, one spare, two slots, dozens of switches per step.
SHAPES = [(2, 9, 6, 4), (1, 7, 9, 5), (3, 5, 4, 3), (2, 12, 10, 8), (1, 6, 20, 2), (2, 54, 56, 36)]
SCHEDULES = [(1, 0), (2, 1), (12, 5)]  # interval, freeze_steps
anything = (st.sampled_from(SHAPES), st.sampled_from(SCHEDULES), st.integers(0, 2**32 - 1))
many = settings(max_examples=20, deadline=None)
few = settings(max_examples=6, deadline=None)


def draw_layers(shape, dtype, seed):
  """The collections of L stacked layers: distinct vectors, random cursors, timers at 0."""
  layers, n, m, rank = shape
  spares, rng = min(n, m) - rank, np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal((layers, *shape)).astype(dtype)
  timer = np.zeros((layers, rank), np.int32)
  return {
    "params": {"lora_a": normal(rank, n), "lora_b": normal(rank, m)},
    "frozen": {"kernel": normal(n, m)},
    "candidates": {
      "spare_a": normal(spares, n), "spare_b": normal(spares, m),
      "timer_a": timer, "timer_b": timer, "cursor": rng.integers(0, 100, layers, np.int32),
    },
  }  # fmt: skip


def indices_at(step, candidates, schedule):
  """The spares that the random order draws at a step."""
  return draw_spare_indices(jax.random.fold_in(jax.random.key(1), step), candidates, schedule)


class Traced(NamedTuple):
  """A `SwitchSchedule` with traced times: schedules with equal windows share a compiled forward_weight."""

  schedule: SwitchSchedule
  size: int

  def window(self, rank, spares):
    return self.size

  def __getattr__(self, name):
    return getattr(self.schedule, name)


FRESH = FreshVectors(jax.random.key(2))


@partial(jax.jit, static_argnames=("window", "random"))
def switched(layers, uniforms, step, skip, times, *, window, random):
  """(layers, uniforms [L], step, skip, (interval, freeze_steps)) -> Switched. The rate is almost constant."""
  schedule = Traced(SwitchSchedule(*times, total_steps=10_000), window)
  indices = indices_at(step, layers["candidates"], schedule) if random else None
  draws = dict(uniforms={(): uniforms}, spare_indices=indices, fresh=FRESH)
  return switch(**layers, schedule=schedule, scale=SCALE, step=step, skip=skip, **draws)


def switcher(interval, freeze_steps, random=False):
  """`switched` for one schedule."""

  def run(layers, uniforms, step, skip):
    rank, sizes = layers["params"]["lora_a"].shape[-2], layers["frozen"]["kernel"].shape[-2:]
    window = SwitchSchedule(interval, freeze_steps).window(rank, min(sizes) - rank)
    return switched(layers, uniforms, step, skip, (interval, freeze_steps), window=window, random=random)

  return run


def take(layers, index):
  """One layer of the stack."""
  return jax.tree.map(lambda x: x[index], layers)


def collections(out):
  return {"params": out.params, "frozen": out.frozen, "candidates": out.candidates}


store, load = jax.jit(store_new, static_argnums=(1, 2)), jax.jit(load_kernel)


def history(shape, times, seed, dtype=np.float32, random=False, stored=None, bfloat16_spares=False, change=None):
  """(before, after) of each of `STEPS` steps, on the host. The first draws and a third of the others are 0.

  `stored` is the dtype of kernels with a residual; `bfloat16_spares` stores the spares in bfloat16. `change` is called
  with the first collections, and may change them.
  """
  layers, rng = draw_layers(shape, dtype, seed), np.random.default_rng(seed)
  if change:
    change(layers)
  if stored:
    layers["frozen"] = jax.tree.map(np.asarray, store(layers["frozen"]["kernel"], stored, True))
  if bfloat16_spares:
    layers["candidates"] |= {name: layers["candidates"][name].astype(jnp.bfloat16) for name in ("spare_a", "spare_b")}
  steps = []
  for t in range(STEPS):
    uniforms = np.where((rng.random(shape[0]) < 1 / 3) | (t == 0), 0, rng.random(shape[0])).astype(dtype)
    out = jax.tree.map(np.asarray, switcher(*times, random)(layers, uniforms, t, False))
    steps.append((layers, out))
    layers = collections(out)
  return steps


def switched_rows(before, after, factor):
  """[L, r] bool: the rows of a factor whose vector has changed."""
  return np.any(before["params"][f"lora_{factor}"] != after.params[f"lora_{factor}"], axis=-1)


def counts(before, after):
  return after.candidates["cursor"] - before["candidates"]["cursor"]


def merged_weight(frozen, params):
  """The merged weight W + s·BA in float64."""
  kernel = load(frozen) if len(frozen) > 1 else frozen["kernel"]
  kernel, a, b = (np.asarray(x, np.float64) for x in (kernel, params["lora_a"], params["lora_b"]))
  return kernel + SCALE * np.einsum("lrn,lrm->lnm", a, b)


def drift(before, after):
  """The largest change of an element of `W + s·BA` in a step."""
  return np.abs(merged_weight(after.frozen, after.params) - merged_weight(before["frozen"], before["params"])).max()


def magnitudes(layers):
  """Largest magnitudes of an element of W, and of a product of elements of A and B, spares included."""
  both = lambda factor: max(
    np.abs(layers["params"][f"lora_{factor}"]).max(), np.abs(layers["candidates"][f"spare_{factor}"]).max()
  )
  return np.abs(layers["frozen"]["kernel"]).max(), both("a") * both("b")


@many
@given(*anything)
def test_the_merged_weight_does_not_change_in_float64(shape, times, seed):
  with jax.enable_x64(True):
    for before, after in history(shape, times, seed, np.float64):
      kernel, product = magnitudes(before)
      assert drift(before, after) <= 1e-12 * (kernel + SCALE * shape[3] * product)


@few
@given(*anything)
def test_bfloat16_spares_round_evicted_vectors_and_keep_the_merged_weight(shape, times, seed):
  """An evicted vector is rounded once, by 2⁻⁹ relative. The kernel is corrected with the rounded vector."""
  with jax.enable_x64(True):
    for before, after in history(shape, times, seed, np.float64, bfloat16_spares=True):
      kernel, product = magnitudes(before)
      assert drift(before, after) <= 1e-6 * (kernel + SCALE * shape[3] * product)
      for factor in "ab":
        evicted = before["params"][f"lora_{factor}"][switched_rows(before, after, factor)]
        spares = after.candidates[f"spare_{factor}"]
        assert spares.dtype == jnp.bfloat16
        assert {tuple(v) for v in evicted.astype(jnp.bfloat16)} <= {tuple(v) for layer in spares for v in layer}


@many
@given(*anything)
def test_the_merged_weight_does_not_change_in_float32(shape, times, seed):
  """Error bound of one step, with u = 2⁻²⁴ and the window K.

  Each of the 2K terms s·(old − new)·other is rounded at most 2K + 2 times: in a difference, two products and a sum.
  At least two terms are added to W at a time, so that W is rounded at most K times.
  """
  window = SwitchSchedule(*times).window(shape[3], min(shape[1:3]) - shape[3])
  for before, after in history(shape, times, seed):
    kernel, product = magnitudes(before)
    terms = 2 * window * SCALE * 2 * product
    assert drift(before, after) <= 2**-24 * ((2 * window + 2) * terms + window * (kernel + terms))


# Half a unit in the last place of the stored weight, and of the forward weight, relative to the largest element.
ROUNDING = {"bfloat16": (2**-16, 2**-8), "int8": (1 / 65_024, 1 / 254)}


@pytest.mark.parametrize("stored", ROUNDING)
@few
@given(*anything)
def test_with_a_residual_the_merged_weight_is_kept_to_16_bits_and_the_forward_weight_to_8(stored, shape, times, seed):
  """A switch writes W once per 32 outer products. The forward pass uses the kernel without the residual.

  A step may change the forward weight by the rounding of W before and after. This error does not grow over the steps.
  """
  window = SwitchSchedule(*times).window(shape[3], min(shape[1:3]) - shape[3])
  steps, writes = history(shape, times, seed, stored=stored), -(-2 * window // 32)
  fine, coarse = ROUNDING[stored]
  total = 0.0
  for before, after in steps:
    kernel, product = np.abs(load(before["frozen"])).max(), magnitudes(before)[1]
    largest = kernel + 2 * window * SCALE * 2 * product
    near = (fine * writes + 2**-24 * (6 * window + 2)) * largest
    assert drift(before, after) <= near
    total += near
    forward_weight = lambda layers: merged_weight(without_residual(layers["frozen"]), layers["params"])
    rounding = 2 * coarse * largest
    assert np.abs(forward_weight(collections(after)) - forward_weight(before)).max() <= near + rounding
    assert np.abs(forward_weight(collections(after)) - forward_weight(steps[0][0])).max() <= total + rounding
    assert (after.frozen["kernel"].dtype, after.frozen["kernel_tail"].dtype) == (jnp.dtype(stored), jnp.int8)
  assert any(not same_bits(before["frozen"], after.frozen) for before, after in steps)


def test_a_switch_changes_both_the_kernel_and_the_adapter_product():
  """The tests above find only their sum unchanged."""
  before, after = history(SHAPES[0], SCHEDULES[0], 0)[0]
  no_kernel = {"kernel": np.zeros_like(before["frozen"]["kernel"])}
  assert np.abs(merged_weight(no_kernel, after.params) - merged_weight(no_kernel, before["params"])).max() > 0.1
  assert np.abs(after.frozen["kernel"] - before["frozen"]["kernel"]).max() > 0.1


def all_vectors(layers, factor):
  """Per layer, all vectors of a factor (slots and spares) as sorted bytes."""
  stacks = zip(layers["params"][f"lora_{factor}"], layers["candidates"][f"spare_{factor}"], strict=True)
  return [sorted(row.tobytes() for row in np.concatenate(stack)) for stack in stacks]


@many
@given(*anything)
def test_vectors_are_only_permuted(shape, times, seed):
  steps = history(shape, times, seed)
  first = steps[0][0]
  for factor in "ab":
    assert len(set(all_vectors(first, factor)[0])) == min(shape[1:3])
    for _, after in steps:
      assert all_vectors(collections(after), factor) == all_vectors(first, factor)
    assert any(np.any(switched_rows(*step, factor)) for step in steps), "some vector moved"


@few
@given(st.sampled_from([(1, 0), (12, 5)]), st.integers(0, 2**32 - 1))
def test_random_order_keeps_the_merged_weight_and_all_vectors(times, seed):
  shape = SHAPES[5]  # more spares than one step can switch
  with jax.enable_x64(True):
    steps = history(shape, times, seed, np.float64, random=True)
  for before, after in steps:
    kernel, product = magnitudes(before)
    assert drift(before, after) <= 1e-12 * (kernel + SCALE * shape[3] * product)
    for factor in "ab":
      assert all_vectors(collections(after), factor) == all_vectors(steps[0][0], factor)
      assert not np.any(switched_rows(before, after, factor) & (before["candidates"][f"timer_{factor}"] > 0))
      np.testing.assert_array_equal(switched_rows(before, after, factor).sum(-1), counts(before, after))
  assert sum(int(after.count) for _, after in steps) > 0


def test_random_order_loads_the_drawn_spares():
  """Each evicted vector is stored where its replacement was. Counts and slots are those of the sequential order."""
  shape, times = SHAPES[5], (1, 0)
  rank, schedule, differ = shape[3], SwitchSchedule(*times, 10_000), False
  in_order = history(shape, times, 5)
  for t, (before, after) in enumerate(history(shape, times, 5, random=True)):
    np.testing.assert_array_equal(counts(before, after), counts(*in_order[t]))
    for factor, offset, rows in zip(
      "ab", (0, rank // 2), indices_at(t, before["candidates"], schedule)[()], strict=True
    ):
      differ = differ or np.any(after.params[f"lora_{factor}"] != in_order[t][1].params[f"lora_{factor}"])
      for layer, count in enumerate(counts(before, after)):
        slots = (before["candidates"]["cursor"][layer] + offset + np.arange(count)) % rank
        taken = np.asarray(rows)[layer, :count]
        old, new = (x[f"lora_{factor}"][layer][slots] for x in (before["params"], after.params))
        np.testing.assert_array_equal(new, before["candidates"][f"spare_{factor}"][layer][taken])
        np.testing.assert_array_equal(after.candidates[f"spare_{factor}"][layer][taken], old)
  assert differ


def without_spares(layers):
  del layers["candidates"]["spare_a"], layers["candidates"]["spare_b"]


def vectors_loaded(shape, before, count, dtype=np.float64):
  """The fresh vectors that a step loads, {factor: [L, K, d]}."""
  loads = before["candidates"]["cursor"][:, None] + np.arange(max(count))
  drawn = FRESH.draw(jnp.arange(shape[0]), loads, shape[3], shape[1:3], dtype)
  return dict(zip("ab", map(np.asarray, drawn), strict=True))


@few
@given(*anything)
def test_fresh_candidates_keep_the_merged_weight_and_are_new_at_every_load(shape, times, seed):
  """Counts, slots and timers are those of stored candidates."""
  with jax.enable_x64(True):
    stored, steps = (history(shape, times, seed, np.float64, change=change) for change in (None, without_spares))
    for (before, after), (_, other) in zip(steps, stored, strict=True):
      assert after.candidates.keys() == {"timer_a", "timer_b", "cursor"}
      assert same_bits(after.candidates, {name: other.candidates[name] for name in after.candidates})
      assert same_bits((after.reset, after.freeze), (other.reset, other.freeze))
      products = [x["params"]["lora_a"] for x in (before, collections(after))]
      largest = max(np.abs(x).max() for x in (*products, before["params"]["lora_b"], after.params["lora_b"]))
      assert drift(before, after) <= 1e-12 * (np.abs(before["frozen"]["kernel"]).max() + SCALE * shape[3] * largest**2)
      count = counts(before, after)
      new = vectors_loaded(shape, before, count)
      for factor, offset in (("a", 0), ("b", shape[3] // 2)):
        for layer in range(shape[0]):
          slots = (before["candidates"]["cursor"][layer] + offset + np.arange(count[layer])) % shape[3]
          expected = before["params"][f"lora_{factor}"][layer].copy()
          expected[slots] = new[factor][layer, : count[layer]]
          np.testing.assert_array_equal(after.params[f"lora_{factor}"][layer], expected)
  assert sum(int(after.count) for _, after in steps) > 0


def test_fresh_candidates_are_bitwise_stored_ones_until_these_come_back():
  """If the spares are the vectors that would be drawn, the first c - r loads are the same."""
  shape, times = SHAPES[5], (12, 5)
  spares = min(shape[1:3]) - shape[3]

  def from_the_start(layers):
    layers["candidates"]["cursor"][:] = 0

  def store(layers):
    from_the_start(layers)
    for factor, rows in vectors_loaded(shape, layers, [spares], np.float32).items():
      layers["candidates"][f"spare_{factor}"] = rows

  def draw(layers):
    from_the_start(layers)
    without_spares(layers)

  compared = 0
  for (_, stored), (_, fresh) in zip(
    *(history(shape, times, 3, change=change) for change in (store, draw)), strict=True
  ):
    again = np.any(stored.candidates["cursor"] > spares)
    assert same_bits((stored.params, stored.frozen, stored.moved), (fresh.params, fresh.frozen, fresh.moved)) != again
    compared += not again
  assert 3 < compared < STEPS


def test_layers_under_different_paths_load_different_fresh_vectors():
  layers = draw_layers(SHAPES[0], np.float32, 0)
  without_spares(layers)
  both = {collection: {"q": arrays, "v": arrays} for collection, arrays in layers.items()}
  options = dict(schedule=SwitchSchedule(interval=2), scale=SCALE, step=0, uniforms=0.0, fresh=FRESH)
  after = jax.jit(partial(switch, **options))(**both).params
  new = {name: after[name]["lora_a"][after[name]["lora_a"] != layers["params"]["lora_a"]] for name in "qv"}
  assert new["q"].size == new["v"].size > 0 and not np.any(new["q"] == new["v"])


def test_layers_without_spares_need_fresh_vectors():
  layers = draw_layers(SHAPES[0], np.float32, 0)
  without_spares(layers)
  with pytest.raises(ValueError, match=r"^the layer stores no spares; pass fresh=FreshVectors\(key\)$"):
    switch(**layers, schedule=SwitchSchedule(interval=2), scale=SCALE, step=0, uniforms=0.0)


@few
@given(*anything)
def test_moved_is_the_norm_of_the_change_of_the_kernels(shape, times, seed):
  """The tolerance allows for cancellation in float64 sums. Without a switch the norm is exactly 0."""
  with jax.enable_x64(True):
    steps = history(shape, times, seed, np.float64)
  for before, after in steps:
    expected = np.linalg.norm(after.frozen["kernel"] - before["frozen"]["kernel"])
    np.testing.assert_allclose(after.moved, expected, rtol=1e-7)
    assert (after.moved == 0) == (after.count == 0)


covered = jax.jit(coverage)


@few
@given(*anything)
def test_coverage_is_the_share_of_vectors_that_have_been_in_a_slot(shape, times, seed):
  layers, rng = draw_layers(shape, np.float32, seed), np.random.default_rng(seed)
  layers["candidates"]["cursor"][:] = 0
  seen = {(factor, index): set() for factor in "ab" for index in range(shape[0])}
  for t in range(STEPS):
    for (factor, index), rows in seen.items():
      rows |= {row.tobytes() for row in layers["params"][f"lora_{factor}"][index]}
    share = covered(layers["candidates"])
    for factor in "ab":
      shares = [len(seen[factor, index]) / min(shape[1:3]) for index in range(shape[0])]
      np.testing.assert_allclose(share, np.mean(shares), rtol=1e-6)
    out = switcher(*times)(layers, rng.random(shape[0], np.float32), t, bool(rng.random() < 0.2))
    layers = jax.tree.map(np.asarray, collections(out))


def test_coverage_is_complete_after_a_cycle():
  layers = draw_layers((2, 9, 6, 4), np.float32, 0)
  layers["candidates"]["cursor"][:] = 0
  shares = []
  for t in range(3):
    shares.append(float(covered(layers["candidates"])))
    layers = collections(switcher(1, 0)(layers, np.zeros(2, np.float32), t, False))
  assert shares == [np.float32(4 / 6), 1, 1], "each step switches two vectors; there are two spares"


@many
@given(*anything)
def test_frozen_vectors_are_not_switched(shape, times, seed):
  for before, after in history(shape, times, seed):
    for factor in "ab":
      assert not np.any(switched_rows(before, after, factor) & (before["candidates"][f"timer_{factor}"] > 0))


@many
@given(*anything)
def test_slots_of_both_factors_are_disjoint_and_match_the_counts(shape, times, seed):
  _, n, m, rank = shape
  most = min(min(n, m) - rank, rank // 2)
  for before, after in history(shape, times, seed):
    rows_a, rows_b = (switched_rows(before, after, factor) for factor in "ab")
    assert not np.any(rows_a & rows_b)
    np.testing.assert_array_equal(rows_a.sum(-1), counts(before, after))
    np.testing.assert_array_equal(rows_b.sum(-1), counts(before, after))
    assert counts(before, after).min() >= 0 and counts(before, after).max() <= most
    assert after.count == counts(before, after).sum()


@many
@given(*anything)
def test_the_counterparts_are_reset_and_stay_frozen_for_the_freeze_steps(shape, times, seed):
  freeze_steps = times[1]
  since = {factor: np.full((shape[0], shape[3]), 10**6) for factor in "ab"}  # steps since the counterpart was switched
  for before, after in history(shape, times, seed):
    for factor, other in ("ab", "ba"):
      hit = switched_rows(before, after, other)
      since[factor] = np.where(hit, 0, since[factor] + 1)
      np.testing.assert_array_equal(after.reset[f"lora_{factor}"][..., 0], hit)
      np.testing.assert_array_equal(after.freeze[f"lora_{factor}"][..., 0], since[factor] < freeze_steps)


def test_a_step_can_switch_the_largest_possible_number_of_vectors():
  for shape in SHAPES:
    most = min(min(shape[1:3]) - shape[3], shape[3] // 2)
    assert max(counts(*step).max() for step in history(shape, (1, 0), 1)) == most


def test_frozen_vectors_limit_the_number_of_switches():
  """Rank 2, and every draw asks for one switch. While one vector of a factor is frozen, the other is not switched."""
  layers, done = draw_layers((1, 6, 20, 2), np.float32, 0), []
  for t in range(6):
    out = switcher(4, 2)(layers, np.zeros(1, np.float32), t, False)
    layers, _ = collections(out), done.append(int(out.count))
  assert done == [1, 0, 1, 0, 1, 0]


@many
@given(*anything)
def test_skip_changes_nothing(shape, times, seed):
  for _, after in history(shape, times, seed)[:3]:
    layers = collections(after)
    out = switcher(*times)(layers, np.zeros(shape[0], np.float32), 0, True)
    assert same_bits(collections(out), layers)
    assert out.count == out.moved == 0 and not any(np.any(mask) for mask in jax.tree.leaves(out.reset))


@many
@given(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1))
def test_a_step_without_a_switch_changes_only_the_timers(shape, seed):
  times = (40, 5)  # less than one switch per step is expected; the largest draw rounds it down to 0
  before = collections(history(shape, times, seed)[0][1])
  out = switcher(*times)(before, np.full(shape[0], np.float32(1 - 2**-24)), 1, False)
  assert out.count == 0
  for factor in "ab":
    timer = before["candidates"].pop(f"timer_{factor}")
    assert np.any(timer == 4)
    np.testing.assert_array_equal(out.candidates.pop(f"timer_{factor}"), np.maximum(timer - 1, 0))
  assert same_bits(collections(out), before)


def test_a_step_without_a_switch_runs_no_loop_iteration(monkeypatch):
  """All work on vectors and kernels is in loops over the layers that switch."""
  iterations = []

  def fori_loop(lower, upper, body, value):
    iterations.append(int(upper))
    for index in range(lower, int(upper)):
      value = body(index, value)
    return value

  monkeypatch.setattr(jax.lax, "fori_loop", fori_loop)
  layers = jax.tree.map(jnp.asarray, draw_layers((3, 5, 4, 3), np.float32, 0))
  plan = dict(schedule=SwitchSchedule(12, 5), scale=SCALE, step=0)
  idle = switch(**layers, **plan, uniforms={(): jnp.array([0.9, 0.9, 0.9])})
  assert iterations == [0] and idle.count == 0
  active = switch(**layers, **plan, uniforms={(): jnp.array([0.9, 0.0, 0.0])})
  assert iterations == [0, 1, 2] and active.count == 2


@settings(max_examples=6, deadline=None)  # each shape is compiled twice
@given(*anything)
def test_stacked_layers_are_switched_like_single_layers(shape, times, seed):
  layers, uniforms = draw_layers(shape, np.float32, seed), np.random.default_rng(seed).random(shape[0], np.float32)
  together = jax.tree.map(np.asarray, switcher(*times)(layers, uniforms, 0, False))
  for index in range(shape[0]):
    alone = switcher(*times)(take(layers, index), uniforms[index], 0, False)
    assert same_bits(collections(alone), take(collections(together), index))
    assert same_bits((alone.reset, alone.freeze), take((together.reset, together.freeze), index))


def test_kinds_of_layers_are_switched_independently():
  wide, tall = draw_layers(SHAPES[0], np.float32, 0), draw_layers(SHAPES[3], np.float32, 1)
  tree = {name: {"blocks": {"tall": tall[name], "wide": wide[name]}} for name in wide}
  tree["params"]["head"] = {"kernel": np.ones((2, 2), np.float32)}
  draws = {("blocks", "tall"): np.float32([0, 0.9]), ("blocks", "wide"): np.float32([0.1, 0.8])}
  schedule = SwitchSchedule(2, 1, 10_000)
  run = jax.jit(lambda layers, draws: switch(**layers, schedule=schedule, scale=SCALE, step=0, uniforms=draws))
  out = run(tree, draws)
  for kind, layers in (("tall", tall), ("wide", wide)):
    alone = switcher(2, 1)(layers, draws["blocks", kind], 0, False)
    for name in collections(alone):
      assert same_bits(collections(out)[name]["blocks"][kind], collections(alone)[name])
  assert same_bits(out.params["head"], tree["params"]["head"])
  assert not out.reset["head"]["kernel"] and not out.freeze["head"]["kernel"]


@pytest.mark.parametrize("rank", [6, 7])
def test_a_layer_without_spares_is_never_switched(rank):
  variables = jax.jit(SwitchLoRADense(features=6, rank=rank).init)(jax.random.key(0), np.ones((1, 9), np.float32))
  variables["candidates"] = variables.get("candidates", {})
  out = switch(**variables, schedule=SwitchSchedule(1, 0), scale=SCALE, step=0, uniforms=0.0)
  assert out.count == 0 and same_bits(collections(out), variables)


def test_rank_1_is_never_switched():
  layers = draw_layers((2, 9, 6, 1), np.float32, 0)
  out = switch(**layers, schedule=SwitchSchedule(1, 0), scale=SCALE, step=0, uniforms=0.0)
  assert out.count == 0 and same_bits(collections(out), layers)


# --- slots that are chosen by values --------------------------------------------------------------------------------

MIN_AGE, BELOW = 3, 1.2


def choice_of(values):
  return Choice({(): values}, MIN_AGE, BELOW)


@partial(jax.jit, static_argnames=("times",))
def switched_by_values(layers, values, uniforms, step, skip, *, times):
  schedule = SwitchSchedule(*times, total_steps=10_000)
  options = dict(uniforms={(): uniforms}, choice=choice_of(values), skip=skip)
  return switch(**layers, schedule=schedule, scale=SCALE, step=step, **options)


def chosen_history(shape, times, seed):
  """(before, values of both factors, after) of each of `STEPS` steps with random values, a tenth of them unknown."""
  layers, rng = draw_layers(shape, np.float64, seed), np.random.default_rng(seed)
  age = np.full((shape[0], shape[3]), MIN_AGE, np.int32)
  layers["candidates"] |= {"age_a": age, "age_b": age}
  steps = []
  for t in range(STEPS):
    values = tuple(np.where(rng.random(age.shape) < 0.1, np.nan, rng.random(age.shape)) for _ in "ab")
    out = switched_by_values(layers, values, rng.random(shape[0]), t, False, times=times)
    out = jax.tree.map(np.asarray, out)
    steps.append((layers, values, out))
    layers = collections(out)
  return steps


def allowed(values, timers, ages, turn):
  """[L, r] bool: the vectors of a factor that may be switched, from the definition. `turn`: even slots, or odd ones."""
  may = np.zeros(values.shape, bool)
  for layer, slot in np.ndindex(values.shape):
    known = values[layer][~np.isnan(values[layer])]
    free = ages[layer, slot] >= MIN_AGE and timers[layer, slot] == 0 and slot % 2 == turn
    may[layer, slot] = free and len(known) > 0 and values[layer, slot] < BELOW * np.median(known)
  return may


@few
@given(*anything)
def test_chosen_vectors_keep_the_merged_weight_and_are_the_ones_allowed_with_the_smallest_values(shape, times, seed):
  with jax.enable_x64(True):
    steps, total = chosen_history(shape, times, seed), 0
  for step, (before, values, after) in enumerate(steps):
    kernel, product = magnitudes(before)
    assert drift(before, after) <= 1e-12 * (kernel + SCALE * shape[3] * product)
    clock, rows = before["candidates"], {factor: switched_rows(before, after, factor) for factor in "ab"}
    assert not np.any(rows["a"] & rows["b"])
    for factor, other, value in zip("ab", "ba", values, strict=True):
      hit, age = rows[factor], clock[f"age_{factor}"]
      np.testing.assert_array_equal(hit.sum(-1), counts(before, after))
      may = allowed(value, clock[f"timer_{factor}"], age, (step + (factor == "b")) % 2)
      assert not np.any(hit & ~may)
      for layer in range(shape[0]):
        left = value[layer][may[layer] & ~hit[layer]]
        assert np.all(value[layer][hit[layer]][:, None] <= left[None])
      np.testing.assert_array_equal(after.candidates[f"age_{factor}"], np.where(hit, 0, age) + 1)
      np.testing.assert_array_equal(after.reset[f"lora_{other}"][..., 0], hit)
    total += after.count
  assert total > 0


def test_a_choice_needs_ages():
  layers, values = draw_layers((2, 9, 6, 4), np.float32, 0), np.ones((2, 4), np.float32)
  with pytest.raises(ValueError, match=r"^the layer stores no ages, which choice needs; create it with ages=True$"):
    switch(**layers, schedule=SwitchSchedule(), scale=1, step=0, uniforms=0.0, choice=choice_of((values, values)))


def test_a_layer_without_noisy_vectors_does_not_switch_and_a_skipped_step_keeps_the_ages():
  layers = draw_layers((2, 9, 6, 4), np.float32, 0)
  age = np.full((2, 4), MIN_AGE, np.int32)
  layers["candidates"] |= {"age_a": age, "age_b": age}
  alike, mixed = np.ones(4), [1.0, 2.0, 0.5, 3.0]
  run = lambda rows, skip=False: switched_by_values(
    layers, (np.float32(rows),) * 2, np.zeros(2, np.float32), 0, skip, times=(1, 0)
  )
  found = run([np.nan * alike, mixed])
  assert counts(layers, found).tolist() == [0, 0], "slots 0 and 2 are below 1.2 times the median 1.5, and both are even"
  assert counts(layers, run([alike, [1.0, 0.9, 2.0, 3.0]])).tolist() == [2, 1], "all of the first layer are"
  young = {"age_a": age - 1, "age_b": age - 1}
  layers["candidates"] |= young
  assert run([alike, [1.0, 0.9, 2.0, 3.0]]).count == 0
  skipped = run([alike, [1.0, 0.9, 2.0, 3.0]], skip=True)
  assert same_bits(collections(skipped), layers)
