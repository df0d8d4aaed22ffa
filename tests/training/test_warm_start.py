"""Warm starts: what the hand-over keeps and initialises, and resuming before and after it."""

import functools
import json
import re
import shutil
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import short_runs
import small_model
from flax.traverse_util import flatten_dict
from short_runs import SHAPE, STEPS, lines, logits, refused, train
from small_model import host, same_bits
from sparse_kernels import low_rank_beside_support
from stages import slowly
from tiny import resolved

from switchlora_jax.methods import LOW_RANK, METHODS
from switchlora_jax.models import weights
from switchlora_jax.training import phases, warm_start

pytestmark = [pytest.mark.user_flags, pytest.mark.two_linear_layers]

K = 5  # steps of the full-rank phase


@pytest.fixture(scope="module")
def runs(folder):
  """Maps a method to its run, which saves every step. All but `full` have a full-rank phase of K steps."""
  phase = lambda method: {} if method == "full" else PHASE
  return functools.cache(lambda method: train(folder, method, method=method, checkpoint_every=1, **phase(method)))


PHASE = dict(warm_start_steps=K)
METHODS_WITH_PHASES = (*LOW_RANK, "apollo_mini")
APPROXIMATE = ("sltrain", "factored")  # without base kernels; see the test that compares them with NumPy
each = pytest.mark.parametrize("method", slowly(METHODS_WITH_PHASES, quick=["switchlora"]))


# --- within a run: the hand-over -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "method", slowly([m for m in METHODS_WITH_PHASES if m not in APPROXIMATE], quick=["switchlora"])
)
def test_the_hand_over_keeps_the_logits(runs, method):
  """Kernels are below 1 and are rounded twice by 2⁻²⁴: as W - s·BA and in the sum. Logits are below 1."""
  ((before, full), (after, low)), *more = runs(method).handed
  assert not more and (full.scale, low.start) == (None, K)
  expected = logits(full, before, runs(method))
  np.testing.assert_allclose(logits(low, after, runs(method)), expected, rtol=0, atol=2e-6)
  assert np.abs(logits(full, host(full.create()), runs(method)) - expected).max() > 1e-3, (
    "the state must have been trained"
  )


@each
def test_the_optimizer_state_is_initialised_and_other_parameters_are_kept(runs, method):
  ((before, _), (after, _)), *_ = runs(method).handed
  assert any(np.any(leaf) for leaf in jax.tree.leaves(before.opt_state))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(after.opt_state))
  for part in ("embed", "norm", "head"):
    assert same_bits(after.params[part], before.params[part])
  assert (after.step, after.skipped, after.skipped_in_a_row) == (K, 0, 0)


def test_adapters_and_candidates_are_those_of_a_run_without_a_warm_start(runs):
  _, (after, low) = runs("switchlora").handed[0]
  fresh = host(low.create())
  vectors = lambda state: [layer for path, layer in sorted(flatten_dict(state.params).items()) if "lora" in path[-1]]
  assert len(vectors(after)) == 4 and same_bits(vectors(after), vectors(fresh))
  assert after.candidates and same_bits(after.candidates, fresh.candidates)
  assert same_bits(after.opt_state, fresh.opt_state)
  assert not same_bits(after.frozen, fresh.frozen)


def test_counters_of_skipped_steps_are_kept(runs):
  ((before, full), (_, low)), *_ = runs("switchlora").handed
  spikes = before.spikes._replace(rollbacks=np.int32(1), offset=np.int32(4))
  counted = before._replace(skipped=np.int32(3), skipped_in_a_row=np.int32(2), spikes=spikes)
  after = warm_start.hand_over(counted, full, low)
  assert (after.step, after.skipped, after.skipped_in_a_row) == (K, 3, 2)
  assert same_bits(after.spikes, spikes)


@pytest.mark.slow
@pytest.mark.parametrize("method", APPROXIMATE)
def test_layers_without_base_kernels_store_the_best_approximation_and_log_its_error(folder, runs, method, caplog):
  """The error by NumPy's decomposition of each kernel; embedding, norms and head are kept."""
  run = train(folder, f"{method}-approximated", method=method, checkpoint_every=STEPS, **PHASE)
  ((before, _), (after, low)), *more = run.handed
  assert not more
  plain, stored = before.params["blocks"], weights.merged(after.params, after.frozen, low.scale)["blocks"]
  error = total = 0
  for name in ("up", "down"):
    for layer, kernel in enumerate(plain[name]["kernel"]):
      found = np.asarray(stored[name]["kernel"])[layer]
      support = after.frozen["blocks"][name]["sparse_support"][layer] if method == "sltrain" else np.array([], int)
      expected = low_rank_beside_support(kernel, support, 4, 30 if method == "sltrain" else 0)
      kept = np.isclose(found, kernel, rtol=0, atol=1e-6)
      np.testing.assert_allclose(found[~kept], expected[~kept], rtol=0, atol=1e-6)
      assert kept.sum() >= (round(0.03 * kernel.size) if method == "sltrain" else 0)
      error, total = error + np.sum((kernel - found) ** 2), total + np.sum(kernel**2)
  assert f"approximated, with a relative error of {(error / total) ** 0.5:.3g}" in caplog.text
  for part in ("embed", "norm", "head"):
    assert same_bits(after.params[part], before.params[part])
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(after.opt_state))


@pytest.mark.slow
@pytest.mark.parametrize("method", APPROXIMATE)
def test_no_approximation_is_logged_if_the_kernels_are_kept(method, caplog):
  """The kernels have the rank and the support of the layers that store them; float32 rounds them."""
  phase = small_model.phase(small_model.config(method, rank=2), 1)
  rng = np.random.default_rng(0)
  state = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), host(phase.create()).params)
  state = host(phase.create())._replace(params=state)
  after = warm_start.hand_over(state, phase, phase)
  kernels = [weights.merged(x.params, x.frozen, phase.scale)["blocks"]["up"]["kernel"] for x in (state, after)]
  np.testing.assert_allclose(*kernels, rtol=0, atol=1e-4)
  assert "approximated" not in caplog.text and not same_bits(*(host(x).params["blocks"] for x in (state, after)))


# --- within a run: steps and data ---------------------------------------------------------------------------------


@each
def test_the_first_steps_are_those_of_a_full_rank_run(runs, method):
  """They have the full method's learning rate over the same horizon; later steps differ."""
  ours, full = lines(runs(method)), lines(runs("full"))
  assert ours[:K] == full[:K] and ours[K + 2]["loss"] != full[K + 2]["loss"]
  assert max(line["learning_rate"] for line in full) == np.float32(1e-3)
  for t in range(1, K + 1):
    assert same_bits(runs(method).saved[t], runs("full").saved[t])


@each
def test_data_do_not_depend_on_a_warm_start(runs, method):
  ours, full = runs(method).batches, runs("full").batches
  assert [step for _, step, _ in ours] == list(range(STEPS)) and same_bits(ours, full)


@each
def test_the_learning_rate_warms_up_again(runs, method):
  """From 0 within 2 steps, as at the start of the run. ReLoRA also restarts at step 8."""
  rates = [line["learning_rate"] for line in lines(runs(method))]
  assert rates[0] == rates[K] == 0 < rates[K + 1] < rates[K + 2]
  np.testing.assert_allclose(rates[K + 1], rates[K + 2] / 2, rtol=1e-5)
  assert min(rates[1:K]) > 0 and [t for t in range(K + 1, STEPS) if rates[t] == 0] == [8] * (method == "relora")
  own, ratio = METHODS[method].LEARNING_RATE, METHODS[method].MIN_LR_RATIO
  half = ratio + (1 - ratio) / 2  # step 7 is in the middle of the cosine, from step 2 to 12
  np.testing.assert_allclose(rates[K + 2], half * own, rtol=1e-5, err_msg="the method must use its own rate")


@pytest.mark.slow
def test_the_full_rank_phase_does_not_depend_on_the_warm_up_of_the_method(folder, runs):
  """The method's own warm-up, here 0 steps, applies only after the hand-over."""
  run = train(
    folder, "no-warm-up", method="lora", warmup_steps=0, warm_start_warmup_steps=2, checkpoint_every=K, **PHASE
  )
  assert lines(run)[:K] == lines(runs("full"))[:K] and same_bits(run.saved[K], runs("full").saved[K])
  rates = [line["learning_rate"] for line in lines(run)]
  assert rates[0] == 0 and rates[K] == max(rates[K:]) > rates[2] == max(rates[:K])


def adam_direction(state, method):
  """Adam's direction for the head, from the moments after the step. The head has no LoRA vectors or projection."""
  adam, (b1, b2, eps) = state.opt_state, METHODS[method].ACCEPTED["adam"]
  count = adam.count["head"]["kernel"] if isinstance(adam.count, dict) else adam.count
  m, v = (np.asarray(moment["head"]["kernel"], np.float64) for moment in (adam.mu, adam.nu))
  if method in ("galore", "fira", "frugal", "apollo", "apollo_mini"):  # these add eps to the uncorrected √v
    return m / (np.sqrt(v) + eps) * np.sqrt(1 - b2**count) / (1 - b1**count)
  return m / (1 - b1**count) / (np.sqrt(v / (1 - b2**count)) + eps)


@each
def test_the_logged_learning_rate_is_the_applied_one(runs, method):
  """Measured as the change of the head divided by Adam's direction."""
  run, used = runs(method), [0.0]  # the first is 0; the state before it is not saved
  for t in range(2, STEPS + 1):
    before, after = run.handed[0][1][0] if t == K + 1 else run.saved[t - 1], run.saved[t]
    moved = np.asarray(after.params["head"]["kernel"], np.float64) - before.params["head"]["kernel"]
    direction = adam_direction(after, method if t > K else "full")
    used.append(-np.vdot(direction, moved) / np.vdot(direction, direction))
  logged = [line["learning_rate"] for line in lines(run)]
  np.testing.assert_allclose(used, logged, rtol=1e-3, atol=1e-9)


@each
def test_a_warm_start_as_long_as_the_run_is_full_rank(folder, runs, method):
  run = train(folder, f"{method}-never", method=method, warm_start_steps=STEPS)
  for kind in ("loss", "val_loss"):
    assert lines(run, kind) == lines(runs("full"), kind)
  assert same_bits(run.outcome.state, runs("full").outcome.state) and not run.handed
  assert not same_bits(runs(method).outcome.state.params["head"], runs("full").outcome.state.params["head"])


@each
def test_evaluations_use_the_scale_of_their_phase(runs, method):
  """The effective rank compares with the weights of the first phase, which has no adapters."""
  low = runs(method).outcome.phase
  evaluations = lines(runs(method), "val_loss")
  assert [line["step"] for line in evaluations] == [4, 8, 12]
  assert [line["learnt_rank"] for line in evaluations] == [0, low.scale or 0, low.scale or 0]
  assert evaluations[0] == lines(runs("full"), "val_loss")[0]
  assert evaluations[2]["val_loss"] < evaluations[1]["val_loss"] < evaluations[0]["val_loss"]


# --- within a run: stopped and continued --------------------------------------------------------------------------


def continued(folder, uninterrupted, method, step):
  """Continues a copy of a run as if killed right after a checkpoint. Its metrics.jsonl has later steps."""
  workdir = folder / f"{method}-{step}"
  shutil.copytree(uninterrupted.workdir, workdir, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
  for kept in (step - 1, step):
    shutil.copytree(uninterrupted.workdir / "checkpoints" / str(kept), workdir / "checkpoints" / str(kept))
  return train(folder, workdir.name, method=method, **PHASE)


@each
@pytest.mark.parametrize("step", [K - 1, K, K + 1])
def test_a_stopped_run_continues_bitwise(folder, runs, method, step):
  """Before, at and after the hand-over."""
  uninterrupted = runs(method)
  again = continued(folder, uninterrupted, method, step)
  assert again.outcome.first_step == step and len(again.handed) == (step <= K)
  for kind in ("loss", "val_loss"):
    assert lines(again, kind) == lines(uninterrupted, kind)
  assert same_bits(again.outcome.state, uninterrupted.outcome.state)


@each
def test_steps_compile_once_per_phase(runs, method):
  """Across all runs of this file, new and continued."""
  _, (_, low) = runs(method).handed[0]
  assert low.step._cache_size() == runs("full").outcome.phase.step._cache_size() == 1


# --- from another run ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(folder, runs):
  """{name: (directory, phase, newest state)} of a full-rank run, a LoRA run, and one still in its full-rank phase."""
  full, lora = runs("full"), runs("lora")
  half = folder / "half"
  shutil.copytree(lora.workdir, half, ignore=shutil.ignore_patterns("checkpoints"))
  shutil.copytree(lora.workdir / "checkpoints" / str(K - 1), half / "checkpoints" / str(K - 1))
  ends = {run.workdir.name: (run.workdir, run.outcome.phase, run.saved[STEPS]) for run in (full, lora)}
  return ends | {"half": (half, lora.handed[0][0][1], lora.saved[K - 1])}


FROM = [("full", "switchlora"), ("lora", "galore"), ("half", "galore")]


@pytest.mark.parametrize("case", slowly(FROM, quick=[("full", "switchlora"), ("half", "galore")]))
def test_the_initial_logits_are_those_of_the_other_run(folder, runs, sources, case):
  """Those of its newest checkpoint. Everything else is as at step 0."""
  source, method = case
  workdir, theirs, saved = sources[source]
  config = resolved(folder, devices=1, **SHAPE, method=method, warm_start_from=str(workdir))
  ours = phases.build_phase(config, small_model.mesh(1))
  state = warm_start.Source(config, ours, small_model.mesh(1)).state()
  expected = logits(theirs, saved, runs("full"))
  np.testing.assert_allclose(logits(ours, state, runs("full")), expected, rtol=0, atol=2e-6)
  kind = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kind(state) == kind(ours.abstract)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves((state.opt_state, state.step, state.skipped)))
  assert same_bits(state.candidates, host(ours.create()).candidates), (
    "they must be drawn from the seed, as after a full-rank phase"
  )


def test_weights_of_another_run_get_the_shardings_of_the_new_run(folder, runs, monkeypatch):
  """On eight devices with fsdp=4, a device receives only its shard. The weights are those on one device.

  The copy of each array on the host is freed before the next one is placed.
  """
  options = dict(SHAPE, method="lora", warm_start_from=str(runs("lora").workdir))
  shards, hosts, place = [], [], warm_start._place

  def recorded(mesh, array, spec):
    assert not any(host() is not None for host in hosts)
    hosts.append(weakref.ref(array))
    placed = place(mesh, array.copy(), spec)  # on CPUs, the array itself may become part of what is placed
    shards.append((array.size, placed.addressable_shards[0].data.size))
    return placed

  monkeypatch.setattr(warm_start, "_place", recorded)
  states = []
  for mesh, layout in (
    (small_model.mesh(1), dict(devices=1)),
    (small_model.mesh(8, fsdp=4), dict(sharding__fsdp=4, sharding__trained="sharded", sharding__frozen="sharded")),
  ):
    config = resolved(folder, **options | layout)
    phase = phases.build_phase(config, mesh)
    states.append(warm_start.Source(config, phase, mesh).state())
    kind = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)
    assert kind(states[-1]) == kind(phase.abstract)
  left, right = map(host, states)
  assert same_bits(left.params, right.params)
  for one, other in zip(*map(jax.tree.leaves, (left.frozen, right.frozen)), strict=True):
    np.testing.assert_allclose(
      one, other, rtol=0, atol=2**-22
    )  # kernels below 1; the rank is sharded, so its sums have another order
  alone, sharded = shards[: len(shards) // 2], shards[len(shards) // 2 :]
  assert all(shard == size for size, shard in alone) and all(4 * shard == size for size, shard in sharded)


def test_a_run_of_another_version_is_refused_with_the_missing_key(folder, runs, tmp_path):
  for name in ("config.json", "tokenizer.model", "checkpoints"):
    source = runs("lora").workdir / name
    (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
  saved = json.loads((tmp_path / "config.json").read_text())
  del saved["config"]["switch"]
  (tmp_path / "config.json").write_text(json.dumps(saved))
  refused(folder, tmp_path, f"the run in {tmp_path} was made by another version of the code: a key of its config is")


def test_a_run_from_another_run_starts_at_step_0(folder, runs):
  """It starts with the first batch and learning rate, has its own horizon, and resumes like any run."""
  source = runs("full")
  options = dict(method="full", warm_start_from=str(source.workdir))
  run = train(folder, "from-full", **options, checkpoint_every=1)
  assert run.outcome.first_step == 0 and same_bits(run.batches, source.batches)
  rates = [[line["learning_rate"] for line in lines(r)] for r in (run, source)]
  assert rates[0] == rates[1]
  losses = [[line["loss"] for line in lines(r)] for r in (run, source)]
  assert losses[0][0] < losses[1][0] - 0.1, "the source must have seen the first rows"
  assert same_bits(run.saved[1].params, source.saved[STEPS].params), "a learning rate of 0 must keep them"
  evaluations, theirs = lines(run, "val_loss"), lines(source, "val_loss")[-1]
  assert all("learnt_rank" not in line for line in evaluations)
  assert [line["step"] for line in evaluations] == [0, 4, 8, 12]
  assert evaluations[0]["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-6), "what it starts from"

  for later in range(8, STEPS + 1):
    shutil.rmtree(run.workdir / "checkpoints" / str(later))
  again = train(folder, "from-full", **options)
  assert again.outcome.first_step == 7 and same_bits(again.outcome.state, run.outcome.state)
  assert lines(again) == lines(run)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_keeps_its_dtype_and_continues_without_its_source(folder, runs, dtype):
  """The weights are cast. The other run is needed only until the first checkpoint."""
  others = {"bfloat16": "float32", "float32": "bfloat16"}[dtype]
  other = train(folder, f"other-than-{dtype}", method="full", param_dtype=others)
  options = dict(method="switchlora", param_dtype=dtype, warm_start_from=str(other.workdir), checkpoint_every=4)
  run = train(folder, f"cast-to-{dtype}", **options)
  floats = [
    leaf
    for leaf in jax.tree.leaves(run.outcome.state._replace(spikes=None))
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  assert len(floats) > 15 and {str(leaf.dtype) for leaf in floats} == {dtype}
  shutil.rmtree(run.workdir / "checkpoints" / str(STEPS))
  shutil.rmtree(other.workdir)
  assert same_bits(train(folder, f"cast-to-{dtype}", **options).outcome.state, run.outcome.state)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_run_with_narrow_kernels_resumes_bitwise_and_passes_on_its_residuals(folder, dtype, caplog):
  options = dict(method="switchlora", frozen_dtype=dtype, warm_start_steps=K, checkpoint_every=4)
  name = f"narrow-{dtype}"
  run = train(folder, name, **options)
  (error,) = re.findall(r"kernels of the warm start are approximated, with a relative error of ([\d.e-]+)", caplog.text)
  assert 1e-4 < float(error) < 5e-2
  (before, _), (after, phase_after) = run.handed[0]
  plain = weights.merged(after.params, after.frozen, phase_after.scale)
  for left, right in zip(jax.tree.leaves(plain), jax.tree.leaves(before.params), strict=True):
    np.testing.assert_allclose(left, right, rtol=0, atol=2**-16)  # kernels are below 1
  dtypes = {"bfloat16": {"bfloat16", "int8"}, "int8": {"int8", "float32"}}[dtype]
  assert {str(x.dtype) for x in jax.tree.leaves(run.outcome.state.frozen)} == dtypes
  shutil.rmtree(run.workdir / "checkpoints" / str(STEPS))
  assert same_bits(train(folder, name, **options).outcome.state, run.outcome.state)
  successor = train(folder, f"after-{name}", method="full", warm_start_from=str(run.workdir), checkpoint_every=1)
  ends = run.outcome.state
  plain = (weights.merged(ends.params, ends.frozen, run.outcome.phase.scale), successor.saved[1].params)
  for left, right in zip(*map(jax.tree.leaves, plain), strict=True):
    np.testing.assert_allclose(left, right, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_run_killed_during_its_first_save_starts_from_its_source_again(folder, runs):
  """An incomplete save is not a checkpoint. The run must not start from a random initialisation."""
  options = dict(method="full", warm_start_from=str(runs("full").workdir))
  uninterrupted = train(folder, "uninterrupted", **options)
  shutil.copytree(uninterrupted.workdir, folder / "cut", ignore=shutil.ignore_patterns("checkpoints"))
  (folder / "cut" / "checkpoints" / f"{STEPS}.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  again = train(folder, "cut", **options)
  assert same_bits(again.outcome.state, uninterrupted.outcome.state) and lines(again) == lines(uninterrupted)
  assert lines(again, "val_loss") == lines(uninterrupted, "val_loss"), "step 0 is evaluated once"


def test_a_damaged_checkpoint_of_the_source_is_not_moved(folder, runs, tmp_path, caplog):
  source = tmp_path / "source"
  shutil.copytree(runs("full").workdir, source)
  newest = source / "checkpoints" / str(STEPS)
  for part in newest.rglob("*"):
    if part.is_file() and part.stat().st_size > 1000:
      part.write_bytes(b"")
  train(folder, "from-damaged", method="full", warm_start_from=str(source))
  assert newest.is_dir() and not list(source.glob("damaged*"))
  assert f"checkpoint of step {STEPS} is damaged" in caplog.text and "an older one is used" in caplog.text


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_a_path_that_is_not_a_run_is_refused(folder, runs, tmp_path):
  named = lambda path: f"--config.warm_start_from: {path} must be the directory of a run"
  either = " that has saved a checkpoint, or a Hugging Face folder (config.json, model.safetensors); "
  refused(folder, tmp_path, named(tmp_path) + either + "it is neither")
  refused(folder, tmp_path / "nowhere", named(tmp_path / "nowhere") + either + "there is no such directory")
  shutil.copy(runs("full").workdir / "config.json", tmp_path)
  refused(folder, tmp_path, named(tmp_path) + ", with its config.json and tokenizer.model; they are not there; give")


def test_a_run_that_has_saved_nothing_is_refused(folder, runs, tmp_path):
  for name in ("config.json", "tokenizer.model"):
    shutil.copy(runs("full").workdir / name, tmp_path)
  refused(folder, tmp_path, f"the run in {tmp_path} has saved no checkpoint yet")


@pytest.mark.parametrize("source", ["full", "lora"])
def test_other_sizes_are_refused_with_an_array_and_the_flags_that_set_them(folder, runs, source):
  """Another number of heads is refused too: it changes the logits but no shape."""
  short_runs.check_sizes_are_refused(folder, runs(source).workdir)


def test_another_tokenizer_is_refused(folder, runs, tmp_path):
  other = tmp_path / "other"
  shutil.copytree(runs("full").workdir, other)
  (other / "tokenizer.model").write_bytes(b"other pieces")
  refused(folder, other, f"trained with another tokenizer than this run would be; pass --config.data.tokenizer={other}")
