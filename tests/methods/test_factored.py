"""Factors in place of kernels, and their restarts, compared with NumPy; also with the sparse matrix of SLTrain."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_model
from small_model import host, same_bits

from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.methods import METHODS, factored
from switchlora_jax.methods.base import TrainState
from switchlora_jax.parallel.sharding import replicated
from switchlora_jax.training.anomalies import initial_spike_state
from switchlora_jax.training.phases import assemble_phase

pytestmark = pytest.mark.two_linear_layers

NAMES = ("factored", "sltrain")
each = pytest.mark.parametrize("method", NAMES)
IN, OUT, RANK, EVERY, STEPS, RATE = 9, 6, 3, 8, 24, 0.03
FLOAT64 = dict(dtype="float64", param_dtype="float64")


def settings(method, every=EVERY, **changes):
  """A config with restarts every few steps, and a sparse part of a fifth of the elements."""
  keys = {f"{method}__restart_every": every, f"{method}__alpha": 2.0, "rank": RANK, "sltrain__density": 0.2}
  return small_model.config(method, **keys | changes)


# --- one layer against NumPy --------------------------------------------------------------------------------------


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape)


X, TARGET = normal(1, 16, IN), normal(2, 2, 16, OUT)


def in_jax(method):
  """The states of two stacked layers before each step and after the last, without a model, and the losses."""
  config = settings(method, **FLOAT64)
  built = METHODS[method].build(config)
  layer = built.dense(OUT, name="q")
  variables = jax.vmap(lambda key: layer.init(key, X))(jax.random.split(jax.random.key(3), 2))
  params = {"blocks": {"q": variables["params"]}}
  frozen = {"blocks": {"q": variables["frozen"]}} if "frozen" in variables else {}
  zero = jnp.zeros((), jnp.int32)
  opt_state = built.optimizer.init(params)
  state = TrainState(zero, params, frozen, {}, opt_state, zero, zero, initial_spike_state(2))

  def loss(params, frozen):
    variables = {"params": params["blocks"]["q"]} | ({"frozen": frozen["blocks"]["q"]} if frozen else {})
    return jnp.sum((jax.vmap(lambda layer_variables: layer.apply(layer_variables, X))(variables) - TARGET) ** 2)

  @jax.jit
  def step(state):
    state = built.before_gradients(state)
    value, grads = jax.value_and_grad(loss)(state.params, state.frozen)
    direction, opt_state = built.optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, d: p - RATE * d, state.params, direction)
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state), value

  states, losses = [host(state)], []
  for _ in range(STEPS):
    state, value = step(state)
    states.append(host(state))
    losses.append(float(value))
  return states, losses


class Reference:
  """One layer in NumPy: a dense kernel, gradients by the chain rule, Adam, and restarts by a dense decomposition."""

  def __init__(self, params, support, target):
    self.params = {name: np.array(x) for name, x in params.items()}
    self.support, self.target, self.scale = support, target, 2.0 / RANK
    self.count = dict.fromkeys(params, 0)
    self.moments = {name: np.zeros((2, *x.shape)) for name, x in params.items()}

  def kernel(self):
    kernel = self.scale * self.params["lora_a"].T @ self.params["lora_b"]
    if self.support is not None:
      kernel.ravel()[self.support] += self.params["sparse_values"]
    return kernel

  def restart(self):
    left, values, right = np.linalg.svd(self.params["lora_a"].T @ self.params["lora_b"])
    root = np.sqrt(values[:RANK, None])
    self.params |= {"lora_a": root * left.T[:RANK], "lora_b": root * right[:RANK]}
    for name in ("lora_a", "lora_b"):
      self.count[name], self.moments[name] = 0, 0 * self.moments[name]

  def step(self):
    """Update the parameters; returns the loss before it."""
    error = X @ self.kernel() - self.target
    whole = 2 * X.T @ error
    a, b = self.params["lora_a"], self.params["lora_b"]
    grads = {"lora_a": self.scale * b @ whole.T, "lora_b": self.scale * a @ whole}
    if self.support is not None:
      grads["sparse_values"] = whole.ravel()[self.support]
    for name, grad in grads.items():
      self.count[name] += 1
      m, v = self.moments[name]
      m[...], v[...] = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
      unbiased = m / (1 - 0.9 ** self.count[name]), v / (1 - 0.999 ** self.count[name])
      self.params[name] = self.params[name] - RATE * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    return np.sum(error**2)


@each
def test_a_trained_layer_is_that_of_numpy(method, x64):
  """Over 24 steps with restarts before the 9th and the 17th; rows of the factors up to a common sign."""
  states, losses = in_jax(method)
  kinds = states[0].params["blocks"]["q"]
  supports = states[0].frozen["blocks"]["q"]["sparse_support"] if states[0].frozen else (None, None)
  references = [Reference({name: x[i] for name, x in kinds.items()}, supports[i], TARGET[i]) for i in range(2)]
  near = dict(rtol=0, atol=1e-10)
  for t in range(STEPS):
    if t in (EVERY, 2 * EVERY):
      for reference in references:
        reference.restart()
    np.testing.assert_allclose(losses[t], sum(reference.step() for reference in references), rtol=1e-10)
    found = states[t + 1].params["blocks"]["q"]
    moments = states[t + 1].opt_state
    for i, reference in enumerate(references):
      signs = np.sign(np.sum(found["lora_a"][i] * reference.params["lora_a"], 1))[:, None]
      for name, expected in reference.params.items():
        sign = signs if name != "sparse_values" else 1
        np.testing.assert_allclose(found[name][i], sign * expected, **near)
        np.testing.assert_allclose(
          moments.mu["blocks"]["q"][name][i], sign * reference.moments[name][0], rtol=1e-9, atol=1e-10
        )
      counts = {name: set(np.ravel(count).tolist()) for name, count in moments.count["blocks"]["q"].items()}
      assert counts == {name: {count} for name, count in reference.count.items()}
  assert losses[-1] < 0.7 * losses[0]
  assert references[0].count["lora_a"] == EVERY and all(
    reference.count.get("sparse_values", STEPS) == STEPS for reference in references
  )


# --- in a model ---------------------------------------------------------------------------------------------------


@lru_cache
def prepared(method):
  """A config, its first host state, its step and its `before_gradients`."""
  config = settings(method, every=3)
  before_gradients = jax.jit(METHODS[method].build(config).before_gradients)
  return config, host(small_model.first_state(config, 1)), small_model.step(config, 1), before_gradients


def train(method, steps, state=None):
  """The host states before each step and after the last."""
  config, first, step, _ = prepared(method)
  states = [first if state is None else state]
  for _ in range(steps):
    placed = jax.device_put(states[-1], replicated(small_model.mesh(1)))
    rows = small_model.rows(config, int(states[-1].step))
    states.append(host(step(placed, small_model.shard_batch(rows, 1))[0]))
  return states


def logits(config, state):
  rows = small_model.rows(config, 0).astype(np.int32)
  return np.asarray(small_model.model(config).apply({"params": state.params, "frozen": state.frozen}, rows))


def factors(tree):
  """The factors of a tree of parameters or moments."""
  layers = tree["blocks"].values()
  return [layer[name] for layer in layers for name in ("lora_a", "lora_b") if name in layer]


@each
def test_a_restart_keeps_the_logits_and_clears_only_the_moments_of_the_factors(method):
  """It is due before the gradients of step 3 and of no other step; logits of about 1 are rounded by 2⁻²⁴."""
  config, *_, before_gradients = prepared(method)
  states = train(method, 4)
  assert [not same_bits(host(before_gradients(state)), state) for state in states] == [False, False, False, True, False]
  before, after = states[3], host(before_gradients(states[3]))
  np.testing.assert_allclose(logits(config, after), logits(config, before), rtol=0, atol=2e-6)
  assert all(not np.array_equal(x, y) for x, y in zip(factors(before.params), factors(after.params), strict=True))
  assert not any(np.any(x) for tree in after.opt_state for x in factors(tree))
  assert all(np.any(x) for tree in before.opt_state for x in factors(tree))
  for old, new in zip((before.params, *before.opt_state), (after.params, *after.opt_state), strict=True):
    rest = lambda tree: [
      value for path, value in jax.tree.leaves_with_path(tree) if path[-1].key not in ("lora_a", "lora_b")
    ]
    assert same_bits(rest(old), rest(new))
  assert same_bits(before.frozen, after.frozen)


@each
def test_a_run_resumes_bitwise_across_a_restart(method):
  straight = train(method, 5)
  assert same_bits(train(method, 3, state=straight[2])[-1], straight[-1])


@each
def test_blocks_learn(method):
  """With all kernels 0, as with LoRA's first factors, no parameter of a block would have a gradient."""
  states = train(method, 2)
  moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), *(state.params["blocks"] for state in states[::2]))
  assert all(jax.tree.leaves(moved))


@each
def test_interval_0_never_restarts(method):
  built = METHODS[method].build(settings(method, every=0))
  state = prepared(method)[1]._replace(step=np.int32(3))
  assert built.before_gradients(state) is state
  built.check_optimizer(optax.EmptyState())


@each
def test_an_optimizer_without_step_counts_per_factor_is_refused(method):
  config = settings(method)
  built = METHODS[method].build(config)._replace(optimizer=optax.scale_by_adam())
  with pytest.raises(ValueError, match=r"must be scale_by_vector_adam.*its state is a ScaleByAdamState"):
    assemble_phase(config, built, small_model.mesh(1))


@each
def test_the_state_has_the_bytes_of_the_formula(method):
  """Per layer and kernel p = r·(in + out) elements of factors and k of the sparse part; two layers of two kinds."""
  state = prepared(method)[1]
  shapes = {"up": (16, 24), "down": (24, 16)}
  p = 2 * sum(RANK * (n + m) for n, m in shapes.values())
  k = 2 * sum(round(0.2 * n * m) for n, m in shapes.values()) if method == "sltrain" else 0
  linear = lambda tree: {name: tree["blocks"][name] for name in shapes}
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  assert size(linear(state.params)) == 4 * (p + k)
  assert size([linear(state.opt_state.mu), linear(state.opt_state.nu)]) == 8 * (p + k)
  assert size(state.frozen) == 4 * k and state.candidates == {}


# --- configs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("steps", "warm", "every", "expected"), [(100, 0, 200, 0), (401, 0, 200, 2), (400, 0, 200, 1), (401, 200, 200, 1)]
)
def test_the_number_of_restarts(steps, warm, every, expected):
  """Those of the steps at which `before_gradients` restarts."""
  config = settings("factored", every, steps=steps, warm_start_steps=warm)
  assert factored.restart_count(config, every) == expected
  assert expected == sum(t % every == 0 and t > warm for t in range(steps))
  assert factored.describe(config) == [f"restarts in the run: {expected}, every 200 steps"]


@each
def test_mistakes_are_sentences(method):
  section = method
  for changes, sentence in (
    (dict(rank=0), r"rank \(=0\) must be at least 1 and at most that of a kernel \(min\(in, out\) = 16\)"),
    (dict(rank=17), r"rank \(=17\) must be at least 1 and at most"),
    ({f"{section}__alpha": 0.0}, rf"{section}\.alpha \(=0.0\) must be greater than 0; set --config\.{section}\.alpha"),
    ({f"{section}__restart_every": -1}, rf"{section}\.restart_every \(=-1\) must be at least 1, or 0 for no restarts"),
    (dict(frozen_dtype="bfloat16"), rf"frozen_dtype \(='bfloat16'\).*--config\.method={method} has no frozen kernels"),
    (dict(optimizer__name="lion"), r"optimizer\.name \(='lion'\) is not supported by --config\.method"),
  ):
    with pytest.raises(UserError, match=sentence):
      resolve(settings(method, fill=False, **changes), 1)


@each
def test_a_warm_start_has_a_warning(method):
  warnings = METHODS[method].warnings
  assert warnings(settings(method)) == []
  for changes in (dict(warm_start_steps=5), dict(warm_start_from="runs/full")):
    (warning,) = warnings(settings(method, **changes))
    assert warning.startswith(f"{method} approximates each kernel of the warm start by a product of rank 3")
    assert "so that the loss may rise there" in warning
