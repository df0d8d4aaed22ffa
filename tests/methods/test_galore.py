"""GaLore compared with its authors' code, properties of the projection, and the real train step."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_model
from jax.extend import core
from small_model import host, same_bits
from tiny import resolved, tiny_config

from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.methods import galore
from switchlora_jax.methods.galore import ProjectedAdam, failures, leading_directions, scale_by_galore
from switchlora_jax.models.llama import Block, LLaMA
from switchlora_jax.runs.checkpoint import Checkpoints

pytestmark = pytest.mark.two_linear_layers


def matrices(params):
  """Projects all matrices and stacks of matrices."""
  return jax.tree.map(lambda x: x.ndim > 1, params)


def normal(seed, *shape, dtype=jnp.float32):
  return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def draw(seed, dtype=jnp.float32):
  """A tree like the parameters of three stacked layers: wide, tall and square kernels, and a norm."""
  kernels = {"up": (3, 5, 8), "down": (3, 8, 5), "o": (3, 5, 5)}
  tree = {name: normal((seed, i), *shape, dtype=dtype) for i, (name, shape) in enumerate(kernels.items())}
  return tree | {"norm": normal((seed, 9), 5, dtype=dtype)}


def run(tx, grads, params):
  """The updates for a sequence of gradients, and the final state."""
  state, update, updates = jax.jit(tx.init)(params), jax.jit(tx.update), []
  for grad in grads:
    step, state = update(grad, state, params)
    updates.append(host(step))
  return updates, host(state)


# --- compared with the authors' code ------------------------------------------------------------------------------


def start(arrays):
  """The recorded network `W1·tanh(W0·x + b0) + b1` in our orientation."""
  part = lambda i: {"kernel": arrays[f"f64/W{i}_0"].T, "bias": arrays[f"f64/b{i}_0"]}
  return {"0": part(0), "1": part(1)}


def mean_square(params, x, y):
  hidden = jnp.tanh(x @ params["0"]["kernel"] + params["0"]["bias"][None])
  return jnp.mean((hidden @ params["1"]["kernel"] + params["1"]["bias"][None] - y) ** 2)


def recorded(arrays, kind, row):
  """The projectors [small, r] of a recorded refresh: 16 × 2 at the input of layer 0, 10 × 2 at the output of 1."""
  return {16: jnp.asarray(arrays[f"{kind}/P0"][row].T), 10: jnp.asarray(arrays[f"{kind}/P1"][row])}


def follow(arrays, hyper, directions):
  """Train on the recorded inputs and targets: (step, loss, params, GaLoreState) after each of the 25 updates.

  Args:
    directions: maps the number of a refresh to the function that finds its directions.
  """

  def galore_with(directions):
    coefficients = (*hyper["betas"], hyper["eps"])
    adam = ProjectedAdam(hyper["rank"], hyper["update_proj_gap"], matrices, *coefficients, directions)
    return optax.chain(scale_by_galore(adam, hyper["scale"]), optax.scale_by_learning_rate(hyper["lr"]))

  wrong = galore_with(lambda grad, rank: jnp.eye(len(grad))[:, :rank])  # must not be called; it would change the result
  keep, gradients, params = jax.jit(wrong.update), jax.jit(jax.value_and_grad(mean_square)), start(arrays)
  state = jax.jit(wrong.init)(params)
  for t in range(25):
    row, since = divmod(t, hyper["update_proj_gap"])
    update = keep if since else jax.jit(galore_with(directions(row)).update)
    loss, grads = gradients(params, arrays["f64/X"][t], arrays["f64/Y"][t])
    updates, state = update(grads, state, params)
    params = jax.tree.map(np.add, params, host(updates))
    yield t, loss, params, state[0]


def test_25_updates_of_a_network_are_the_recorded_ones(golden, x64):
  """From inputs and targets, with the recorded projectors. Only the order of float64 sums differs, by about 1e-16."""
  arrays, meta = golden("galore")
  near, every = dict(rtol=0, atol=1e-14), meta["hyper"]["update_proj_gap"]
  given = lambda row: lambda grad, rank: recorded(arrays, "f64", row)[len(grad)]
  for t, loss, params, adam in follow(arrays, meta["hyper"], given):
    np.testing.assert_allclose(loss, arrays["f64/loss"][t], **near)
    for i, orient in (("0", np.transpose), ("1", np.asarray)):  # theirs of layer 0 are [large, r]
      np.testing.assert_allclose(params[i]["kernel"].T[::8], arrays[f"f64/W{i}"][t], **near)
      np.testing.assert_allclose(params[i]["bias"], arrays[f"f64/b{i}"][t], **near)
      np.testing.assert_allclose(adam.mu[i]["kernel"], orient(arrays[f"f64/m{i}"][t]), **near)
      np.testing.assert_allclose(adam.nu[i]["kernel"], orient(arrays[f"f64/v{i}"][t]), rtol=1e-12, atol=1e-18)
      if t % every == 0:
        np.testing.assert_allclose(adam.mu[i]["bias"], arrays[f"f64/mb{i}"][t // every], **near)
        np.testing.assert_allclose(adam.nu[i]["bias"], arrays[f"f64/vb{i}"][t // every], rtol=1e-12, atol=1e-18)
    assert adam.count == t + 1
  assert t == 24


def aligned(ours, ref):
  """Our directions with the signs of `ref`, because the sign of a singular vector is arbitrary."""
  return ours * jnp.sign(jnp.sum(ours * ref, 0, keepdims=True))


def test_directions_are_the_recorded_ones_up_to_their_sign(golden):
  """From float32 gradients. A rounding of 2⁻²⁴ is amplified by σ₁ / (gap to the next σ), here at most 130."""
  arrays, meta = golden("galore")
  for row in range(5):
    ref = recorded(arrays, "f32", row)
    for grad in (arrays["f32/g0"][row].T, arrays["f32/g1"][row]):
      ours = leading_directions(jnp.asarray(grad), meta["hyper"]["rank"])
      np.testing.assert_allclose(aligned(ours, ref[len(grad)]), ref[len(grad)], rtol=0, atol=3e-5)


@pytest.mark.slow
def test_a_run_that_computes_its_directions_stays_near_the_recorded_one(golden, x64):
  """With the recorded signs, only the rounding of the float32 decomposition differs."""
  arrays, meta = golden("galore")

  def found(row):
    return lambda grad, rank: aligned(leading_directions(grad, rank), recorded(arrays, "f64", row)[len(grad)])

  *_, (_, _, params, _) = follow(arrays, meta["hyper"], found)
  for i in ("0", "1"):
    np.testing.assert_allclose(params[i]["kernel"].T[::8], arrays[f"f64/W{i}"][-1], rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_directions_are_found_in_float32_and_kept_in_the_dtype_of_the_gradient(dtype, x64):
  grad = normal(3, 6, 9, dtype=dtype)
  ours, ref = leading_directions(grad, 2), leading_directions(grad.astype(jnp.float32), 2)
  assert ours.dtype == dtype and ref.dtype == jnp.float32
  np.testing.assert_array_equal(ours, ref.astype(dtype))


# --- what is projected --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(6, 9), (9, 6), (7, 7)])
def test_the_projection_is_the_best_of_its_rank_on_the_smaller_side(sides):
  """Eckart–Young. For a square kernel [in, out] it spans the input side, as the authors' code does for PyTorch's Wᵀ."""
  grad = normal(1, *sides)
  _, state = run(scale_by_galore(ProjectedAdam(2, 1, matrices), 1.0), [[grad]], [grad])
  left, sizes, right = np.linalg.svd(np.asarray(grad, np.float64))
  best = left[:, :2] if sides[0] <= sides[1] else right[:2].T
  spanned = lambda p: np.asarray(p) @ np.asarray(p).T
  np.testing.assert_allclose(spanned(state.projector[0]), spanned(best), rtol=0, atol=1e-5)
  assert state.mu[0].shape == (2, max(sides))
  np.testing.assert_allclose(np.sum(state.mu[0] ** 2), 0.01 * np.sum(sizes[:2] ** 2), rtol=1e-4)


def _init(params, rank):
  return scale_by_galore(ProjectedAdam(rank, 1, matrices), 1.0).init(params)


@pytest.mark.parametrize("sides", [(6, 9), (9, 6), (7, 7)])
def test_the_update_is_in_the_span_of_the_projector(sides):
  grad = normal(2, *sides)
  (update, *_), state = run(scale_by_galore(ProjectedAdam(2, 1, matrices), 1.0), [[grad]], [grad])
  projector = np.asarray(state.projector[0])
  update = np.asarray(update[0]) if sides[0] <= sides[1] else np.asarray(update[0]).T
  np.testing.assert_allclose(projector @ (projector.T @ update), update, rtol=0, atol=1e-6)
  assert np.linalg.matrix_rank(update, tol=1e-4) == 2


def test_stacked_layers_are_updated_like_single_layers():
  """The projectors are bitwise equal. Matrix products may be summed in another order."""
  tx, grads = scale_by_galore(ProjectedAdam(2, 3, matrices), 0.25), [draw(t) for t in range(7)]
  together, state = run(tx, grads, draw(9))
  for layer in range(3):
    take = lambda tree, layer=layer: jax.tree.map(lambda x: x[layer] if x.ndim > 1 else x, tree)
    alone, alone_state = run(tx, [take(grad) for grad in grads], take(draw(9)))
    assert same_bits(take(state.projector), alone_state.projector)
    differences = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), take(together[-1]), alone[-1])
    assert max(jax.tree.leaves(differences)) < 1e-6


def test_a_rank_above_the_smaller_side_keeps_all_directions():
  params = draw(0)
  shapes = lambda rank: jax.tree.map(jnp.shape, _init(params, rank))
  assert shapes(50) == shapes(5) != shapes(4)
  tx = lambda rank: scale_by_galore(ProjectedAdam(rank, 2, matrices), 1.0)
  assert same_bits(run(tx(50), [draw(1)] * 3, params), run(tx(5), [draw(1)] * 3, params))


@pytest.fixture
def seven_linear_layers(monkeypatch):
  """The blocks of LLaMA, for tests that compile no step."""
  monkeypatch.setattr(LLaMA, "block_class", Block)


def test_only_the_kernels_of_the_blocks_are_projected(seven_linear_layers):
  state = small_model.phase(small_model.config("galore"), 1).abstract
  projector = state.opt_state.projector
  assert all(projector["blocks"][name]["kernel"].shape == (2, 16, 4) for name in "q k v o gate up down".split())
  others = [projector["embed"], projector["head"], projector["norm"], projector["blocks"]["mlp_norm"]]
  assert jax.tree.leaves(others) == []


# --- compared with Adam -------------------------------------------------------------------------------------------


def adam_by_hand(grads, b1=0.9, b2=0.999, eps=1e-6):
  """The last step of Adam with eps on the uncorrected √v, in numpy."""
  m = v = 0
  for grad in grads:
    m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
  return np.sqrt(1 - b2 ** len(grads)) / (1 - b1 ** len(grads)) * m / (np.sqrt(v) + eps)


def test_leaves_that_are_not_projected_use_adam_without_the_scale(x64):
  grads = [normal(t, 5, dtype=jnp.float64) * 1e-5 for t in range(4)]
  updates, _ = run(scale_by_galore(ProjectedAdam(2, 1, matrices), 0.25), grads, grads[0])
  np.testing.assert_allclose(updates[-1], adam_by_hand([np.asarray(g) for g in grads]), rtol=1e-12)
  optax_updates, _ = run(optax.scale_by_adam(eps=1e-6), grads, grads[0])
  assert np.abs(optax_updates[-1] / updates[-1] - 1).max() > 0.1, "optax adds eps to the bias-corrected √v"


@pytest.mark.parametrize("sides", [(4, 6), (6, 4), (4, 4)])
def test_in_a_permuted_basis_galore_equals_adam(sides, x64):
  """Adam treats all elements alike, so it commutes with permutations and sign changes of the axes, but no other P."""
  order, signs = np.array([2, 0, 3, 1]), np.array([1.0, -1.0, -1.0, 1.0])
  basis = jnp.asarray(np.eye(4)[:, order] * signs)
  grads = [[normal(t, *sides, dtype=jnp.float64)] for t in range(6)]
  tx = scale_by_galore(ProjectedAdam(4, 100, matrices, directions=lambda grad, rank: basis), 1.0)
  updates, _ = run(tx, grads, grads[0])
  np.testing.assert_allclose(updates[-1][0], adam_by_hand([np.asarray(g[0]) for g in grads]), rtol=1e-12)


def test_at_full_rank_the_momentum_equals_adams_but_the_update_does_not(x64):
  """The momentum is linear, so the rotation into singular directions keeps it. The division by √v depends on the axes.

  The first update of Adam is sign(G), that of GaLore P·sign(PᵀG). Both have the same length and are descent
  directions. Each has at best the cosine √(2/π) with a Gaussian G, and the cosine 2/π with the other.
  """
  grads = [[normal(t, 128, 344, dtype=jnp.float64)] for t in range(4)]
  tx = scale_by_galore(ProjectedAdam(128, 3, matrices, eps=0.0), 1.0)
  (first, *_), state = run(tx, grads[:3], grads[0])
  momentum = lambda state: np.asarray(state.projector[0] @ state.mu[0])
  adam = optax.scale_by_adam(eps=0.0)
  (adam_first, *_), adam_state = run(adam, grads[:3], grads[0])
  np.testing.assert_allclose(momentum(state), adam_state.mu[0], rtol=0, atol=5e-6)  # PPᵀ = 1 in float32 only
  ours, theirs = np.asarray(first[0]), np.asarray(adam_first[0])
  np.testing.assert_allclose(np.linalg.norm(ours), np.linalg.norm(theirs), rtol=1e-5)
  assert 0.55 < np.sum(ours * theirs) / np.sum(theirs**2) < 2 / np.pi
  assert np.sum(ours * grads[0][0]) > 0.9 * np.sum(theirs * grads[0][0])
  _, state = run(tx, grads, grads[0])
  _, adam_state = run(adam, grads, grads[0])
  assert np.abs(momentum(state) - adam_state.mu[0]).max() > 0.1, "a refresh does not rotate the moments"


# --- refresh ------------------------------------------------------------------------------------------------------


def counted(refresh_every):
  """A transformation of rank 2, and a list with one entry per executed decomposition."""
  calls = []

  def directions(grad, rank):
    jax.debug.callback(lambda: calls.append(1))
    return leading_directions(grad, rank)

  return scale_by_galore(ProjectedAdam(2, refresh_every, matrices, directions=directions), 0.25), calls


def decompositions(refresh_every, updates):
  """The number of decompositions at each update of three stacked layers with three kernels."""
  tx, calls = counted(refresh_every)
  state, update, ref = tx.init(draw(0)), jax.jit(tx.update), []
  for t in range(updates):
    _, state = update(draw(t), state)
    jax.block_until_ready(state)
    jax.effects_barrier()
    ref.append(len(calls))
    calls.clear()
  return ref


def test_gradients_are_decomposed_only_when_a_refresh_is_due():
  assert decompositions(3, 8) == [9, 0, 0, 9, 0, 0, 9, 0]
  assert decompositions(1, 2) == [9, 9]


def test_a_refresh_due_at_a_skipped_step_happens_at_the_next_step():
  """A skipped train step does not count as an update. The gradients of step 3 are not finite."""
  config = small_model.config("galore", galore__refresh_every=3)
  state, step = small_model.first_state(config, 1), small_model.step(config, 1)
  projectors = []
  for t in range(8):
    embedding = host(state.params["embed"]["embedding"])
    if t == 3:
      state = state._replace(params=state.params | {"embed": {"embedding": np.full_like(embedding, np.nan)}})
    before = host(state.opt_state)
    state, report = step(state, small_model.shard_batch(small_model.rows(config, t), 1))
    assert same_bits(before, host(state.opt_state)) == (t == 3)
    if t == 3:
      state = state._replace(params=state.params | {"embed": {"embedding": embedding}})
    projectors.append(not same_bits(before.projector, host(state.opt_state.projector)))
  assert projectors == [True, False, False, False, True, False, False, True]
  assert (int(state.opt_state.count), int(report["skipped"])) == (7, 1)


def failing(grad, rank):
  """A decomposition that fails for gradients whose first element is 1e3."""
  return jnp.where(grad[0, 0] == 1e3, jnp.nan, leading_directions(grad, rank))


def broken(grads):
  """The same gradients, except that the decomposition of layer 1 of `up` fails."""
  up = grads["up"].copy()
  up[1, 0, 0] = 1e3
  return grads | {"up": up}


def test_a_failed_decomposition_keeps_the_projector_and_only_it_is_repeated():
  tx, params = scale_by_galore(ProjectedAdam(2, 3, matrices, directions=failing), 0.25), draw(0)
  _, before = run(tx, [draw(t) for t in range(3)], params)
  updates, after = jax.jit(tx.update)(broken(draw(3)), before, params)
  assert int(failures(after)) == 1 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, after)))
  kept = {name: np.all(before.projector[name] == after.projector[name], axis=(1, 2)) for name in ("up", "down", "o")}
  np.testing.assert_array_equal(kept["up"], [False, True, False])
  assert not kept["down"].any() and not kept["o"].any()
  _, again = jax.jit(tx.update)(draw(4), after, params)
  assert int(failures(again)) == 0
  assert same_bits(again.projector["up"][1], leading_directions(draw(4)["up"][1], 2))
  others = lambda state: state.projector | {"up": state.projector["up"][::2]}
  assert same_bits(others(again), others(after))
  _, later = jax.jit(tx.update)(draw(5), again, params)
  assert same_bits(later.projector, again.projector), "the next refresh is not due yet"


def test_a_kernel_without_a_projector_is_not_updated():
  tx, params = scale_by_galore(ProjectedAdam(2, 3, matrices, directions=failing), 0.25), draw(0)
  updates, state = jax.jit(tx.update)(broken(draw(1)), tx.init(params), params)
  moved = np.any(np.asarray(updates["up"]) != 0, axis=(1, 2))
  np.testing.assert_array_equal(moved, [True, False, True])
  assert int(failures(state)) == 1 and np.isfinite(updates["up"]).all()


def test_the_moments_are_kept_at_a_refresh():
  """After a refresh, m = 0.9 · old m + 0.1 · new projection, without a rotation of the old m."""
  tx, params = scale_by_galore(ProjectedAdam(2, 2, matrices), 0.25), draw(0)
  _, before = run(tx, [draw(1), draw(2)], params)
  _, after = jax.jit(tx.update)(draw(3), before, params)
  projected = np.swapaxes(after.projector["up"], -1, -2) @ np.asarray(draw(3)["up"])
  expected = 0.9 * np.asarray(before.mu["up"]) + 0.1 * projected
  np.testing.assert_allclose(after.mu["up"], expected, rtol=0, atol=1e-6)
  assert not same_bits(before.projector, after.projector)


# --- in the train step --------------------------------------------------------------------------------------------


def primitives(jaxpr, inside_cond=False):
  """(name, whether it is inside a cond) of every operation of a jaxpr."""
  for equation in jaxpr.eqns:
    yield equation.primitive.name, inside_cond
    for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr))):
      inner = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
      if isinstance(inner, core.Jaxpr):
        yield from primitives(inner, inside_cond or equation.primitive.name == "cond")


def train(steps, devices, **changes):
  """The host states before each step and after the last, and the losses. Every step uses the same rows."""
  config = small_model.config("galore", galore__refresh_every=3, **changes)
  state, step = small_model.first_state(config, devices), small_model.step(config, devices)
  states, losses = [host(state)], []
  for _ in range(steps):
    rows = small_model.shard_batch(small_model.rows(config, 0), devices)
    state, metrics = step(state, rows)
    states.append(host(state))
    losses.append(float(metrics["loss"]))
  assert step._cache_size() == 1
  return states, losses


def test_the_loss_falls_and_projectors_change_when_due():
  states, losses = train(15, 8)
  assert losses[-1] < losses[0] - 0.3
  projectors = [state.opt_state.projector for state in states]
  same = [same_bits(old, new) for old, new in pairwise(projectors)]
  assert same == [False, True, True] * 5


def test_decompositions_of_the_train_step_are_under_a_cond(seven_linear_layers):
  config = small_model.config("galore")
  rows = small_model.shard_batch(small_model.rows(config, 0), 8)
  phase = small_model.phase(config, 8)
  traced = jax.make_jaxpr(phase.step)(phase.abstract, rows)
  assert [inside for name, inside in primitives(traced.jaxpr) if name == "svd"] == [True] * 7


@pytest.mark.slow
def test_one_device_and_eight_devices_give_the_same_result(x64):
  """In float64 the gradients differ by 1e-16, which rarely changes the float32 values that are decomposed."""
  kinds = dict(dtype="float64", param_dtype="float64")
  (one, one_losses), (eight, eight_losses) = train(7, 1, **kinds), train(7, 8, **kinds)
  near = dict(rtol=0, atol=1e-12)
  np.testing.assert_allclose(one_losses, eight_losses, **near)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **near), one[-1].params, eight[-1].params)


def test_optimizer_memory_follows_from_the_rank(seven_linear_layers):
  config = small_model.config("galore")
  size = lambda method: sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(small_model.phase(small_model.config(method), 1).abstract.opt_state)
  )
  layers, rank, hidden, inner, vocab = 2, config.rank, 16, 24, 64
  low = 4 * rank * hidden + 3 * rank * inner  # a moment: r × large of the seven kernels
  projectors = 7 * hidden * rank
  others = 2 * vocab * hidden + hidden + layers * 2 * hidden  # embedding and head, norms
  assert size("galore") == 4 * (
    2 * (layers * low + others) + layers * (projectors + 7) + 1
  )  # one flag per kernel, one count
  full = 2 * (layers * (4 * hidden * hidden + 3 * hidden * inner) + others)
  assert 4 * full < size("full") < 4 * full + 100


def test_the_state_is_restored_from_a_checkpoint(tmp_path):
  state = jax.tree.map(lambda x: x + 1, small_model.first_state(small_model.config("galore"), 1))  # not all zeros
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(2, state)
  with Checkpoints(tmp_path) as checkpoints:
    assert same_bits(checkpoints.restore(lambda _: abstract), state)


# --- the config ---------------------------------------------------------------------------------------------------

MISTAKES = {
  "rank 0": (dict(rank=0), "rank (=0) must be at least 1; set --config.rank or use --config.method=full"),
  "rank": (dict(rank=17), "rank (=17) exceeds the smaller side of every kernel (16); lower --config.rank"),
  "never": (dict(galore__refresh_every=0), "galore.refresh_every (=0) must be at least 1"),
  "no scale": (dict(galore__scale=0.0), "galore.scale (=0.0) must be greater than 0"),
  "no number": (dict(galore__scale=float("nan")), "galore.scale (=nan) must be a finite number"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_invalid_config_raises_an_error_with_a_remedy(tmp_path, name):
  changes, sentence = MISTAKES[name]
  with pytest.raises(UserError) as caught:
    resolve(tiny_config(tmp_path, method="galore", **changes), devices=8)
  assert sentence in str(caught.value)


@pytest.mark.parametrize("rank", [1, 16])
def test_a_valid_config_is_accepted(tmp_path, rank):
  config = resolved(tmp_path, method="galore", rank=rank)
  assert (config.learning_rate, config.min_lr_ratio) == (1e-2, 0.1)


def test_the_cosine_ends_at_a_tenth_of_the_peak(tmp_path):
  method = galore.build(resolved(tmp_path, method="galore"))  # 2 of 12 steps are the warm-up
  np.testing.assert_allclose([method.schedule(t) for t in (0, 1, 2, 7, 12)], [0, 5e-3, 1e-2, 5.5e-3, 1e-3], rtol=1e-6)


def test_the_description_counts_the_refreshes(tmp_path):
  lines = lambda **changes: galore.describe(resolved(tmp_path, method="galore", **changes))
  assert ": 1, one every 200 steps" in lines()[0]
  assert ": 3, one every 5 steps" in lines(galore__refresh_every=5)[0]
  assert ": 2, one every 5 steps" in lines(galore__refresh_every=5, warm_start_steps=2)[0]


def test_failed_decompositions_are_reported(monkeypatch):
  """The kernels of the 2 layers are not updated; the other parameters are."""
  svd = jnp.linalg.svd
  monkeypatch.setattr(jnp.linalg, "svd", lambda *args, **kwargs: [x * jnp.nan for x in svd(*args, **kwargs)])
  config = small_model.config("galore")
  state = small_model.first_state(config, 1)
  before = host(state.params)
  state, report = small_model.step(config, 1)(state, small_model.shard_batch(small_model.rows(config, 0), 1))
  assert report["svd_failed"] == 4 and report["skipped"] == 0
  kernels = lambda params: [params["blocks"][name]["kernel"] for name in ("up", "down")]
  assert same_bits(kernels(state.params), kernels(before)) and not same_bits(state.params["embed"], before["embed"])
