"""Adam with step counts per vector, its masks, gradient clipping, and the contract of all our optimizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_model import host, same_bits

from switchlora_jax.lowrank import switching
from switchlora_jax.lowrank.layers import lora_vectors
from switchlora_jax.lowrank.optimizer import (
  clip_by_global_norm,
  find_vector_adam,
  scale_by_vector_adam,
  signal_to_noise,
  vector_adam,
)
from switchlora_jax.methods.galore import ProjectedAdam, scale_by_galore
from switchlora_jax.methods.schedules import cosine_schedule

pytestmark = pytest.mark.user_flags

apply_updates = jax.jit(optax.apply_updates)  # jitted separately: fused with an update, it is rounded differently

OURS = {
  "scale_by_vector_adam of no vectors": scale_by_vector_adam(),
  "scale_by_vector_adam of vectors": scale_by_vector_adam(vectors=lora_vectors),
  "scale_by_vector_adam per element": scale_by_vector_adam(vectors=lora_vectors, count_per_element=True),
  "vector_adam": vector_adam(1e-2, vectors=lora_vectors),
  "vector_adam with a schedule": vector_adam(cosine_schedule(1e-2, 2, 20), vectors=lora_vectors),
  "galore": optax.chain(
    scale_by_galore(ProjectedAdam(2, 2, lambda params: jax.tree.map(lambda x: x.ndim > 1, params)), 1.0),
    optax.scale_by_learning_rate(1e-2),
  ),
}


def draw(seed, dtype=np.float32):
  """A tree like the parameters of two stacked layers of rank 3 and a norm."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
  adapter = {"lora_a": normal(2, 3, 5), "lora_b": normal(2, 3, 7)}
  return {"blocks": {"q": adapter}, "norm": {"scale": normal(5)}}


def masks(seed, rate=0.5):
  """Random masks like the parameters: [2, 3, 1] for the vectors, False elsewhere."""
  rng = np.random.default_rng(seed)
  some = lambda: rng.random((2, 3, 1)) < rate
  return {"blocks": {"q": {"lora_a": some(), "lora_b": some()}}, "norm": {"scale": False}}


def run(tx, steps, mask=None):
  """Host parameters and state after `steps` jitted updates with random gradients."""
  update = jax.jit(tx.update)
  params = draw(0)
  state = jax.jit(tx.init)(params)
  for t in range(steps):
    extra = {"reset": mask(t), "freeze": mask(t + 1000)} if mask else {}
    updates, state = update(draw(t + 1), state, params, **extra)
    params = apply_updates(params, updates)
  return host((params, state))


# --- compared with the authors' code ------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_with_resets_is_the_recorded_one(weight_decay, golden, x64):
  arrays, meta = golden("adam")
  ref = {k.split("step64_")[1]: v for k, v in arrays.items() if k.startswith(f"wd{weight_decay}_")}
  rows = {"lora_a": "A", "lora_b": "B", "plain": "P"}  # our name: theirs; their B has its vectors in columns
  oriented = lambda x, theirs: x.T if theirs == "B" else x
  params = {ours: oriented(arrays[f"{theirs}0"], theirs) for ours, theirs in rows.items()}
  learning_rate = lambda t: jnp.asarray(arrays["lr"])[t]
  tx = optax.chain(
    scale_by_vector_adam(*meta["betas"], meta["eps"], vectors=lora_vectors),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )
  state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
  for t in range(20):
    hit = {"A": np.zeros((3, 1), bool), "B": np.zeros((3, 1), bool)}
    for step, factor, vectors in meta["resets"]:
      hit[factor][vectors] |= step == t
    reset = {"lora_a": hit["A"], "lora_b": hit["B"], "plain": False}
    grads = {ours: oriented(arrays[f"g{theirs}"][t], theirs) for ours, theirs in rows.items()}
    updates, state = update(grads, state, params, reset=reset)
    params = apply_updates(params, updates)
    for ours, theirs in rows.items():
      expected = {"": params, "m": state[0].mu, "v": state[0].nu}
      for prefix, tree in expected.items():
        np.testing.assert_allclose(tree[ours], oriented(ref[prefix + theirs][t], theirs), rtol=1e-12, atol=1e-14)
      np.testing.assert_array_equal(np.ravel(state[0].count[ours]), ref[f"step{theirs}"][t])


ADAM = vector_adam(0.02, vectors=lora_vectors)


@pytest.mark.parametrize("freeze_steps", [5, 2, 1, -1])
def test_reset_and_freeze_are_the_recorded_ones(freeze_steps, golden, x64):
  """The gradient is constant; slots 0 of A and 2 of B are switched at step 10. Their N = -1 (no freezing) is our 0."""
  arrays, meta = golden("freeze")
  prefix = f"N{freeze_steps}_step64_"
  ref = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
  grads = {"lora_a": ref["gA"], "lora_b": ref["gB"].T}
  state, update, run_timers = jax.jit(ADAM.init)(grads), jax.jit(ADAM.update), jax.jit(switching.freeze)
  timers = {"lora_a": np.zeros(4, np.int32), "lora_b": np.zeros(4, np.int32)}
  counterpart, rows, after = {"lora_a": 2, "lora_b": 0}, meta["rows"], {}
  for t in range(40):
    reset, freeze = {}, {}
    for name, slot in counterpart.items():
      hit = (np.arange(4) == slot) & (t == 10)
      frozen, timers[name] = host(run_timers(timers[name], hit, max(freeze_steps, 0), False))
      reset[name], freeze[name] = hit[:, None], frozen[:, None]
    updates, state = update(grads, state, reset=reset, freeze=freeze)
    updates, adam = host((updates, state[0]))
    for name, factor in (("lora_a", "A"), ("lora_b", "B")):
      after = {"d": updates[name], "m": adam.mu[name], "v": adam.nu[name]}
      if t in rows:
        for key, ours in after.items():
          theirs = ref[key + factor][rows.index(t)]
          np.testing.assert_allclose(ours, theirs if factor == "A" else theirs.T, rtol=1e-12, atol=1e-15)
      np.testing.assert_array_equal(adam.count[name][:, 0], ref[f"step{factor}"][t])
      if freeze_steps > 0:
        np.testing.assert_array_equal(timers[name], ref[f"fixed{factor}"][t])


def test_the_updates_after_a_freeze_are_a_warm_up(x64):
  """With a constant gradient, 0.522, 0.680, 0.776, 0.841 of the learning rate after N = 5 frozen steps."""
  grads = {"lora_a": np.full((1, 3), 7.0)}
  state, update, sizes = jax.jit(ADAM.init)(grads), jax.jit(ADAM.update), []
  for t in range(30):
    on = lambda true: {"lora_a": np.full((1, 1), true)}
    updates, state = update(grads, state, reset=on(t == 20), freeze=on(20 <= t < 25))
    sizes.append(float(-np.asarray(updates["lora_a"])[0, 0] / 0.02))
  assert sizes[20:25] == [0.0] * 5
  np.testing.assert_allclose(sizes[25:29], [0.522, 0.680, 0.776, 0.841], atol=5e-4)
  np.testing.assert_allclose(sizes[25], (0.1 / (1 - 0.9**6)) / (0.001 / (1 - 0.999**6)) ** 0.5, rtol=1e-8)
  assert sizes[19] > 0.99


# --- compared with optax.adam --------------------------------------------------------------------------------------


@functools.cache
def adam_of_each_vector(steps):
  """What `run` returns for one separate optax.adam per leaf and per LoRA vector."""
  params, grads = draw(0), [draw(t + 1) for t in range(steps)]

  def train(param, *grads):
    init, update = optax.adam(1e-2)
    for _ in range(param.ndim - 1):  # [layers, r] vectors
      init, update = jax.vmap(init), jax.vmap(update)
    state, update = jax.jit(init)(param), jax.jit(update)
    for grad in grads:
      step, state = update(grad, state, param)
      param = apply_updates(param, step)
    return host((param, state[0].mu, state[0].nu))

  both = jax.tree.map(train, params, *grads)
  return jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0, 0)), both)


@pytest.mark.parametrize("options", [{}, {"vectors": lora_vectors}, {"count_per_element": True}])
def test_without_masks_it_is_bitwise_optax_adam(options):
  """Compared with one optax.adam per leaf: if leaves share a count, XLA rounds optax's quotients in another order."""
  params, state = run(vector_adam(1e-2, **options), 20)
  assert same_bits((params, state[0].mu, state[0].nu), adam_of_each_vector(20))


def test_with_masks_it_is_not_optax_adam():
  params, _ = run(vector_adam(1e-2, vectors=lora_vectors), 20, mask=masks)
  assert not same_bits(params, adam_of_each_vector(20)[0])


def test_a_count_per_element_gives_the_same_bits():
  tx = functools.partial(vector_adam, 1e-2, vectors=lora_vectors)
  few, state = run(tx(), 20, mask=masks)
  many, full_state = run(tx(count_per_element=True), 20, mask=masks)
  assert same_bits(few, many)
  shapes = lambda state: jax.tree.map(jnp.shape, state[0].count)
  adapter = lambda a, b: {"q": {"lora_a": a, "lora_b": b}}
  assert shapes(state) == {"blocks": adapter((2, 3, 1), (2, 3, 1)), "norm": {"scale": ()}}
  assert shapes(full_state) == {"blocks": adapter((2, 3, 5), (2, 3, 7)), "norm": {"scale": (5,)}}
  counts = jax.tree.map(
    lambda x, y: np.array_equal(np.broadcast_to(x, y.shape), y), state[0].count, full_state[0].count
  )
  assert jax.tree.all(counts) and len(np.unique(state[0].count["blocks"]["q"]["lora_a"])) > 1


def test_reset_and_freeze_change_only_the_masked_vectors():
  tx, params = scale_by_vector_adam(vectors=lora_vectors), draw(0)
  _, state = run(tx, 3)
  hit, update = masks(0), jax.jit(tx.update)
  _, usual = host(update(draw(9), state, params))
  updates, masked = host(update(draw(9), state, params, reset=hit, freeze=hit))
  for factor in ("lora_a", "lora_b"):
    chosen = hit["blocks"]["q"][factor][..., 0]
    assert np.any(chosen) and not np.all(chosen)
    for name in ("mu", "nu"):
      ours, other = (getattr(s, name)["blocks"]["q"][factor] for s in (masked, usual))
      np.testing.assert_array_equal(ours[~chosen], other[~chosen])
      assert not np.any(ours[chosen])
    assert not np.any(updates["blocks"]["q"][factor][chosen]) and np.all(updates["blocks"]["q"][factor][~chosen])
    np.testing.assert_array_equal(masked.count["blocks"]["q"][factor][..., 0], np.where(chosen, 1, 4))
  assert same_bits(masked.mu["norm"], usual.mu["norm"])


# --- the contract of all our optimizers ----------------------------------------------------------------------------


JITTED = {name: (jax.jit(tx.init), jax.jit(tx.update)) for name, tx in OURS.items()}


def some_masks(name, seed):
  """`reset` and `freeze` masks for an optimizer of `OURS`; none for an optimizer without vectors."""
  return {} if "no vectors" in name else {"reset": masks(seed), "freeze": masks(seed + 100)}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_and_structure_are_kept(name, dtype):
  (init, update), params = JITTED[name], draw(0, dtype)
  state = init(params)
  updates, new_state = update(draw(1, dtype), state, params, **some_masks(name, 1))
  kind = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kind(updates) == kind(params)
  assert kind(new_state) == kind(state)


@pytest.mark.parametrize("name", OURS)
def test_it_compiles_once(name):
  (init, _), params = JITTED[name], draw(0)
  update = jax.jit(lambda *args, **masks: OURS[name].update(*args, **masks))  # no other test has compiled it
  state = init(params)
  for t in range(3):
    _, state = update(draw(t), state, params, **some_masks(name, t))
  assert update._cache_size() == 1


@pytest.mark.parametrize("name", OURS)
def test_unknown_extra_arguments_are_ignored(name):
  (init, update), params = JITTED[name], draw(0)
  state = init(params)
  assert same_bits(update(draw(1), state, params), update(draw(1), state, params, value=1.0, no_such=None))


@pytest.mark.parametrize("name", OURS)
def test_updates_descend(name):
  tx, params = OURS[name], {"lora_a": np.full((2, 3), 0.5, np.float32)}
  if name.startswith("scale_by"):  # these do not apply the learning rate and its sign
    tx = optax.chain(tx, optax.scale_by_learning_rate(1e-2))
  state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
  for _ in range(20):
    updates, state = update(params, state, params)  # the gradient of ½‖params‖²
    params = apply_updates(params, updates)
  assert np.all(np.abs(params["lora_a"]) < 0.45)


# --- clipping -----------------------------------------------------------------------------------------------------


clip = jax.jit(clip_by_global_norm)


def test_clipping_is_that_of_the_authors(x64):
  """PyTorch's clip_grad_norm_: g·min(1, c / (‖g‖ + 1e-6))."""
  grads = draw(0, np.float64)
  flat = np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])
  norm = np.sqrt(np.sum(flat**2))
  clipped, ours = host(clip(grads, 0.3))
  np.testing.assert_allclose(ours, norm, rtol=1e-14)
  np.testing.assert_allclose(clipped["norm"]["scale"], grads["norm"]["scale"] * 0.3 / (norm + 1e-6), rtol=1e-14)
  optax_clipped, _ = host(jax.jit(optax.clip_by_global_norm(0.3).update)(grads, optax.EmptyState()))
  difference = np.abs(clipped["norm"]["scale"] / optax_clipped["norm"]["scale"] - 1).max()
  assert 1e-8 < difference < 1e-6, "optax's clipping has no epsilon"


def test_small_gradients_are_not_clipped():
  grads = draw(0)
  clipped, norm = clip(grads, 1e3)
  assert same_bits(clipped, grads) and norm < 1e3


def test_clipping_keeps_dtypes():
  grads = {"narrow": np.ones(4, jnp.bfloat16), "wide": np.ones(4, np.float32)}
  clipped, norm = clip(grads, 0.3)
  assert {name: g.dtype for name, g in clipped.items()} == {name: g.dtype for name, g in grads.items()}
  np.testing.assert_allclose(norm, 8**0.5, rtol=1e-6)


@pytest.mark.parametrize(
  ("dtype", "size", "rtol"),
  [
    *((np.float32, size, 1e-6) for size in (1e-34, 1e-30, 1e-15, 1e15, 1e19, 1e25, 1e30, 1e36)),
    *((jnp.bfloat16, size, 1e-2) for size in (1e-30, 1e30)),
    *((np.float64, size, 1e-14) for size in (1e-300, 1e-200, 1e200, 1e300)),
  ],
)
def test_the_norm_is_correct_where_squares_overflow_or_underflow(dtype, size, rtol, x64):
  grads = jax.tree.map(lambda g: (g * size).astype(dtype), draw(0, np.float64))
  flat = np.concatenate([np.ravel(g).astype(np.float64) for g in jax.tree.leaves(grads)])
  expected = np.linalg.norm(flat / size) * size
  clipped, norm = host(clip(grads, 0.3))
  np.testing.assert_allclose(norm, expected, rtol=1e-6 if dtype != np.float64 else rtol)
  factor = min(1.0, 0.3 / (expected + 1e-6))
  jax.tree.map(
    lambda ours, g: np.testing.assert_allclose(ours.astype(np.float64), g.astype(np.float64) * factor, rtol=rtol),
    clipped, grads,
  )  # fmt: skip
  unclipped, _ = host(clip(grads, np.inf))
  assert same_bits(unclipped, grads)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e15])
def test_without_overflow_or_underflow_the_norm_is_bitwise_that_of_optax(size):
  grads = jax.tree.map(lambda g: g * np.float32(size), draw(0))
  assert same_bits(clip(grads, 0.3)[1], jax.jit(optax.tree.norm)(grads))


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    ([0.0, 0.0], 0.0),
    ([np.inf, 1.0], np.inf),
    ([-np.inf, np.nan], np.nan),
    ([np.nan, 1e30], np.nan),
    ([3e38, 3e38], np.inf),  # beyond float32
    ([2e38, 0.0], np.inf),  # 1 / 2e38 is flushed to 0, which would set the gradients to 0
  ],
)
def test_the_norm_of_zeros_and_of_gradients_that_cannot_be_clipped(values, expected):
  _, norm = clip({"x": np.array(values, np.float32)}, 1.0)
  np.testing.assert_array_equal(norm, np.float32(expected))


def test_the_argument_skip_of_earlier_versions_raises():
  """If it were ignored, a step that should be skipped would make an update."""
  tx, params = vector_adam(1e-2), {"lora_a": np.ones((4, 3), np.float32)}
  with pytest.raises(TypeError, match=r"no longer has an argument skip; to skip a step, keep the old parameters"):
    tx.update(params, tx.init(params), params, skip=False)


def test_masks_without_vectors_raise():
  params = {"lora_a": np.ones((4, 3), np.float32)}
  tx = scale_by_vector_adam()
  with pytest.raises(ValueError, match=r"pass vectors="):
    jax.jit(tx.update)(params, tx.init(params), params, reset={"lora_a": np.ones((4, 1), bool)})


# --- signal and noise ----------------------------------------------------------------------------------------------


def test_the_signal_to_noise_ratio_of_constant_gradients_is_1_and_of_noise_is_small():
  """Of noise: √((1-β1)/(1+β1)) = 0.23, as the mean of 1 / (1 - β1) independent numbers. Without updates it is NaN."""
  rng, tx = np.random.default_rng(0), scale_by_vector_adam(vectors=lambda tree: jax.tree.map(lambda _: True, tree))
  params = np.zeros((3, 400), np.float32)
  state = tx.init(params)
  ratio = lambda state: np.asarray(signal_to_noise(state.mu, state.nu, state.count, 0.9, 0.999))
  assert np.all(np.isnan(ratio(state)))
  constant = rng.standard_normal(400).astype(np.float32)
  for t in range(60):
    grads = np.stack([constant, rng.standard_normal(400).astype(np.float32), constant])
    reset = np.array([[False], [False], [t == 59]])
    freeze = reset
    _, state = tx.update(grads, state, params, reset=reset, freeze=freeze)
  found = ratio(state)
  np.testing.assert_allclose(found[0], 1, rtol=1e-4)
  np.testing.assert_allclose(found[1], (0.1 / 1.9) ** 0.5, rtol=0.1)
  assert np.isnan(found[2]), "reset, and frozen since then"


def test_the_adam_state_is_found_in_a_chain():
  params = np.zeros((3, 4), np.float32)
  adam = scale_by_vector_adam()
  chained = optax.chain(optax.identity(), adam).init(params)
  assert (
    same_bits(find_vector_adam(chained), adam.init(params)) and find_vector_adam(optax.sgd(1.0).init(params)) is None
  )
