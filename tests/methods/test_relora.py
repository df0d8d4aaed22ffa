"""ReLoRA: the authors' recorded runs and schedules, and restarts in the real train step."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from small_model import host, same_bits

from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.kernel_storage import load_kernel, split_float32
from switchlora_jax.lowrank.layers import lora_vectors, merge, merged_dense
from switchlora_jax.lowrank.optimizer import VectorAdamState, scale_by_vector_adam
from switchlora_jax.methods import METHODS, relora
from switchlora_jax.methods.base import TrainState
from switchlora_jax.methods.relora import magnitude_mask, prune_moments
from switchlora_jax.methods.schedules import cosine_schedule
from switchlora_jax.parallel.sharding import replicated
from switchlora_jax.training.anomalies import initial_spike_state

pytestmark = pytest.mark.two_linear_layers

# --- compared with the authors' code: schedules -------------------------------------------------------------------


def schedule_of(**changes):
  """The learning rate at every step."""
  config = small_model.config("relora", **{"learning_rate": 1.0, "min_lr_ratio": 0.1, **changes})
  return rates(relora.jagged_cosine(config), config.steps + 1)


def rates(schedule, steps):
  """The learning rate at the first `steps` steps."""
  return np.array(jax.jit(jax.vmap(schedule))(np.arange(steps, dtype=np.int32)))


@pytest.mark.parametrize(("name", "restarts"), [("relora_cosine_restarts", True), ("relora_cosine_single", False)])
def test_the_schedule_is_the_recorded_one(name, restarts, golden, x64):
  arrays, meta = golden("schedulers")
  ref = meta[name]
  every = ref["cycle_length"] if restarts else ref["num_training_steps"] + 1
  ours = schedule_of(
    steps=ref["num_training_steps"], warmup_steps=ref["warmup_steps"], min_lr_ratio=ref["min_lr_ratio"],
    relora__restart_every=every, relora__restart_warmup_steps=ref.get("restart_warmup_steps", 0),
  )  # fmt: skip
  steps = np.arange(ref["num_training_steps"])  # their schedule starts another cycle after the last update
  np.testing.assert_allclose(ours[steps], arrays[name][steps], rtol=0, atol=1e-12)
  if restarts:
    assert not np.any(ours[::every]) and np.all(np.delete(ours, slice(None, None, every)) > 0)


@pytest.mark.parametrize(
  ("start", "restarts"), [(0, (10, 20, 30)), (9, (10, 20, 30)), (10, (20, 30)), (11, (20, 30)), (14, (20, 30))]
)
def test_after_a_warm_start_there_is_a_warm_up_and_restarts_are_at_later_multiples(start, restarts, x64):
  shape = dict(steps=40, warmup_steps=3, relora__restart_every=10, relora__restart_warmup_steps=5)
  expected = rates(cosine_schedule(1.0, 3, 40, final_ratio=0.1), 41)
  expected[start : start + 3] = expected[start + 3] * np.arange(3) / 3
  for t in restarts:
    expected[t : t + 5] = expected[t + 5] * np.arange(5) / 5
  ours = schedule_of(**shape, warm_start_steps=start)
  np.testing.assert_allclose(ours[start:40], expected[start:40], rtol=0, atol=1e-12)


# --- compared with the authors' code: an MLP of two adapted layers ------------------------------------------------

LAYERS = ("0", "1")


def ours(ref, row):
  """(params, frozen, (mu, nu) of the adapters) of a recorded state; each layer is a stack of one."""
  stack = lambda key, orient=np.asarray: orient(ref[key][row])[None]
  adapters = lambda kind: {
    n: {"lora_a": stack(f"{kind}A{n}"), "lora_b": stack(f"{kind}B{n}", np.transpose)} for n in LAYERS
  }
  params = adapters("")
  params["1"]["bias"] = ref["bias1"][row]
  return params, {n: {"kernel": stack(f"W{n}", np.transpose)} for n in LAYERS}, (adapters("m"), adapters("v"))


def loss_of(params, frozen, x, y, scale):
  for name in LAYERS:
    layer = params[name]
    x = merged_dense(x, {"kernel": frozen[name]["kernel"][0]}, layer["lora_a"][0], layer["lora_b"][0], scale)
    x = jnp.tanh(x) if name == "0" else x + layer["bias"][None]
  return jnp.mean((x - y) ** 2)


def part(arrays, group):
  return {key.removeprefix(f"{group}/"): value for key, value in arrays.items() if key.startswith(f"{group}/")}


def recorded_config(ref):
  """The config of the recorded runs."""
  return small_model.config(
    "relora", rank=ref["rank"], learning_rate=ref["lr"], min_lr_ratio=ref["min_lr"], warmup_steps=ref["warmup"],
    steps=ref["total"], relora__alpha=float(ref["alpha"]), relora__restart_every=ref["every"],
    relora__restart_warmup_steps=ref["restart_warmup"],
  )  # fmt: skip


def train_recorded(ref, merges, method):
  """Repeats the 30 recorded updates, with the recorded A at each merge; returns all states and losses."""
  params, frozen, _ = ours(ref, 0)
  opt_state, states, losses = jax.jit(method.optimizer.init)(params), [], []
  update, learning_rates = jax.jit(method.optimizer.update), rates(method.schedule, 30)
  loss_and_grads = jax.jit(jax.value_and_grad(partial(loss_of, scale=method.scale)))
  for t in range(31):
    if t in merges:
      new_a = {16: ref["newA0"][merges.index(t)], 24: ref["newA1"][merges.index(t)]}
      drawn = lambda number, shape, new_a=new_a: jnp.asarray(new_a[shape[1]])
      params, frozen = relora.merge_adapters(params, frozen, drawn, method.scale)
      opt_state = prune_moments(opt_state, lora_vectors(params), lambda number, mu: np.zeros(mu.shape, bool))
    states.append((params, frozen, opt_state))
    if t < 30:
      loss, grads = loss_and_grads(params, frozen, ref["X"][t], ref["Y"][t])
      directions, opt_state = update(grads, opt_state, params)
      step = lambda p, direction, rate=learning_rates[t]: np.asarray(p) - rate * np.asarray(direction)
      params = jax.tree.map(step, params, directions)
      losses.append(loss)
  return states, losses


def test_a_run_with_restarts_passes_through_the_recorded_states(golden, x64):
  """The authors' pruning keeps 0.1% of the moments at random; in this run it kept none."""
  arrays, meta = golden("relora")
  ref, near = part(arrays, "reset"), dict(rtol=0, atol=1e-12)
  method = METHODS["relora"].build(recorded_config(meta["restarts"]))
  np.testing.assert_allclose(rates(method.schedule, 30), ref["lr"], **near)
  states, losses = train_recorded(ref, meta["restarts"]["merges_after_update"], method)
  np.testing.assert_allclose(losses, ref["loss"], **near)
  for row, t in enumerate(meta["rows"]["reset"]):
    params, frozen, adam = states[t]
    expected_params, expected_frozen, moments = ours(ref, row)
    jax.tree.map(partial(np.testing.assert_allclose, **near), (params, frozen), (expected_params, expected_frozen))
    for tree, expected in zip((adam.mu, adam.nu), moments, strict=True):
      for name in LAYERS:
        for factor in ("lora_a", "lora_b"):
          np.testing.assert_allclose(tree[name][factor], expected[name][factor], **near)
    assert {int(count) for count in jax.tree.leaves(adam.count)} == {t}, "a merge does not reset the count"


def test_a_merge_is_the_recorded_one(golden, x64):
  """The update before a merge has learning rate 0, so A and B are merged as the previous update left them."""
  arrays, meta = golden("relora")
  ref, rows = part(arrays, "reset"), meta["rows"]["reset"]
  scale = meta["restarts"]["alpha"] / meta["restarts"]["rank"]
  for before, after in ((16, 17), (24, 25)):
    params, frozen, _ = ours(ref, rows.index(before))
    _, expected, _ = ours(ref, rows.index(after))
    _, merged = relora.merge_adapters(params, frozen, lambda number, shape: jnp.zeros(shape), scale)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-12), merged, expected)
    assert not np.allclose(frozen["0"]["kernel"], expected["0"]["kernel"], atol=1e-2)


@pytest.mark.parametrize("group", ["magnitude0.9", "magnitude0.8"])
def test_pruning_by_magnitude_is_the_recorded_one_tensor_by_tensor(group, golden, x64):
  """The authors prune m and v with separate masks. At 0.8 of 96 elements, one element equals the threshold."""
  arrays, meta = golden("relora")
  ref, inputs, ratio = part(arrays, group), part(arrays, "reset"), float(group.removeprefix("magnitude"))
  scale = meta["restarts"]["alpha"] / meta["restarts"]["rank"]
  gradients, update, lone_moments = (
    jax.jit(jax.grad(partial(loss_of, scale=scale))),
    jax.jit(scale_by_vector_adam().update),
    0,
  )
  for row, t in enumerate(meta["rows"]["magnitude"]):
    params, frozen, (mu, nu) = ours(ref, row)
    grads = gradients(params, frozen, inputs["X"][t], inputs["Y"][t])
    for tree in (params, grads):
      del tree["1"]["bias"]  # its moments were not recorded
    adam = VectorAdamState(jax.tree.map(lambda _, t=t: np.int32(t), params), mu, nu)
    _, adam = update(grads, adam)
    pruned = {"m": adam.mu, "v": adam.nu}
    for name in LAYERS:
      for factor, orient in (("lora_a", np.asarray), ("lora_b", np.transpose)):
        for kind, tree in pruned.items():
          x, expected = tree[name][factor][0], orient(ref[f"pruned/{kind}{factor[-1].upper()}{name}"][row])
          mask = np.asarray(magnitude_mask(x, ratio))
          np.testing.assert_array_equal(mask, expected != 0)
          np.testing.assert_allclose(np.where(mask, x, 0), expected, rtol=1e-10)
        m, v = (ref[f"pruned/{kind}{factor[-1].upper()}{name}"][row] for kind in "mv")
        lone_moments += np.sum((m != 0) & (v == 0))
  assert lone_moments > 0, "their masks keep some m without v; our single mask does not"


# --- pruning ------------------------------------------------------------------------------------------------------


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def updated_once(params):
  """The state of Adam after an update whose gradients are `params`."""
  tx = scale_by_vector_adam()
  return host(jax.jit(lambda params: tx.update(params, tx.init(params))[1])(params))


@lru_cache
def unpruned():
  """The parameters of two stacked adapters and a norm, and the state of Adam."""
  shape = (3, 40, 50)
  params = {"q": {"lora_a": draw(0, *shape), "lora_b": draw(1, *shape)}, "norm": {"scale": draw(2, 50)}}
  return params, updated_once(params)


def pruned_state(prune, ratio):
  """Adam states of two stacked adapters and a norm, before and after pruning."""
  config = small_model.config("relora", relora__prune=prune, relora__prune_ratio=ratio)
  params, before = unpruned()
  keep = partial(relora.survivors, jax.random.key(3), config.relora)
  return before, host(jax.jit(lambda state: prune_moments(state, lora_vectors(params), keep))(before))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("prune", relora.PRUNES)
def test_one_mask_prunes_the_configured_share_of_both_moments(prune, ratio):
  before, after = pruned_state(prune, ratio)
  for factor in ("lora_a", "lora_b"):
    mu, nu = (np.asarray(getattr(after, name)["q"][factor]) for name in ("mu", "nu"))
    np.testing.assert_array_equal(mu != 0, nu != 0)
    for name, left in (("mu", mu), ("nu", nu)):
      old = np.asarray(getattr(before, name)["q"][factor])
      np.testing.assert_array_equal(left[left != 0], old[left != 0])
    for layer in mu:
      share, size = np.mean(layer == 0), layer.size
      if prune == "magnitude":  # elements equal to the threshold are pruned
        assert ratio <= share < ratio + 1.5 / size
      else:  # within six standard deviations
        assert abs(share - ratio) <= 6 * (ratio * (1 - ratio) / size) ** 0.5
  for name in ("mu", "nu"):
    assert same_bits(getattr(after, name)["norm"], getattr(before, name)["norm"])
  assert same_bits(after.count, before.count)


def test_magnitude_keeps_the_largest_first_moments_of_each_layer():
  before, after = pruned_state("magnitude", 0.9)
  for old, left in zip(before.mu["q"]["lora_a"], after.mu["q"]["lora_a"], strict=True):
    kept = np.abs(old[left != 0])
    assert kept.min() > np.abs(old[left == 0]).max()


def test_random_draws_differ_from_leaf_to_leaf_and_layer_to_layer():
  _, after = pruned_state("random", 0.5)
  masks = [np.asarray(layer != 0).ravel() for factor in ("lora_a", "lora_b") for layer in after.mu["q"][factor]]
  agreement = [np.mean(x == y) for i, x in enumerate(masks) for y in masks[:i]]
  np.testing.assert_allclose(agreement, 0.5, atol=0.1)


# --- through the train step ---------------------------------------------------------------------------------------

SMALL = dict(relora__restart_every=4, relora__restart_warmup_steps=2, relora__prune_ratio=0.5)


@lru_cache
def prepared():
  """A config, its initial host state, its step and its `before_gradients`, compiled once for this file."""
  config = small_model.config("relora", **SMALL)
  before_gradients = jax.jit(METHODS["relora"].build(config).before_gradients)
  return config, host(small_model.first_state(config, 1)), small_model.step(config, 1), before_gradients


def train(steps, state=None, rows=None):
  """The host states before each step and after the last, and the metrics."""
  config, first, step, _ = prepared()
  states, metrics = [first if state is None else state], []
  for _ in range(steps):
    batch = small_model.rows(config, int(states[-1].step)) if rows is None else rows
    placed = jax.device_put(states[-1], replicated(small_model.mesh(1)))
    state, report = step(placed, small_model.shard_batch(batch, 1))
    states.append(host(state))
    metrics.append(host(report))
  return states, metrics


def at_a_restart():
  """The state before step 5, at which a restart is due, and the state after `before_gradients`."""
  before = train(5)[0][-1]
  return before, host(prepared()[3](before))


def adapters(tree, factor):
  """{kind of layer: [layers, r, …]} of one factor of the adapters."""
  return {name: layer[factor] for name, layer in tree["blocks"].items() if factor in layer}


def logits(config, state):
  rows = small_model.rows(config, 0).astype(np.int32)
  apply = jax.jit(small_model.model(config).apply)
  return np.asarray(apply({"params": state.params, "frozen": state.frozen}, rows))


def check_that_a_restart_keeps_the_logits(tolerance, **changes):
  config = small_model.config("relora", **SMALL | changes)
  state = small_model.first_state(config, 1)
  random_b = lambda path, x: (0.02 * draw(0, *x.shape)).astype(x.dtype) if path[-1].key == "lora_b" else x
  before = host(state._replace(params=jax.tree.map_with_path(random_b, state.params), step=np.int32(5)))
  after = host(jax.jit(METHODS["relora"].build(config).before_gradients)(before))
  kept = logits(config, before)
  np.testing.assert_allclose(logits(config, after), kept, rtol=0, atol=tolerance)
  without = before._replace(params=after.params)  # as if the merge were missing
  assert np.abs(logits(config, without) - kept).max() > 1e-2
  assert not same_bits(before.frozen, after.frozen)


def test_a_restart_keeps_the_logits():
  """Logits of about 0.1 and kernels of about 0.02 are rounded once, by 2⁻²⁴ relative."""
  check_that_a_restart_keeps_the_logits(1e-6)


@pytest.mark.slow
def test_a_restart_keeps_the_logits_in_float64(x64):
  check_that_a_restart_keeps_the_logits(1e-12, dtype="float64", param_dtype="float64")


@pytest.mark.slow
def test_a_restart_keeps_the_logits_up_to_the_rounding_of_a_bfloat16_kernel():
  """Kernels of about 0.05 have 8 bits before and after. Two blocks of width 16 give logits of about 0.1."""
  check_that_a_restart_keeps_the_logits(5e-3, frozen_dtype="bfloat16")


@pytest.mark.slow
def test_a_restart_keeps_the_logits_up_to_half_a_step_of_an_int8_kernel():
  check_that_a_restart_keeps_the_logits(5e-3, frozen_dtype="int8")


@pytest.mark.parametrize(
  ("with_residual", "unit"), [(True, 2**-16), (False, 2**-8)], ids=["with a residual", "kernel alone"]
)
def test_the_error_of_a_merge_is_the_rounding_of_the_stored_kernel(with_residual, unit):
  state, _ = small_layers(small_model.config("relora", **SMALL))
  kernel, residual = split_float32(state.frozen["q"]["kernel"])
  base = {"kernel": kernel} | ({"kernel_tail": residual} if with_residual else {})
  frozen, draw = {"q": base}, lambda _, shape: jnp.zeros(shape)
  _, after = jax.jit(lambda *trees: relora.merge_adapters(*trees, draw, 0.5))(state.params, frozen)
  expected = np.float64(load_kernel(base)) + 0.5 * np.einsum(
    "lrn,lrm->lnm", *map(np.float64, state.params["q"].values())
  )
  error = np.abs(np.float64(load_kernel(after["q"])) - expected)
  assert np.all(error <= unit * np.abs(expected) + 1e-6) and error.max() > unit / 4
  assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, frozen)


def test_a_restart_redraws_a_and_zeroes_b():
  before, after = at_a_restart()
  for kind, new in adapters(after.params, "lora_a").items():
    bound = new.shape[-1] ** -0.5
    assert np.all(np.abs(new) <= bound) and np.abs(new).max() > 0.9 * bound
    assert abs(new.mean()) < 0.2 * bound
    assert not np.any(new == adapters(before.params, "lora_a")[kind])
  layers = [layer for new in adapters(after.params, "lora_a").values() for layer in new]
  assert len(layers) == 4
  scaled = [layer.ravel()[:64] for layer in layers]
  assert all(np.abs(np.corrcoef(x, y)[0, 1]) < 0.6 for i, x in enumerate(scaled) for y in scaled[:i]), (
    "each layer is drawn independently"
  )
  assert all(np.any(b) for b in adapters(before.params, "lora_b").values())
  assert not any(np.any(b) for b in adapters(after.params, "lora_b").values())


def test_a_restart_prunes_only_the_moments_of_the_adapters():
  before, after = at_a_restart()
  for name in ("mu", "nu"):
    old, new = getattr(before.opt_state, name), getattr(after.opt_state, name)
    rest = lambda tree: [tree["embed"], tree["norm"], tree["head"], tree["blocks"]["mlp_norm"]]
    assert same_bits(rest(old), rest(new)) and all(np.any(leaf) for leaf in jax.tree.leaves(rest(new)))
    for factor in ("lora_a", "lora_b"):
      old_all, new_all = (np.concatenate([x.ravel() for x in adapters(t, factor).values()]) for t in (old, new))
      assert np.all(old_all != 0) and 0.4 < np.mean(new_all == 0) < 0.6
      np.testing.assert_array_equal(new_all[new_all != 0], old_all[new_all != 0])
  assert jax.tree.all(jax.tree.map(lambda m, v: np.array_equal(m != 0, v != 0), *after.opt_state[1:]))
  assert same_bits(before.opt_state.count, after.opt_state.count)
  rest = lambda state: (state.params["embed"], state.params["norm"], state.params["head"], state.step, state.skipped)
  assert same_bits(rest(before), rest(after))


def small_layers(config):
  """A state of three stacked layers of one kind, without a model, and the method's `before_gradients`."""
  method = METHODS["relora"].build(config)
  params, frozen = {"q": {"lora_a": draw(0, 3, 4, 6), "lora_b": draw(1, 3, 4, 5)}}, {"q": {"kernel": draw(2, 3, 6, 5)}}
  zero = np.zeros((), np.int32)
  return TrainState(zero, params, frozen, {}, updated_once(params), zero, zero, initial_spike_state(2)), jax.jit(
    method.before_gradients
  )


def restarts_at(config, steps):
  """The steps before which the method of a config restarts."""
  state, before_gradients = small_layers(config)
  before = [state._replace(step=np.int32(t)) for t in range(steps)]
  return [t for t in range(steps) if not same_bits(before_gradients(before[t]), before[t])]


@pytest.mark.parametrize(("warm_start", "expected"), [(0, [5, 9, 13]), (6, [9, 13]), (8, [13])])
def test_restarts_follow_every_multiple_of_restart_every_after_the_warm_start(warm_start, expected):
  assert restarts_at(small_model.config("relora", **SMALL, warm_start_steps=warm_start), 15) == expected


def test_restarts_are_at_the_recorded_steps(golden):
  ref = golden("relora")[1]["restarts"]
  assert restarts_at(recorded_config(ref), 30) == ref["merges_after_update"]


def test_between_restarts_the_state_does_not_change():
  states, _ = train(7)
  assert [same_bits(prepared()[3](state), state) for state in states] == [True] * 5 + [False] + [True] * 2


def test_the_learning_rate_is_0_right_before_a_merge():
  states, metrics = train(6)
  assert [float(m["learning_rate"]) == 0 for m in metrics] == [False, False, False, False, True, False]
  assert same_bits(states[4].params, states[5].params) and not same_bits(states[3].params, states[4].params)
  assert [same_bits(states[t].frozen, states[t + 1].frozen) for t in range(6)] == [True] * 5 + [False]


def test_steps_without_a_restart_only_compute_scalars():
  """Outside the loop of 0 or 1 iterations all values are scalars. A conditional would make XLA copy its operands."""
  config, state, _, _ = prepared()
  equations = jax.make_jaxpr(METHODS["relora"].build(config).before_gradients)(state).eqns
  assert [e.primitive.name for e in equations].count("while") == 1
  outside = [e for e in equations if e.primitive.name != "while"]
  assert all(out.aval.size == 1 for e in outside for out in e.outvars)
  assert "cond" not in {e.primitive.name for e in outside}


def test_it_compiles_once():
  config, first, step, _ = prepared()
  state = jax.device_put(first, replicated(small_model.mesh(1)))
  for t in range(7):
    state, _ = step(state, small_model.shard_batch(small_model.rows(config, t), 1))
  assert step._cache_size() == 1


def test_a_skipped_step_still_restarts():
  before, restarted = at_a_restart()
  embedding = np.full_like(before.params["embed"]["embedding"], np.nan)
  with_nan = before._replace(params={**before.params, "embed": {"embedding": embedding}})
  (_, after), _ = train(1, state=with_nan)
  assert after.skipped == 1 and after.step == 6
  assert same_bits(after.params["blocks"], restarted.params["blocks"])
  assert same_bits(after.opt_state, restarted.opt_state)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-7), after.frozen, restarted.frozen)
  assert not same_bits(after.frozen, before.frozen)


def test_a_run_resumes_bitwise_from_a_saved_state():
  straight, _ = train(7)
  for start in (3, 5):
    assert same_bits(train(7 - start, state=straight[start])[0][-1], straight[7])


@pytest.mark.slow
@pytest.mark.parametrize("prune", relora.PRUNES)
def test_draws_depend_on_seed_and_step_but_not_on_the_number_of_devices(prune):
  config = small_model.config("relora", **SMALL, relora__prune=prune)
  state, before_gradients = small_layers(config)
  restart = lambda step, before_gradients=before_gradients, devices=1: host(
    before_gradients(jax.device_put(state._replace(step=np.int32(step)), replicated(small_model.mesh(devices))))
  )
  first = restart(5)
  assert same_bits(first, restart(5)) and same_bits(first, restart(5, devices=8))
  reseeded = small_layers(small_model.config("relora", **SMALL, relora__prune=prune, seed=1))[1]
  for other in (restart(9), restart(5, reseeded)):
    assert not np.any(other.params["q"]["lora_a"] == first.params["q"]["lora_a"])
    assert same_bits(other.frozen, first.frozen)
    assert same_bits(other.opt_state, first.opt_state) == (prune == "magnitude")


def test_the_loss_falls():
  _, metrics = train(30, rows=small_model.rows(prepared()[0], 0))
  losses = [float(report["loss"]) for report in metrics]
  assert losses[0] - 0.1 > losses[10] > losses[20] > losses[-1]


def test_the_initial_logits_are_those_of_the_plain_model():
  config, state, _, _ = prepared()
  plain = small_model.config("full")
  start = small_model.first_state(plain, 1)
  np.testing.assert_allclose(logits(config, state), logits(plain, start), rtol=0, atol=1e-7)
  assert METHODS["relora"].build(config).scale == 32 / 4
  kernel = merge(
    state.frozen["blocks"]["up"]["kernel"], *(state.params["blocks"]["up"][s] for s in ("lora_a", "lora_b")), 8
  )
  assert same_bits(kernel, start.params["blocks"]["up"]["kernel"])


# --- configs ------------------------------------------------------------------------------------------------------

MISTAKES = {
  "rank": (dict(rank=0), "rank (=0) must be at least 1"),
  "alpha": (dict(relora__alpha=0.0), "relora.alpha (=0.0) must be greater than 0; set --config.relora.alpha"),
  "every": (dict(relora__restart_every=0), "relora.restart_every (=0) must be at least 1"),
  "restart warm-up": (
    dict(relora__restart_warmup_steps=4),
    "relora.restart_warmup_steps (=4) must be at least 0 and less than relora.restart_every (=4)",
  ),
  "negative": (dict(relora__restart_warmup_steps=-1), "relora.restart_warmup_steps (=-1) must be at least 0"),
  "warm-up": (dict(warmup_steps=4), "warmup_steps (=4) must be less than relora.restart_every (=4)"),
  "prune": (dict(relora__prune="all"), "relora.prune (='all') must be one of random, magnitude"),
  "ratio": (dict(relora__prune_ratio=99.9), "relora.prune_ratio (=99.9) must lie between 0 and 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_invalid_config_raises_an_error_with_a_remedy(name):
  changes, sentence = MISTAKES[name]
  with pytest.raises(UserError) as caught:
    resolve(small_model.config("relora", **SMALL | changes), devices=8)
  assert sentence in str(caught.value)


def test_the_defaults_are_those_of_the_authors():
  config = small_model.config("relora", learning_rate=None, min_lr_ratio=None, rank=128, steps=40_000)
  config = resolve(config, devices=8)
  assert (config.learning_rate, config.min_lr_ratio) == (1e-3, 0.1)
  assert METHODS["relora"].build(config).scale == 0.25


def test_a_description_counts_the_restarts_and_warns():
  lines = lambda **changes: relora.describe(small_model.config("relora", **SMALL | changes))
  warnings = lambda **changes: relora.warnings(small_model.config("relora", **SMALL | changes))
  count = lambda **changes: int(lines(**changes)[0].split()[4].rstrip(","))
  assert lines(steps=14) == ["restarts in the run: 3, every 4 steps"]
  assert [count(steps=steps) for steps in (4, 5, 6, 13, 14)] == [0, 0, 1, 2, 3], (
    "a merge happens only if a step follows"
  )
  assert [count(steps=14, warm_start_steps=start) for start in (3, 4, 8, 14)] == [3, 2, 1, 0]
  unwarmed, lora = "full-rank warm start", "without a restart this is LoRA"
  assert len(warnings()) == 1 and unwarmed in warnings()[0]
  assert warnings(warm_start_steps=5) == warnings(warm_start_from="runs/full") == []
  assert lora in warnings(steps=4)[0] and unwarmed in warnings(steps=4)[1]
