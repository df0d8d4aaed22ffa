"""The compiled step: collectives, replay, skipped steps, loss spikes, and optimizers of Optax."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import poison
import pytest
import small_model
from small_model import host, same_bits
from stages import slowly

from switchlora_jax.lowrank.layers import lora_vectors
from switchlora_jax.lowrank.optimizer import scale_by_vector_adam
from switchlora_jax.lowrank.spares import draw_uniforms
from switchlora_jax.lowrank.switching import switch
from switchlora_jax.methods import METHODS, switchlora
from switchlora_jax.methods.apollo import scale_by_apollo
from switchlora_jax.methods.base import Method, TrainState
from switchlora_jax.methods.galore import ProjectedAdam, scale_by_galore
from switchlora_jax.parallel.sharding import replicated
from switchlora_jax.planning.collectives import collectives
from switchlora_jax.training import step as train_step
from switchlora_jax.training.phases import assemble_phase

pytestmark = [pytest.mark.user_flags, pytest.mark.two_linear_layers]


@lru_cache
def prepared(method, devices=8, **changes):
  """A config, its initial host state and its step, compiled once for this file."""
  config = small_model.config(method, **changes)
  return config, host(small_model.first_state(config, devices)), small_model.step(config, devices)


def on_mesh(state, devices=8):
  return jax.device_put(state, replicated(small_model.mesh(devices)))


def train(steps, method, devices=8, state=None, **changes):
  """The host states before each step and after the last, and the metrics."""
  config, first, step = prepared(method, devices, **changes)
  states, metrics = [first if state is None else state], []
  for _ in range(steps):
    rows = small_model.rows(config, int(states[-1].step))
    state, report = step(on_mesh(states[-1], devices), small_model.shard_batch(rows, devices))
    states.append(host(state))
    metrics.append(host(report))
  return states, metrics


# --- collectives --------------------------------------------------------------------------------------------------


@lru_cache
def collective_sizes(**changes):
  """The number of elements of each collective in a SwitchLoRA step on 8 devices: (outside loops, inside loops)."""
  config = small_model.config("switchlora", **changes)
  phase = small_model.phase(config, 8)
  rows = small_model.shard_batch(small_model.rows(config, 0), 8)
  found = collectives(phase.step.lower(phase.abstract, rows).compile().as_text(), 8)
  outside, inside = [], []
  for collective in found:
    (outside if collective.certain and collective.times == 1 else inside).append(collective.size // 4)
  return outside, inside


def test_one_reduction_of_the_trainable_parameters_for_any_accumulation():
  once, often = (collective_sizes(accumulation=n) for n in (1, 2))
  assert once[0] and once[1] == often[1] == [], "none in a loop"
  assert len(once[0]) == len(often[0])
  trained = sum(leaf.size for leaf in jax.tree.leaves(prepared("switchlora")[1].params))
  assert sum(once[0]) == sum(often[0]) == trained + 1  # and the loss


def test_sharded_candidates_communicate_only_switched_rows():
  """In the loop of the switch, with at most one iteration: K = 2 spares per factor of each layer of 2 kinds."""
  outside, inside = collective_sizes(sharding__candidates="sharded")
  assert sum(outside) == sum(collective_sizes()[0])
  assert inside == [2 * 2 * (16 + 24)] * 2


# --- the compiled step --------------------------------------------------------------------------------------------


def test_it_compiles_once_and_donates_its_state():
  config, first, step = prepared("switchlora")
  state = on_mesh(first)
  for t in range(3):
    before = state
    state, _ = step(before, small_model.shard_batch(small_model.rows(config, t), 8))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before)), "donated"
  assert step._cache_size() == 1
  kind = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  assert kind(state) == kind(first)


def test_the_loss_falls():
  config, state, step = prepared("switchlora")
  rows, losses = small_model.rows(config, 0), []
  for _ in range(15):
    state, metrics = step(on_mesh(state), small_model.shard_batch(rows, 8))
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] - 0.3


def test_one_device_and_eight_devices_give_the_same_result():
  """Only the order of sums differs. Four steps of Adam amplify roundings of 2⁻²⁴."""
  (one, reports_by_one), (eight, reports_by_eight) = (train(4, "switchlora", devices=devices) for devices in (1, 8))
  for left, right in zip(reports_by_one, reports_by_eight, strict=True):
    assert left["switched"] == right["switched"]
    np.testing.assert_allclose(left["loss"], right["loss"], rtol=1e-5)
    np.testing.assert_allclose(left["grad_norm"], right["grad_norm"], rtol=1e-4)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-3), one[-1].params, eight[-1].params)
  assert same_bits(one[-1].candidates["blocks"]["up"]["cursor"], eight[-1].candidates["blocks"]["up"]["cursor"])


# --- switching ----------------------------------------------------------------------------------------------------


def test_steps_that_switch_change_the_kernels_and_the_candidates():
  states, metrics = train(6, "switchlora")
  assert sum(int(report["switched"]) for report in metrics) > 0
  for t, report in enumerate(metrics):
    same = same_bits(states[t].frozen, states[t + 1].frozen)
    assert same == (report["switched"] == 0)
  assert not same_bits(states[0].candidates, states[-1].candidates)


@pytest.mark.slow
def test_lora_does_not_change_the_base_weights():
  states, metrics = train(4, "lora")
  assert same_bits(states[0].frozen, states[-1].frozen) and states[-1].candidates == {}
  assert "switched" not in metrics[0] and not same_bits(states[0].params, states[-1].params)


def test_draws_are_determined_by_the_seed_and_the_step():
  states, metrics = train(4, "switchlora")
  config = prepared("switchlora")[0]
  for t, (state, report) in enumerate(zip(states, metrics, strict=False)):
    key = jax.random.fold_in(jax.random.key(config.seed), t)
    plan = dict(
      schedule=switchlora.schedule(config), scale=1 / 4, step=t, uniforms=draw_uniforms(key, state.candidates)
    )
    collections = {name: getattr(state, name) for name in ("params", "frozen", "candidates")}
    expected = jax.jit(lambda collections, plan=plan: switch(**collections, **plan))(collections)
    assert expected.count == report["switched"]
    assert same_bits(expected.candidates, states[t + 1].candidates)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), host(expected.frozen), states[t + 1].frozen
    )


def test_a_run_resumes_bitwise_from_a_saved_state():
  """A step uses only the state: draws, schedules and data are derived from `step`."""
  straight, _ = train(6, "switchlora")
  resumed, _ = train(3, "switchlora", state=straight[3])
  assert same_bits(resumed[-1], straight[6])
  elsewhere, _ = train(3, "switchlora", state=straight[3]._replace(step=np.int32(5)))
  assert not same_bits(elsewhere[-1].candidates, straight[6].candidates)


# --- numbers that are not finite ----------------------------------------------------------------------------------


def with_nan_in_the_embedding(params):
  return {**params, "embed": {"embedding": np.full_like(params["embed"]["embedding"], np.nan)}}


def with_infinity_in_the_head(params):
  return {**params, "head": {"kernel": np.full_like(params["head"]["kernel"], np.inf)}}


def with_large_gradients(params):
  """B = 0, so output and loss do not depend on A. The gradient of B is proportional to A."""
  adapter = {"lora_a": params["blocks"]["up"]["lora_a"] * np.float32(1e25)}
  adapter["lora_b"] = np.zeros_like(params["blocks"]["up"]["lora_b"])
  return {**params, "blocks": {**params["blocks"], "up": adapter}}


POISONS = [with_nan_in_the_embedding, with_infinity_in_the_head]


@pytest.mark.parametrize("poison", POISONS)
def test_a_step_that_is_not_finite_changes_only_the_counters(poison):
  """`step` advances, so the next step has the next batch and learning rate. Skipped steps are counted."""
  trained = train(2, "switchlora")[0][-1]
  assert any(np.any(timer) for timer in jax.tree.leaves(trained.candidates)), "some vectors are frozen"
  poisoned = trained._replace(params=poison(trained.params))
  states, (first, second) = train(2, "switchlora", state=poisoned)
  assert not np.isfinite(first["loss"]) and not np.isfinite(first["grad_norm"])
  for part in ("params", "frozen", "candidates"):
    assert same_bits(getattr(states[-1], part), getattr(poisoned, part))
  assert same_bits(states[-1].opt_state, poisoned.opt_state)
  assert (first["skipped"], first["skipped_in_a_row"], second["skipped"], second["skipped_in_a_row"]) == (1, 1, 2, 2)
  assert (first["switched"], second["switched"]) == (0, 0)
  assert states[-1].step == poisoned.step + 2

  recovered, (report,) = train(1, "switchlora", state=states[-1]._replace(params=trained.params))
  assert (report["skipped"], report["skipped_in_a_row"]) == (2, 0) and np.isfinite(report["loss"])
  assert not same_bits(recovered[-1].params, trained.params) and not same_bits(
    recovered[-1].candidates, trained.candidates
  )


def test_a_step_with_finite_gradients_whose_squares_overflow_is_not_skipped():
  trained = train(2, "switchlora")[0][-1]
  large = trained._replace(params=with_large_gradients(trained.params))
  (_, after), (report,) = train(1, "switchlora", state=large)
  assert report["skipped"] == 0 and 1e20 < report["grad_norm"] < 1e30
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after.params, after.frozen, after.opt_state)))
  assert np.any(after.params["blocks"]["up"]["lora_b"]) and not same_bits(after.opt_state.mu, large.opt_state.mu)


is_broken = jax.jit(train_step.is_broken)


@pytest.mark.parametrize(
  ("loss", "norm", "clip_norm", "broken"),
  [
    (3.0, 1e30, 1.0, False),
    (3.0, 1e18, np.inf, False),
    (3.0, 1e30, np.inf, True),  # Adam's second moments would be inf
    (3.0, 1e30, 1e25, True),
    (3.0, np.inf, 1.0, True),
    (3.0, np.nan, 1.0, True),
    (np.nan, 0.5, 1.0, True),
    (np.inf, 0.5, 1.0, True),
  ],
)
def test_a_step_is_broken_if_an_optimizer_would_get_numbers_that_overflow(loss, norm, clip_norm, broken):
  assert bool(is_broken(np.float32(loss), np.float32(norm), clip_norm)) == broken


SPIKY = dict(spike__window=4, switch__interval=1)  # for all tests with `poison.loss`, which share a compiled step


def shards_on_all_devices(state):
  """The shards on every device of the arrays that a skipped step must not change."""
  arrays = jax.tree.leaves((state.params, state.frozen, state.candidates, state.opt_state))
  return [[np.array(part.data) for part in array.addressable_shards] for array in arrays]


LAYOUTS = {"replicated": {}, "sharded": dict(sharding__fsdp=2, sharding__frozen="sharded")}


@pytest.mark.parametrize("kind", ["gradient", "nan"])
@pytest.mark.parametrize("layout", slowly(LAYOUTS, quick=["replicated"]))
def test_a_gradient_that_is_not_finite_on_one_device_skips_the_update_on_all(monkeypatch, kind, layout):
  """The batch of one device is damaged. No array changes on any device, replicated or sharded."""
  monkeypatch.setattr(train_step, "mean_loss", poison.loss)
  config = small_model.config("switchlora", **SPIKY, **LAYOUTS[layout])
  phase = small_model.phase(config, 8)
  state = phase.create()
  for t in range(3):
    state, report = phase.step(state, phase.shard_batch(small_model.rows(config, t)))
  assert int(report["switched"]) > 0, "some vectors are frozen"
  before = shards_on_all_devices(state)
  state, report = phase.step(state, phase.shard_batch(poison.mark(small_model.rows(config, 3), kind)))
  assert np.isfinite(report["loss"]) == (kind == "gradient") and not np.isfinite(report["grad_norm"])
  assert int(state.skipped) == 1 and same_bits(shards_on_all_devices(state), before)
  state, report = phase.step(state, phase.shard_batch(small_model.rows(config, 4)))
  assert int(report["skipped_in_a_row"]) == 0 and not same_bits(shards_on_all_devices(state), before)


# --- skipped steps around any optimizer ---------------------------------------------------------------------------

adam_of_vectors = scale_by_vector_adam(vectors=lora_vectors)


def with_extra_arguments():
  """An optimizer with an extra argument, as for a line search or masks."""

  def update(updates, state, params=None, *, factor=1.0, **_):
    del params
    return jax.tree.map(lambda g: factor * g, updates), state + factor

  return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)


def matrices(params):
  return jax.tree.map(lambda x: x.ndim > 1, params)


def masks(seed):
  hit = np.random.default_rng(seed).random((4, 1)) < 0.5
  return {"q": {"lora_a": jnp.asarray(hit), "lora_b": jnp.asarray(~hit)}, "norm": False}


OPTIMIZERS = {  # with the keyword arguments that a method may pass
  "adam": (optax.scale_by_adam(), {}),
  "adamw": (optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)), {}),
  "schedule": (optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda count: 1 / (1 + count))), {}),
  "extra arguments": (with_extra_arguments(), {"factor": 0.5}),
  "vector adam": (adam_of_vectors, {"reset": masks(0), "freeze": masks(1)}),
  "vector adamw": (optax.chain(adam_of_vectors, optax.add_decayed_weights(0.1)), {"reset": masks(0)}),
  "galore": (scale_by_galore(ProjectedAdam(2, 2, matrices), 0.25), {}),
  "apollo": (scale_by_apollo(2, 2, 1.0, seed=0, projected=matrices), {}),
}


def drawn_params(seed):
  keys = jax.random.split(jax.random.key(seed), 3)
  layer = {"lora_a": jax.random.normal(keys[0], (4, 6)), "lora_b": jax.random.normal(keys[1], (4, 5))}
  return {"q": layer, "norm": jax.random.normal(keys[2], (5,))}


@pytest.mark.parametrize("name", slowly(OPTIMIZERS, quick=["adamw", "extra arguments"]))
def test_a_skipped_step_keeps_params_and_state_of_any_optimizer(name):
  """Bitwise, with gradients that are not finite. A step that is not skipped is that of the optimizer itself."""
  tx, extra = OPTIMIZERS[name]
  method = Method(dense=None, optimizer=tx, schedule=lambda step: 0.1)
  update = jax.jit(lambda state, grads, skip: train_step.apply_optimizer(method, state, grads, extra, skip)[0])
  expected = jax.jit(optax.chain(tx, optax.scale_by_learning_rate(0.1)).update)
  params = drawn_params(0)
  state = state_of(params, tx)
  for t in range(3):  # some steps first, so that moments and counts are not 0
    updates, (inner, _) = expected(drawn_params(t + 1), (state.opt_state, optax.ScaleState()), state.params, **extra)
    reports = optax.apply_updates(state.params, updates), inner
    state = update(state, drawn_params(t + 1), jnp.array(False))
    for ours, theirs in zip(jax.tree.leaves((state.params, state.opt_state)), jax.tree.leaves(reports), strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
  grads = jax.tree.map(lambda g: g.at[..., 0].set(jnp.nan).at[..., 1].set(jnp.inf), drawn_params(9))
  skipped = update(state, grads, jnp.array(True))
  assert same_bits(skipped, state)
  next_state = update(skipped, drawn_params(9), jnp.array(False))
  assert not same_bits(next_state.params, state.params) and not same_bits(next_state.opt_state, state.opt_state)


def state_of(params, tx):
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, params, {}, {}, tx.init(params), zero, zero, None)


def model_params(seed):
  """A tree with a linear layer and a norm of two stacked blocks, and a head."""
  normal = np.random.default_rng(seed).standard_normal
  blocks = {"q": {"lora_a": normal((2, 3, 5)), "lora_b": normal((2, 3, 4))}, "norm": {"scale": normal((2, 5))}}
  return {"blocks": blocks, "head": {"kernel": normal((5, 7))}}


def test_two_learning_rates_and_weight_decay_are_the_numpy_rule(x64):
  """p ← p·(1 - rate·decay) - rate·direction. Norms do not decay, nor do frozen vectors."""
  tx = optax.with_extra_args_support(optax.trace(0.5))
  method = Method(dense=None, optimizer=tx, schedule=lambda step: 0.1 / (1.0 + step))
  update = jax.jit(
    lambda state, grads, freeze: train_step.apply_optimizer(method, state, grads, {"freeze": freeze}, False, 3.0, 0.2)
  )
  frozen = np.array([[True, False, True], [False, False, True]])[..., None]
  state, expected = state_of(model_params(0), tx), model_params(0)
  momentum = jax.tree.map(np.zeros_like, expected)
  for t in range(20):
    grads, hit = model_params(t + 1), frozen & bool(t % 2)
    freeze = {"blocks": {"q": {"lora_a": hit, "lora_b": False}, "norm": {"scale": False}}, "head": {"kernel": False}}
    rate = 0.1 / (1 + t)
    state, rates = update(state, grads, freeze)
    state = state._replace(step=state.step + 1)
    np.testing.assert_allclose([rates["learning_rate"], rates["rest_learning_rate"]], [rate, 3 * rate], rtol=1e-12)
    momentum = jax.tree.map(lambda m, g: 0.5 * m + g, momentum, grads)
    for path, rate_of, decay in (
      (("blocks", "q", "lora_a"), rate, 0.2 * ~hit),
      (("blocks", "q", "lora_b"), rate, 0.2),
      (("blocks", "norm", "scale"), 3 * rate, 0.0),
      (("head", "kernel"), 3 * rate, 0.2),
    ):
      *parents, name = path
      ours, theirs, moment = state.params, expected, momentum
      for parent in parents:
        ours, theirs, moment = ours[parent], theirs[parent], moment[parent]
      theirs[name] = theirs[name] * (1 - rate_of * decay) - rate_of * moment[name]
      np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-12)


def test_weight_decay_is_that_of_the_authors_adam(golden, x64):
  """Their recorded trajectory of 20 steps with resets and a decay of 0.1 (`p *= 1 - lr·wd`)."""
  arrays, meta = golden("adam")
  of_ours = {"lora_a": "A", "lora_b": "B", "kernel": "P"}  # our name: theirs; their B has its vectors in columns
  theirs_of = lambda name, value: value.T if name == "lora_b" else value
  tx = scale_by_vector_adam(*meta["betas"], meta["eps"], vectors=lora_vectors)
  method = Method(dense=None, optimizer=tx, schedule=lambda step: jnp.asarray(arrays["lr"])[step])
  update = jax.jit(
    lambda state, grads, reset: train_step.apply_optimizer(
      method, state, grads, {"reset": reset}, False, weight_decay=0.1
    )[0]
  )
  tree = lambda leaves: {"blocks": {"q": leaves}}
  state = state_of(tree({ours: theirs_of(ours, arrays[f"{theirs}0"]) for ours, theirs in of_ours.items()}), tx)
  for t in range(20):
    hit = {"A": np.zeros((3, 1), bool), "B": np.zeros((3, 1), bool)}
    for step, factor, vectors in meta["resets"]:
      hit[factor][vectors] |= step == t
    grads = {ours: theirs_of(ours, arrays[f"g{theirs}"][t]) for ours, theirs in of_ours.items()}
    state = update(state, tree(grads), tree({"lora_a": hit["A"], "lora_b": hit["B"], "kernel": False}))
    state = state._replace(step=state.step + 1)
    for ours, theirs in of_ours.items():
      recorded = theirs_of(ours, arrays[f"wd0.1_f64_step64_{theirs}"][t])
      np.testing.assert_allclose(state.params["blocks"]["q"][ours], recorded, rtol=1e-10, atol=1e-14)


def test_a_skipped_step_does_not_decay():
  tx = optax.scale_by_adam()
  method = Method(dense=None, optimizer=tx, schedule=lambda step: 0.1)
  state = state_of(drawn_params(0), tx)
  skipped, _ = jax.jit(lambda state, grads: train_step.apply_optimizer(method, state, grads, {}, True, 2.0, 0.1))(
    state, drawn_params(1)
  )
  assert same_bits(skipped, state)


ON_ANY_DEVICES = [("full", "muon"), ("lora", "muon"), ("full", "sgd"), ("lora", "lion")]


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_ANY_DEVICES)
def test_every_optimizer_trains_on_eight_devices_as_on_one(case):
  method, name = case
  changes = dict(optimizer__name=name, rest_learning_rate=5e-3, optimizer__weight_decay=0.1)
  many, one = (train(3, method, devices, **changes) for devices in (8, 1))
  for ours, theirs in zip(jax.tree.leaves(many[0][-1].params), jax.tree.leaves(one[0][-1].params), strict=True):
    atol = 4e-2 if name == "lion" else 1e-4  # lion: the sign of a sum near 0 depends on the order of its terms
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
  assert many[1][-1]["rest_learning_rate"] == np.float32(many[1][-1]["learning_rate"] / 2)
  moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), many[0][0].params, many[0][-1].params)
  assert all(jax.tree.leaves(moved))


def test_an_optimizer_never_gets_gradients_that_are_not_finite():
  seen = []
  note = lambda grads: jax.debug.callback(lambda *leaves: seen.append(leaves), *jax.tree.leaves(grads))
  tx = optax.stateless(lambda updates, _: (note(updates), updates)[1])
  method = Method(dense=None, optimizer=tx, schedule=lambda step: 0.1)
  params = drawn_params(0)
  state = state_of(params, tx)
  grads = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), params)
  jax.block_until_ready(jax.jit(lambda *args: train_step.apply_optimizer(method, *args))(state, grads, {}, True))
  jax.effects_barrier()
  assert len(seen) == 1 and not any(np.any(leaf) for leaf in seen[0])


PLAIN = {
  "full": optax.scale_by_adam(),
  "switchlora": optax.chain(adam_of_vectors, optax.add_decayed_weights(0.1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", PLAIN)
def test_a_method_with_an_optimizer_of_optax_trains_and_skips(method):
  config = small_model.config(method)
  built = METHODS[method].build(config)._replace(optimizer=PLAIN[method])
  phase = assemble_phase(config, built, small_model.mesh(1))
  state = phase.create()
  for t in range(3):
    state, _ = phase.step(state, phase.shard_batch(small_model.rows(config, t)))
  if method == "full":
    usual = train(3, method, devices=1)[0][-1]
    near = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    jax.tree.map(near, host(state.params), usual.params)
  poisoned = host(state)
  poisoned = poisoned._replace(params=with_nan_in_the_embedding(poisoned.params))
  after, report = phase.step(on_mesh(poisoned, 1), phase.shard_batch(small_model.rows(config, 3)))
  assert (int(report["skipped"]), int(after.step)) == (1, 4)
  for part in ("params", "frozen", "candidates", "opt_state"):
    assert same_bits(getattr(after, part), getattr(poisoned, part))


# --- loss spikes --------------------------------------------------------------------------------------------------


def spiked(monkeypatch, action):
  """The host states before and after a batch with about three times the usual loss, and the metrics of that step."""
  monkeypatch.setattr(train_step, "mean_loss", poison.loss)
  config = small_model.config("switchlora", **SPIKY, spike__action=action)
  phase = small_model.phase(config, 8)
  state = phase.create()
  for t in range(4):
    state, report = phase.step(state, phase.shard_batch(small_model.rows(config, t)))
    assert report["spike"] == 0
  before = host(state)
  state, report = phase.step(state, phase.shard_batch(poison.mark(small_model.rows(config, 4), "spike")))
  assert report["spike"] == 1 and report["loss"] > 2.5 * report["loss_mean"]
  return before, host(state), report


def test_a_spike_is_skipped_if_configured(monkeypatch):
  """The loss enters the window and `step` advances. The step is not counted as one that is not finite."""
  before, after, report = spiked(monkeypatch, "skip")
  assert same_bits(before._replace(step=0, spikes=0), after._replace(step=0, spikes=0))
  assert (after.step, report["switched"], report["skipped_in_a_row"]) == (5, 0, 0)
  np.testing.assert_array_equal(after.spikes.losses, [*before.spikes.losses[1:], report["loss"]])


@pytest.mark.parametrize("action", slowly(["report", "rollback"], quick=["report"]))
def test_a_spike_is_not_skipped_with_other_actions(monkeypatch, action):
  """With `rollback`, the run discards the update later."""
  before, after, report = spiked(monkeypatch, action)
  for part in ("params", "frozen", "candidates", "opt_state"):
    assert not same_bits(getattr(before, part), getattr(after, part))
  assert ("rollbacks" in report) == (action == "rollback")
