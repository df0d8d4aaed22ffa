"""The contract of every method, and the options of SwitchLoRA."""

import pkgutil
import re
import zlib
from functools import lru_cache, partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_model
from small_model import equations, host, same_bits
from stages import slowly

from configs.base import get_config
from switchlora_jax import methods
from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.lowrank.transport import transport
from switchlora_jax.methods import FACTORS, METHODS, switchlora
from switchlora_jax.methods.base import Method, TrainState, dtypes
from switchlora_jax.methods.optimizers import ADAM
from switchlora_jax.methods.schedules import config_schedule
from switchlora_jax.parallel.sharding import replicated
from switchlora_jax.training import report as run_report
from switchlora_jax.training.anomalies import initial_spike_state
from switchlora_jax.training.phases import assemble_phase, create_state

pytestmark = pytest.mark.two_linear_layers

each = pytest.mark.parametrize("method", METHODS)
each_trained = pytest.mark.parametrize(
  "method", slowly(METHODS, quick=["full", "switchlora", "galore", "apollo", "factored"])
)
PARTS = ("params", "frozen", "candidates")


def drawn(path, leaf):
  """Random values for a leaf of an abstract state, of a trainable scale; integers and optimizer moments are 0.

  A support of sparse values is the first positions, because positions must differ.
  """
  path = jax.tree_util.keystr(path)
  if path.endswith("['sparse_support']"):
    return np.broadcast_to(np.arange(leaf.shape[-1], dtype=leaf.dtype), leaf.shape).copy()
  if leaf.dtype == jnp.int32 or path.startswith(".opt_state"):
    return np.zeros(leaf.shape, leaf.dtype)
  rng = np.random.default_rng(zlib.crc32(path.encode()))
  return (0.1 * rng.standard_normal(leaf.shape) + path.endswith("['scale']")).astype(leaf.dtype)


@lru_cache
def prepared(method, **changes):
  """A config, an initial host state (the same for all options of a method), and the step on one device."""
  config = small_model.config(method, **dict(dtype="bfloat16") | changes)
  optimizer = METHODS[method].build(config).optimizer
  shapes = jax.eval_shape(lambda: create_state(small_model.model(config), optimizer, 0, 2))
  return config, jax.tree.map_with_path(drawn, shapes), small_model.step(config, 1)


def train(steps, method, state=None, **changes):
  """The host states before each step and after the last, and the metrics."""
  config, first, step = prepared(method, **changes)
  states, metrics = [first if state is None else state], []
  for _ in range(steps):
    rows = small_model.rows(config, int(states[-1].step))
    state, report = step(jax.device_put(states[-1], replicated(small_model.mesh(1))), small_model.shard_batch(rows, 1))
    states.append(host(state))
    metrics.append(host(report))
  return states, metrics


def kinds(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


# --- the contract -------------------------------------------------------------------------------------------------


def test_the_table_lists_every_module_under_its_name():
  shared = {"base", "norm_growth", "optimizers", "projectors", "schedules"}
  modules = {module.name for module in pkgutil.iter_modules(methods.__path__)} - shared
  assert {name: METHODS[name].__name__.split(".")[-1] for name in METHODS} == {name: name for name in modules}


@each
def test_a_method_has_the_attributes_of_the_contract(method):
  module, config = METHODS[method], small_model.config(method)
  assert module.__doc__.strip()
  assert module.LEARNING_RATE > 0 and 0 <= module.MIN_LR_RATIO <= 1
  assert module.check(config) is None
  assert all(isinstance(line, str) and line.strip() for line in (*module.describe(config), *module.warnings(config)))
  built = module.build(config)
  assert isinstance(built, Method) and built.schedule(0) == 1e-2
  assert (built.scale is None) == (method not in FACTORS)


@pytest.mark.parametrize("method", slowly(METHODS, quick=["switchlora", "galore"]))
def test_steps_compute_in_bfloat16_and_store_float32(method):
  states, metrics = train(3, method)
  config = prepared(method)[0]
  out = jax.eval_shape(
    small_model.model(config).apply,
    {"params": states[0].params, "frozen": states[0].frozen},
    small_model.rows(config, 0),
  )
  assert out.dtype == jnp.bfloat16
  stored = {str(leaf.dtype) for leaf in jax.tree.leaves((states[-1].params, states[-1].frozen))}
  assert stored == {"float32"} | ({"int32"} if method == "sltrain" else set()), "the support has integers"
  assert all(kinds(state) == kinds(states[0]) for state in states)
  for t, report in enumerate(metrics):
    assert {"loss", "grad_norm", "learning_rate", "skipped", "skipped_in_a_row"} <= report.keys()
    assert all(value.shape == () and np.isfinite(value) for value in report.values())
    assert (states[t + 1].step, report["skipped"]) == (t + 1, 0)
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), states[t].params, states[t + 1].params)
    assert all(jax.tree.leaves(moved))


NARROW = [(dtype, method) for dtype in ("bfloat16", "int8") for method in ("lora", "switchlora", "relora")]


@pytest.mark.parametrize("case", slowly(NARROW, quick=[("int8", "switchlora")]))
def test_narrow_kernels_keep_their_dtype_and_have_a_residual_if_they_change(case):
  dtype, method = case
  residual = method != "lora"
  states, metrics = train(3, method, frozen_dtype=dtype)
  assert all(kinds(state) == kinds(states[0]) for state in states)
  layers = states[-1].frozen["blocks"].values()
  dtypes = {"kernel": dtype} | ({"kernel_tail": "int8"} if residual else {})
  dtypes |= {"kernel_scale": "float32"} if dtype == "int8" else {}
  assert len(layers) == 2
  assert all({name: str(values.dtype) for name, values in layer.items()} == dtypes for layer in layers)
  assert {leaf.dtype for leaf in jax.tree.leaves(states[-1].params)} == {np.dtype("float32")}
  assert all(np.isfinite(report["loss"]) for report in metrics)
  moved = not same_bits(states[0].frozen, states[-1].frozen)
  assert moved == (method == "switchlora"), "no restart of ReLoRA is due"


@each_trained
def test_a_step_is_deterministic_and_resumes_from_any_state(method):
  straight, reports = train(3, method)
  again, reports_again = train(3, method)
  assert same_bits(again, straight) and same_bits(reports_again, reports)
  resumed, reports_resumed = train(1, method, state=straight[2])
  assert same_bits(resumed[-1], straight[3]) and same_bits(reports_resumed, reports[2:])
  assert not same_bits(reports[0]["loss"], reports[1]["loss"])


@each_trained
def test_a_step_with_a_nan_loss_changes_only_the_counters(method):
  """ReLoRA restarts before the loss is known, but no restart is due at this step."""
  trained = train(3, method)[0][-1]
  embedding = np.full_like(trained.params["embed"]["embedding"], np.nan)
  with_nan = trained._replace(params=trained.params | {"embed": {"embedding": embedding}})
  (_, after), (report,) = train(1, method, state=with_nan)
  assert np.isnan(report["loss"]) and (after.step, after.skipped, after.skipped_in_a_row) == (4, 1, 1)
  assert all(same_bits(getattr(after, part), getattr(with_nan, part)) for part in PARTS)
  assert same_bits(after.opt_state, with_nan.opt_state)
  (_, recovered), _ = train(1, method, state=after._replace(params=trained.params))
  assert (recovered.skipped, recovered.skipped_in_a_row) == (1, 0)
  assert not same_bits(recovered.params, trained.params)
  assert not same_bits(recovered.opt_state, trained.opt_state)


# --- a custom method ----------------------------------------------------------------------------------------------


def toy_method():
  """A module as described in `switchlora_jax.methods`: full-rank training with Optax's momentum."""

  def check(config):
    if not 0 <= config.toy.momentum < 1:
      raise UserError(
        f"toy.momentum (={config.toy.momentum}) must be at least 0 and below 1; set --config.toy.momentum"
      )

  def build(config):
    dense = partial(nn.Dense, use_bias=False, **dtypes(config))
    return Method(dense, optax.trace(config.toy.momentum), config_schedule(config))

  facts = lambda config: [f"momentum: {config.toy.momentum}"]
  own = dict(check=check, build=build, describe=facts, warnings=lambda config: ["momentum is a toy"])
  return SimpleNamespace(LEARNING_RATE=0.1, MIN_LR_RATIO=0.5, ACCEPTED=ADAM, **own)


def toy_config(momentum):
  config = small_model.config("toy", learning_rate=None, min_lr_ratio=None)
  with config.unlocked():
    config.toy = {"momentum": momentum}
  return config


@each
def test_a_step_decomposes_one_matrix_at_a_time(method):
  """jaxlib's decompositions of several matrices can wait for each other for ever on a CPU with two cores."""
  config = small_model.config(method)
  phase = small_model.phase(config, 1)
  rows = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32)
  found = list(equations(jax.make_jaxpr(phase.step)(phase.abstract, rows).jaxpr))
  decompositions = [e for e in found if e.primitive.name in ("geqrf", "householder_product", "qr", "svd", "eigh")]
  assert {e.invars[0].aval.ndim for e in decompositions} <= {2}
  assert bool(decompositions) == (method in {"galore", "fira", "frugal", "ldadam", "factored"})


def test_a_custom_method_needs_a_module_a_table_entry_and_a_config_section(monkeypatch):
  monkeypatch.setitem(METHODS, "toy", toy_method())
  config = resolve(toy_config(0.9), 1)
  assert (config.learning_rate, config.min_lr_ratio) == (0.1, 0.5)
  phase = small_model.phase(config, 1)
  text = run_report.describe_run(config, phase.abstract)
  assert text.endswith("\nmomentum: 0.9\nWARNING: momentum is a toy")
  assert re.search(r"^  toy\.momentum +0\.9 \(default None\)$", run_report.describe_changes(config, get_config()), re.M)
  state, losses = phase.create(), []
  for _ in range(8):
    state, metrics = phase.step(state, phase.shard_batch(small_model.rows(config, 0)))
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] and phase.step._cache_size() == 1
  with pytest.raises(UserError, match=r"toy.momentum \(=2.0\) must be at least 0 and below 1"):
    resolve(toy_config(2.0), 1)


# --- SwitchLoRA's options -----------------------------------------------------------------------------------------


def test_switchlora_warns_that_bfloat16_kernels_drift():
  warnings = lambda **changes: switchlora.warnings(small_model.config("switchlora", **changes))
  (warning,) = warnings(param_dtype="bfloat16")
  assert warning.startswith("switching rounds bfloat16 base kernels")
  never = dict(param_dtype="bfloat16", switch__interval=0)
  for safe in (dict(), dict(frozen_dtype="bfloat16"), dict(param_dtype="bfloat16", frozen_dtype="float32"), never):
    assert warnings(**safe) == []


@pytest.mark.parametrize("kernels", [{}, dict(frozen_dtype="bfloat16")], ids=["float32", "bfloat16"])
def test_switchlora_with_interval_0_is_bitwise_lora(kernels):
  """At equal learning rates. The candidates exist and do not change."""
  never, reports_never = train(4, "switchlora", switch__interval=0, **kernels)
  lora, reports_lora = train(4, "lora", **kernels)
  for ours, theirs in zip(never, lora, strict=True):
    assert same_bits(ours._replace(candidates={}), theirs)
    assert ours.candidates and same_bits(ours.candidates, never[0].candidates)
  assert same_bits(reports_never, reports_lora)
  assert not same_bits(never[-1].params, never[0].params)
  assert not same_bits(train(4, "switchlora", **kernels)[0][-1].params, lora[-1].params)


def train_without_a_model(**changes):
  """Trains two stacked layers for four steps with only the method's switch and optimizer.

  The gradients are the parameters. Returns the initial state and that after each step, the metrics, and the names of
  the masks.
  """
  method = METHODS["switchlora"].build(small_model.config("switchlora", **changes))
  draw = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).standard_normal((2, *shape)), jnp.float32)
  timer, cursor, zero = jnp.zeros((2, 4), jnp.int32), jnp.zeros(2, jnp.int32), jnp.zeros((), jnp.int32)
  fresh = changes.get("switch__candidates") == "fresh"
  ages = {"age_a": timer, "age_b": timer} if changes.get("switch__slots") == "snr" else {}
  spares = {} if fresh else {"spare_a": draw(3, 4, 9), "spare_b": draw(4, 4, 8)}
  params, frozen = {"q": {"lora_a": draw(0, 4, 9), "lora_b": draw(1, 4, 8)}}, {"q": {"kernel": draw(2, 9, 8)}}
  candidates = {"q": spares | ages | {"timer_a": timer, "timer_b": timer, "cursor": cursor}}
  state = TrainState(
    zero, params, frozen, candidates, method.optimizer.init(params), zero, zero, initial_spike_state(2)
  )

  @jax.jit
  def step(state):
    grads = state.params
    state, masks, metrics = method.before_update(state, False)
    direction, opt_state = method.optimizer.update(grads, state.opt_state, state.params, **masks)
    params = jax.tree.map(lambda p, d: p - 0.1 * d, state.params, direction)
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

  masks, states, reports = set(jax.eval_shape(method.before_update, state, False).masks), [host(state)], []
  for _ in range(4):
    state, metrics = step(state)
    states.append(host(state))
    reports.append(host(metrics))
  return states, reports, masks


def clocks(state):
  return [state.candidates["q"][name] for name in ("cursor", "timer_a", "timer_b")]


INCOMPATIBLE = {
  "switchlora": (optax.chain(optax.scale_by_adam()), r"must be or contain scale_by_vector_adam"),
  "relora": (optax.trace(0.9), r"must be a NamedTuple with the moments mu and nu, .*; it is a TraceState; use "),
}


@pytest.mark.parametrize("name", INCOMPATIBLE)
def test_an_optimizer_incompatible_with_the_hooks_raises_when_the_phase_is_built(name):
  """It ignores the masks of a switch, or has no moments that a restart can prune."""
  config, (tx, sentence) = small_model.config(name), INCOMPATIBLE[name]
  method = METHODS[name].build(config)
  with pytest.raises(ValueError, match=sentence):
    assemble_phase(config, method._replace(optimizer=tx), small_model.mesh(1))
  params = {"norm": np.ones(3, np.float32)}
  more = optax.chain(method.optimizer, optax.add_decayed_weights(0.1))
  for accepted in (method.optimizer, more if name == "switchlora" else optax.scale_by_adam()):
    method.check_optimizer(accepted.init(params))


def test_kept_or_transported_state_is_not_reset():
  (reset, reports, masks), (kept, reports_kept, masks_kept), (moved, reports_moved, masks_moved) = (
    train_without_a_model(switch__state=state) for state in ("reset", "keep", "transport")
  )
  assert masks == {"freeze", "reset"} and masks_kept == masks_moved == {"freeze"}
  for one, *others in zip(reports, reports_kept, reports_moved, strict=True):
    for other in others:
      assert one["switched"] == other["switched"] and one["frozen_share"] == other["frozen_share"]
  assert same_bits(clocks(reset[-1]), clocks(kept[-1])) and same_bits(clocks(reset[-1]), clocks(moved[-1]))
  count = lambda states: set(np.concatenate([x.ravel() for x in jax.tree.leaves(states[-1].opt_state.count)]))
  assert count(kept) == count(moved) == {4} and min(count(reset)) < 4
  assert not same_bits(reset[-1].params, kept[-1].params) and not same_bits(moved[-1].params, kept[-1].params)
  assert same_bits(train_without_a_model()[0], reset), "the default is the paper's"


def test_transport_is_of_the_moments_at_the_switch():
  """After a step the moments are those before it, transported, and updated by Adam with the parameters as gradients."""
  states, reports, _ = train_without_a_model(switch__state="transport", switch__freeze_steps=0)
  assert reports[2]["switched"] > 0
  before, after = states[2], states[3]
  config = small_model.config("switchlora", switch__state="keep", switch__freeze_steps=0)
  kept = METHODS["switchlora"].build(config)
  moved = jax.jit(lambda state: kept.before_update(state, False).state)(before)
  counterparts = {"lora_a": "lora_b", "lora_b": "lora_a"}
  for name, other in counterparts.items():
    old, new = before.params["q"][other], moved.params["q"][other]
    mask = np.any(np.asarray(old != new), -1, keepdims=True)
    mu, nu = transport(before.opt_state.mu["q"][name], before.opt_state.nu["q"][name], old, new, mask)
    np.testing.assert_allclose(after.opt_state.mu["q"][name], 0.9 * mu + 0.1 * before.params["q"][name], atol=1e-6)
    squares = before.params["q"][name] ** 2
    np.testing.assert_allclose(after.opt_state.nu["q"][name], 0.999 * nu + 0.001 * squares, rtol=1e-5)


def test_the_switching_rate_can_follow_the_learning_rate_from_a_later_step():
  config = small_model.config("switchlora", steps=100, warmup_steps=10, switch__decay="learning_rate", switch__start=20)
  rate, learning_rate = switchlora.schedule(config).rate, config_schedule(config)
  for step in (0, 5, 19):
    assert rate(step) == 0
  for step in (20, 60, 99):
    np.testing.assert_allclose(rate(step), learning_rate(step) / 1e-2, rtol=1e-6)
  assert switchlora.schedule(small_model.config("switchlora")).curve is None


def test_vectors_are_chosen_by_the_noise_of_the_gradients_of_their_counterparts():
  """A step switches a_k where the gradients of b_k vary, and the other way round; the schedule limits their number."""
  changes = dict(switch__slots="snr", switch__min_age=1, switch__interval=1, switch__freeze_steps=0)
  states, reports, masks = train_without_a_model(**changes)
  assert masks == {"freeze", "reset"} and reports[0]["switched"] == 0, "nothing is known before the first gradients"
  assert all(report["switched"] == report["switched/q"] for report in reports)
  assert sum(report["switched"] for report in reports) > 0
  config = small_model.config("switchlora", **changes)
  state = states[2]
  chosen = switchlora.noisiest(config, state)
  assert (chosen.min_age, chosen.below) == (1, 1.0) and list(chosen.values) == [("q",)]
  adam = state.opt_state
  expected = [
    np.sqrt(np.sum((adam.mu["q"][name] / (1 - 0.9 ** adam.count["q"][name])) ** 2, -1))
    / np.sqrt(np.sum(adam.nu["q"][name] / (1 - 0.999 ** adam.count["q"][name]), -1))
    for name in ("lora_b", "lora_a")
  ]
  for found, ratio in zip(chosen.values["q",], expected, strict=True):
    np.testing.assert_allclose(found, ratio, rtol=1e-4)
  line = switchlora.describe(config)[0]
  assert line.startswith("candidates cycled over the run, hidden × hidden layers: at most ")


def test_random_order_loads_other_spares_at_the_same_steps():
  (order, reports, _), (random, reports_random, _) = (
    train_without_a_model(),
    train_without_a_model(switch__order="random"),
  )
  assert same_bits(train_without_a_model(switch__order="random")[:2], (random, reports_random))
  for one, other in zip(reports, reports_random, strict=True):
    assert one["switched"] == other["switched"] and one["frozen_share"] == other["frozen_share"]
  assert reports[0]["switched"] > 0 and same_bits(clocks(order[-1]), clocks(random[-1]))
  assert not same_bits(order[-1].params, random[-1].params)
  assert "coverage" in reports[0] and "coverage" not in reports_random[0], (
    "coverage is known only for the sequential order"
  )


def test_fresh_candidates_are_switched_at_the_same_steps_and_not_stored():
  fresh = dict(switch__candidates="fresh")
  (order, reports, _), (drawn, reports_drawn, masks) = train_without_a_model(), train_without_a_model(**fresh)
  assert masks == {"freeze", "reset"} and drawn[-1].candidates["q"].keys() == {"cursor", "timer_a", "timer_b"}
  assert same_bits(train_without_a_model(**fresh)[:2], (drawn, reports_drawn))
  for one, other in zip(reports, reports_drawn, strict=True):
    assert one["switched"] == other["switched"] and one["frozen_share"] == other["frozen_share"]
  assert reports[0]["switched"] > 0 and same_bits(clocks(order[-1]), clocks(drawn[-1]))
  assert not same_bits(order[-1].params, drawn[-1].params) and "coverage" not in reports_drawn[0]
  assert not same_bits(train_without_a_model(**fresh, seed=1)[0][1].params, drawn[1].params)
  config = small_model.config("switchlora", **fresh)
  loaded = switchlora.cycles(config) * (config.model.hidden_size - config.rank)
  assert switchlora.describe(config) == [f"new vectors over the run: {loaded:.0f} per factor of a layer"]


def test_random_spares_follow_from_the_seed_and_the_step(monkeypatch):
  state = prepared("switchlora")[1]

  class Drawn(BaseException):
    pass

  def seen(*_, spare_indices, fresh, **__):
    raise Drawn(fresh or spare_indices)

  def indices(step=0, **changes):
    config = small_model.config("switchlora", **dict(switch__order="random") | changes)
    with pytest.raises(Drawn) as drawn:
      METHODS["switchlora"].build(config).before_update(state._replace(step=np.int32(step)), False)
    return drawn.value.args[0]

  def fresh(**changes):
    found = indices(switch__order="sequential", switch__candidates="fresh", **changes)
    return found.init, np.asarray(jax.random.key_data(found.key))

  monkeypatch.setattr(switchlora, "switch", seen)
  assert len(indices()) == 2 and same_bits(indices(), indices())
  assert not same_bits(indices(), indices(step=1)) and not same_bits(indices(), indices(seed=1))
  assert indices(switch__order="sequential") is None
  assert same_bits(fresh(), fresh(step=1)), "the numbers of the loads distinguish the steps"
  assert not same_bits(fresh()[1], fresh(seed=1)[1]) and fresh(switch__init="lora")[0] == "lora" != fresh()[0]


def test_metrics_of_the_switch():
  """Rank 4, 4 layers. The counterparts of switched vectors are frozen at this step and the next (N = 2)."""
  states, metrics = train(6, "switchlora")
  loads = [sum(layer["cursor"].sum() for layer in state.candidates["blocks"].values()) for state in states]
  before = 0
  for t, report in enumerate(metrics):
    switched = loads[t + 1] - loads[t]
    assert report["switched"] == switched
    np.testing.assert_allclose(report["frozen_share"], (switched + before) / (4 * 4), rtol=1e-6)
    squares = jax.tree.map(lambda x, y: np.sum((x - y) ** 2), states[t].frozen, states[t + 1].frozen)
    np.testing.assert_allclose(report["moved_norm"], sum(jax.tree.leaves(squares)) ** 0.5, rtol=1e-5)
    cursors = np.concatenate([layer["cursor"] for layer in states[t + 1].candidates["blocks"].values()])
    np.testing.assert_allclose(report["coverage"], np.mean((4 + np.minimum(cursors, 12)) / 16), rtol=1e-6)
    before = switched
  assert loads[-1] > 0 and len({int(report["switched"]) for report in metrics}) > 1


def test_candidates_are_cycled_less_often_after_a_warm_start():
  """Compared with the sum of the schedule's rates over the steps that switch."""
  for start in (0, 200):
    config = small_model.config("switchlora", steps=1000, warm_start_steps=start)
    rates = np.asarray(switchlora.schedule(config).rate(np.arange(start, 1000)), np.float64)
    expected = config.rank / (16 - config.rank) * rates.sum() / config.switch.interval
    np.testing.assert_allclose(switchlora.cycles(config), expected, rtol=1e-5)
