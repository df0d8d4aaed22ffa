"""APOLLO and APOLLO-Mini compared with NumPy and with the authors' package, their projections, memory and settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_model
from small_model import host, same_bits
from tiny import resolved, tiny_config

from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.methods import METHODS, apollo
from switchlora_jax.methods.apollo import draw_projection, scale_by_apollo
from switchlora_jax.models.llama import Block, LLaMA

pytestmark = pytest.mark.two_linear_layers

KERNELS = {"down": (2, 8, 5), "o": (2, 5, 5), "up": (2, 5, 8)}  # tall, square, wide: two stacked layers each
LEAVES = ["down", "norm", "o", "up"]  # in the order of the tree


def matrices(params):
  """Projects all matrices and stacks of matrices."""
  return jax.tree.map(lambda x: x.ndim > 1, params)


def draw(seed, dtype=np.float32, size=1.0):
  """A tree like the parameters of two stacked layers with three kernels, and a norm."""
  rng = np.random.default_rng(seed)
  tree = {name: (size * rng.standard_normal(shape)).astype(dtype) for name, shape in KERNELS.items()}
  return tree | {"norm": (size * rng.standard_normal(5)).astype(dtype)}


def run(tx, grads, state=None):
  """The updates for a sequence of gradients, and the states after each."""
  update = jax.jit(tx.update)
  state, updates, states = tx.init(grads[0]) if state is None else state, [], []
  for grad in grads:
    step, state = update(grad, state)
    updates.append(host(step))
    states.append(host(state))
  return updates, states


# --- compared with NumPy ------------------------------------------------------------------------------------------


def projection(seed, refresh, leaf, layer, rank, small):
  """The projection of one kernel, [rank, small] float64, with elements from N(0, 1/rank)."""
  key = jax.random.key(seed)
  for number in (refresh, leaf, layer):
    key = jax.random.fold_in(key, number)
  return np.asarray(jax.random.normal(key, (rank, small), jnp.float64)) / rank**0.5


def by_hand(grads, rank, every, scale, scale_type, gamma, seed, leaf, layer, b1=0.9, b2=0.999, eps=1e-6):
  """Algorithm 1 of the paper for one kernel [in, out], in NumPy float64: (update, scale factors, limited) per step."""
  m = v = previous = 0.0
  size = np.linalg.norm
  for t, grad in enumerate(grads):
    flipped = grad.shape[0] > grad.shape[1]
    wide = grad.T if flipped else grad
    low = projection(seed, t // every, leaf, layer, rank, len(wide)) @ wide
    m, v = b1 * m + (1 - b1) * low, b2 * v + (1 - b2) * low**2
    adam = m / (np.sqrt(v) + eps)
    if scale_type == "channel":
      factors = np.array([size(adam[:, j]) / (size(low[:, j]) + 1e-8) for j in range(low.shape[1])])
    else:
      factors = np.array([size(adam) / (size(low) + 1e-8)])
    update = wide * factors[None]
    norm, limited = size(update), False
    if previous and norm / (previous + 1e-8) > gamma:
      limit, limited = gamma * (previous + 1e-8), True
      update, norm = update / norm * limit, limit
    previous = norm
    update = scale * update * np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
    yield update.T if flipped else update, factors, limited


@pytest.mark.parametrize(("scale_type", "rank", "scale"), [("channel", 3, 0.5), ("tensor", 1, 128**0.5)])
def test_25_updates_are_those_of_the_algorithm_in_numpy(scale_type, rank, scale, x64):
  """Tall, square and wide kernels, in stacks. P is drawn anew at updates 0, 9 and 18."""
  sizes = np.exp(np.random.default_rng(0).uniform(-2, 2, 25))
  grads = [draw(t, np.float64, size) for t, size in enumerate(sizes)]
  settings = dict(scale=scale, scale_type=scale_type, seed=7)
  updates, states = run(scale_by_apollo(rank, 9, norm_growth=1.01, projected=matrices, **settings), grads)
  expected = {
    (name, layer): list(
      by_hand([g[name][layer] for g in grads], rank, 9, gamma=1.01, leaf=LEAVES.index(name), layer=layer, **settings)
    )
    for name in KERNELS
    for layer in range(2)
  }
  for t in range(25):
    for (name, layer), steps in expected.items():
      np.testing.assert_allclose(updates[t][name][layer], steps[t][0], rtol=1e-10, atol=1e-12)
    factors, limited = zip(*(steps[t][1:] for steps in expected.values()), strict=True)
    np.testing.assert_allclose(states[t].mean_factor, np.mean(np.concatenate(factors)), rtol=1e-10)
    np.testing.assert_allclose(states[t].limited_share, np.mean(limited))
  shares = {float(state.limited_share) for state in states}
  assert {0, 1} < shares, "the limiter acts on some kernels in some steps"


def test_leaves_that_are_not_projected_use_adam(x64):
  """With eps added to the uncorrected √v, and without scale and limiter."""
  grads = [draw(t, np.float64, 1e-5 * 10.0**t) for t in range(4)]
  updates, _ = run(scale_by_apollo(2, 1, 0.25, seed=0, projected=matrices), grads)
  m = v = 0
  for t, grad in enumerate(g["norm"] for g in grads):
    m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
    adam = np.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1)) * m / (np.sqrt(v) + 1e-6)
    np.testing.assert_allclose(updates[t]["norm"], adam, rtol=1e-12)


def test_with_the_identity_as_projection_each_channel_has_the_norm_of_adams(x64):
  """At the full rank, without limiter. The direction is that of the gradient."""
  identity = lambda key, shape, dtype: jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)
  grads = [draw(t, np.float64) for t in range(3)]
  settings = dict(norm_growth=0, eps=0.0, seed=0, projected=matrices, draw=identity)
  updates, _ = run(scale_by_apollo(5, 1, 1.0, **settings), grads)
  adam = optax.scale_by_adam(eps=0.0)
  state = adam.init(grads[0])
  for grad in grads:
    expected, state = adam.update(grad, state)
  for name, axis in {"up": -2, "down": -1}.items():
    norms = lambda x, axis=axis: np.linalg.norm(x, axis=axis, keepdims=True)
    np.testing.assert_allclose(norms(updates[-1][name]), norms(np.asarray(expected[name])), rtol=1e-7)
    np.testing.assert_allclose(updates[-1][name] / norms(updates[-1][name]), grads[-1][name] / norms(grads[-1][name]))


# --- compared with the authors' package ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_24_updates_are_those_of_the_authors_package(kind, golden, x64):
  """In float64, with the recorded projections: three kernels and a bias. Only the order of sums differs.

  Their weights are [out, in]. Their `scale` enters as its root.
  """
  arrays, meta = golden("apollo")
  hyper = meta["hyper"][kind]
  kernels = ["square", "tall", "wide"]  # in the order of our tree
  oriented = lambda tree: {name: x.T if name in kernels else x for name, x in tree.items()}
  params = oriented({name: np.zeros(arrays[f"g/{name}"].shape[1:]) for name in ("bias", *kernels)})

  def optimizer(projections=()):
    drawn = iter(projections)
    settings = dict(seed=0, projected=matrices, draw=lambda *_: next(drawn))
    return scale_by_apollo(hyper["rank"], meta["hyper"]["update_proj_gap"], hyper["scale"] ** 0.5, kind, **settings)

  update = jax.jit(lambda grads, state, projections: optimizer(projections).update(grads, state))
  state, near = optimizer().init(params), dict(rtol=0, atol=1e-14)
  for t in range(24):
    row = t // meta["hyper"]["update_proj_gap"]
    drawn = [arrays[f"{kind}/draw/{name}"][row] for name in kernels]  # [r, small], or its transpose
    scaled = [(d if len(d) == hyper["rank"] else d.T) / np.float32(hyper["rank"] ** 0.5) for d in drawn]
    grads = oriented({name: arrays[f"g/{name}"][t].astype(np.float64) for name in params})
    direction, state = update(grads, state, [p.astype(np.float64) for p in scaled])
    params = jax.tree.map(lambda p, d: p - meta["hyper"]["lr"] * np.asarray(d), params, direction)
    for name in kernels:
      np.testing.assert_allclose(state.norm[name], arrays[f"{kind}/norm/{name}"][t], rtol=1e-13)
    if t + 1 in meta["steps"]:
      for name, weights in oriented(params).items():
        np.testing.assert_allclose(weights, arrays[f"{kind}/W/{name}"][meta["steps"].index(t + 1)], **near)


# --- the projections ----------------------------------------------------------------------------------------------


def test_projections_have_variance_1_over_r():
  drawn = np.asarray(draw_projection(jax.random.key(0), (3, 8, 512), np.float32))
  assert drawn.dtype == np.float32 and abs(drawn.mean()) < 0.02
  np.testing.assert_allclose(8 * drawn.var(axis=(1, 2)), 1, atol=0.1)
  np.testing.assert_allclose(np.abs(np.corrcoef(drawn.reshape(3, -1)) - np.eye(3)), 0, atol=0.08)


def keys_at(count, seed=0, **settings):
  """The key data and shapes of the projections that an update draws after `count` updates."""
  seen = []

  def spy(key, shape, dtype):
    seen.append((tuple(jax.random.key_data(key).tolist()), shape))
    return jnp.zeros(shape, dtype)

  tx = scale_by_apollo(2, 200, 1.0, seed=seed, projected=matrices, draw=spy, **settings)
  params = draw(0)
  tx.update(params, tx.init(params)._replace(count=np.int32(count)))
  return seen


def test_keys_follow_from_the_seed_the_refresh_and_the_leaf():
  first = keys_at(0)
  assert [shape for _, shape in first] == [(2, 2, 5)] * 3, "the smaller side is projected"
  assert keys_at(0) == keys_at(199) == first, "200 updates have the same projections"
  others = [key for seen in (first, keys_at(200), keys_at(400), keys_at(0, seed=1)) for key, _ in seen]
  assert len(set(others)) == 12


def test_a_rank_above_the_smaller_side_is_lowered_to_it():
  tx = lambda rank: scale_by_apollo(rank, 2, 1.0, seed=0, projected=matrices)
  shapes = lambda rank: jax.tree.map(jnp.shape, tx(rank).init(draw(0)))
  assert shapes(50) == shapes(5) != shapes(4)


# --- numbers that are 0 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_gradients_of_0_give_updates_of_0_and_do_not_stop_later_ones(scale_type):
  """A whole gradient is 0, then single columns and rows are."""
  partly = draw(1)
  partly["up"][:, :, 2], partly["down"][:, 2, :] = 0, 0
  grads = [draw(0), jax.tree.map(np.zeros_like, draw(0)), partly, draw(2)]
  updates, states = run(scale_by_apollo(2, 2, 1.0, scale_type, seed=0, projected=matrices), grads)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, states)))
  assert not any(updates[1][name].any() for name in KERNELS)
  assert not updates[2]["up"][:, :, 2].any() and not updates[2]["down"][:, 2, :].any()
  assert all(updates[t][name].any() for t in (2, 3) for name in KERNELS)


# --- in the train step --------------------------------------------------------------------------------------------


@pytest.fixture
def seven_linear_layers(monkeypatch):
  """The blocks of LLaMA, for tests that compile no step."""
  monkeypatch.setattr(LLaMA, "block_class", Block)


@pytest.mark.parametrize(("method", "rank"), [("apollo", 4), ("apollo_mini", 1)])
def test_the_state_has_2nr_numbers_and_a_norm_per_kernel(method, rank, seven_linear_layers):
  """Table 1 of the paper: 2nr + 2 numbers for a kernel [m, n], m ≤ n; one of them is the seed, which is shared here."""
  opt_state = small_model.phase(small_model.config(method), 1).abstract.opt_state
  layers, hidden, inner, vocab = 2, 16, 24, 64
  kernels = [hidden] * 4 + [inner] * 3  # the larger side of each
  others = 2 * vocab * hidden + hidden + layers * 2 * hidden  # embedding and head, norms
  numbers = layers * sum(2 * large * rank + 1 for large in kernels) + 2 * others + 3  # the count and two metrics
  assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(opt_state)) == 4 * numbers


def test_moments_may_be_bfloat16_while_norms_are_float32():
  config = small_model.config("apollo")
  with config.unlocked():
    config.optimizer.moments_dtype = "bfloat16"
  opt_state = small_model.phase(config, 1).abstract.opt_state
  assert {leaf.dtype for leaf in jax.tree.leaves((opt_state.mu, opt_state.nu))} == {jnp.dtype("bfloat16")}
  assert {leaf.dtype for leaf in jax.tree.leaves(opt_state.norm)} == {jnp.dtype("float32")}


def train(steps, devices=1, state=None, method="apollo", **changes):
  """The host states before each step and after the last, and the metrics; P is drawn anew at every third update."""
  config = small_model.config(method, **{f"{method}__refresh_every": 3} | changes)
  step = small_model.step(config, devices)
  state = small_model.first_state(config, devices) if state is None else state
  states, reports = [host(state)], []
  for t in range(int(state.step), int(state.step) + steps):
    state, metrics = step(state, small_model.shard_batch(small_model.rows(config, t), devices))
    states.append(host(state))
    reports.append(host(metrics))
  return states, reports


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_across_a_new_projection():
  """From the state after the second update; the third is the last with the first projection."""
  straight, reports = train(6)
  resumed, again = train(4, state=jax.device_put(straight[2]))
  assert same_bits(resumed[-1], straight[-1]) and same_bits(again, reports[2:])
  assert all(report["scale_factor"] > 0 and 0 <= report["limited_share"] <= 1 for report in reports)
  assert reports[0]["limited_share"] == 0, "the first update has no predecessor"


def test_the_seed_selects_the_projections():
  first = train(1)[0][0]
  moments = [host(METHODS["apollo"].build(small_model.config("apollo", seed=seed)).optimizer.update(
    first.params, first.opt_state)[1]).mu["blocks"] for seed in (0, 0, 1)]  # fmt: skip
  assert same_bits(moments[0], moments[1]) and not same_bits(moments[0], moments[2])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["apollo", "apollo_mini"])
def test_one_device_and_eight_devices_give_the_same_result(method, x64):
  kinds = dict(dtype="float64", param_dtype="float64", method=method)
  (one, reports), (eight, reports_eight) = train(7, 1, **kinds), train(7, 8, **kinds)
  near = dict(rtol=0, atol=1e-12)
  np.testing.assert_allclose([r["loss"] for r in reports], [r["loss"] for r in reports_eight], **near)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **near), one[-1].params, eight[-1].params)


# --- APOLLO-Mini --------------------------------------------------------------------------------------------------


def test_mini_is_apollo_of_rank_1_with_a_scale_per_kernel():
  """From one gradient; `rank` does not matter."""
  mini = METHODS["apollo_mini"].build(small_model.config("apollo_mini", rank=4)).optimizer
  settings = dict(rank=1, apollo__scale_type="tensor", apollo__scale=128**0.5)
  same = METHODS["apollo"].build(small_model.config("apollo", **settings)).optimizer
  params = {"blocks": {"up": {"kernel": draw(0)["up"]}}, "norm": {"scale": draw(0)["norm"]}}
  assert same_bits(mini.update(params, mini.init(params)), same.update(params, same.init(params)))


# --- the config ---------------------------------------------------------------------------------------------------

MISTAKES = {
  "rank 0": (dict(rank=0), "rank (=0) must be at least 1; set --config.rank or use --config.method=full"),
  "rank": (dict(rank=17), "rank (=17) exceeds the smaller side of every kernel (16); lower --config.rank"),
  "never": (dict(apollo__refresh_every=0), "apollo.refresh_every (=0) must be at least 1; set --config.apollo.refresh"),
  "no scale": (dict(apollo__scale=0.0), "apollo.scale (=0.0) must be greater than 0; set --config.apollo.scale"),
  "type": (dict(apollo__scale_type="row"), "apollo.scale_type (='row') must be one of channel, tensor; set --config."),
  "shrinks": (dict(apollo__norm_growth=0.99), "apollo.norm_growth (=0.99) must be at least 1, or 0 for no limit"),
  "negative": (dict(apollo__norm_growth=-1.0), "apollo.norm_growth (=-1.0) must be at least 1, or 0 for no limit"),
  "optimizer": (dict(optimizer__name="lion"), "optimizer.name (='lion') is not supported by --config.method=apollo"),
  "frozen": (dict(frozen_dtype="bfloat16"), "--config.method=apollo has no frozen kernels"),
  "mini": (dict(method="apollo_mini", apollo_mini__scale=-1.0), "apollo_mini.scale (=-1.0) must be greater than 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_invalid_config_raises_an_error_with_a_remedy(tmp_path, name):
  changes, sentence = MISTAKES[name]
  with pytest.raises(UserError) as caught:
    resolve(tiny_config(tmp_path, **dict(method="apollo") | changes), devices=8)
  assert sentence in str(caught.value)


@pytest.mark.parametrize("method", ["apollo", "apollo_mini"])
def test_defaults_are_those_of_the_authors(tmp_path, method):
  config = resolved(tmp_path, method=method, apollo__norm_growth=0.0)
  assert (config.learning_rate, config.min_lr_ratio) == (1e-2, 0.1)
  assert tuple(config.optimizer[key] for key in ("b1", "b2", "eps")) == (0.9, 0.999, 1e-6)


def test_the_description_counts_the_projections(tmp_path):
  line = lambda method="apollo", **changes: METHODS[method].describe(resolved(tmp_path, method=method, **changes))[0]
  assert "one learning rate per channel" in line() and ": 1, one every 200 steps" in line()
  assert ": 3, one every 5 steps" in line(apollo__refresh_every=5)
  assert ": 2, one every 5 steps" in line(apollo__refresh_every=5, warm_start_steps=2)
  assert "one learning rate per tensor, from random projections to rank 1: 1, one every 200" in line("apollo_mini")


def test_channels_scaled_by_rank_1_are_warned_about(tmp_path):
  warnings = lambda **changes: apollo.warnings(resolved(tmp_path, method="apollo", **changes))
  assert warnings(rank=1)[0].startswith("rank 1 projects each channel to a single number")
  assert warnings(rank=2) == warnings(rank=1, apollo__scale_type="tensor") == []
