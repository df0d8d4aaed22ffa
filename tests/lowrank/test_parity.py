"""Complete runs compared with the authors' code: switched layers, and tiny LLaMAs in the real train step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_model

from switchlora_jax.lowrank.layers import lora_vectors, merge, merged_dense
from switchlora_jax.lowrank.optimizer import clip_by_global_norm, vector_adam
from switchlora_jax.lowrank.switching import SwitchSchedule, switch
from switchlora_jax.methods import METHODS
from switchlora_jax.methods.schedules import cosine_schedule
from switchlora_jax.models.loss import mean_loss, row_losses
from switchlora_jax.parallel.sharding import replicated
from switchlora_jax.training.anomalies import initial_spike_state

pytestmark = pytest.mark.user_flags

# --- switched layers, every state ---------------------------------------------------------------------------------

TRAJECTORIES = [
  "traj_lin_N5_step64",
  "traj_lin_origin_step64",
  "traj_lin_r8_multi_step64",
  "traj_lin_wide_step64",
  "traj_mlp2_clip_cos_step64",
]


def first_state(arrays, meta):
  """Parameters, base kernels and candidates before step 0, one layer per name."""
  params, frozen, candidates = {}, {}, {}
  for name in meta["config"]["layers"]:
    of = lambda key, name=name: arrays[f"{name}/{key}"][0]
    spares = arrays[f"{name}/candA"].shape[1] - of("A").shape[0]
    timer = np.zeros(of("A").shape[0], np.int32)
    params[name] = {"lora_a": of("A"), "lora_b": of("B").T}
    if f"other/{name}_bias" in arrays:
      params[name]["bias"] = arrays[f"other/{name}_bias"][0]
    frozen[name] = {"kernel": of("W").T}
    candidates[name] = {"spare_a": of("candA")[:spares], "spare_b": of("candB")[:spares]}
    candidates[name] |= {"timer_a": timer, "timer_b": timer, "cursor": np.zeros((), np.int32)}
  return params, frozen, candidates


def train(arrays, meta):
  """Runs the 60 steps with the recorded draws; returns all states, and the loss, norm and count of each step."""
  ref, names = meta["config"], meta["config"]["layers"]
  scale = ref["scaling"][0]
  point = ref["expect_switch_descend_step"] / ref["total_steps"]
  schedule = SwitchSchedule(ref["interval"], ref["N"], ref["total_steps"], point, decay_to=0.3)
  cosine = cosine_schedule(ref["lr"], ref["warmup"], ref["T"])
  tx = vector_adam(cosine if ref["scheduler"] == "cosine" else ref["lr"], vectors=lora_vectors)

  def loss_of(params, frozen, x, y):
    for name in names:
      layer = params[name]
      x = merged_dense(x, frozen[name], layer["lora_a"], layer["lora_b"], scale)
      x = x + layer["bias"][None] if "bias" in layer else x
      x = jnp.tanh(x) if name != names[-1] else x
    return jnp.mean((x - y) ** 2)

  def one(state, batch):
    params, frozen, candidates, opt_state = state
    step, x, y, uniforms = batch
    loss, grads = jax.value_and_grad(loss_of)(params, frozen, x, y)
    grads, norm = clip_by_global_norm(grads, ref["clip"] or jnp.inf)
    draws = {(name,): uniforms[index] for index, name in enumerate(names)}
    out = switch(params, frozen, candidates, schedule=schedule, scale=scale, step=step, uniforms=draws)
    updates, opt_state = tx.update(grads, opt_state, out.params, reset=out.reset, freeze=out.freeze)
    new_state = (optax.apply_updates(out.params, updates), out.frozen, out.candidates, opt_state)
    return new_state, (state, loss, norm, out.count)

  @jax.jit
  def run(state, batches):
    return jax.lax.scan(one, (*state, tx.init(state[0])), batches)

  batches = (np.arange(ref["T"], dtype=np.int32), *(arrays[key] for key in ("X", "Y", "u")))
  last, (states, *reports) = run(first_state(arrays, meta), batches)
  states = jax.tree.map(lambda before, end: np.concatenate([before, np.asarray(end)[None]]), states, last)
  return states, [np.asarray(report) for report in reports]


def spare_ids(loads, rank, candidates):
  """The candidate in each spare row after a number of loads: the k-th evicted one is (c - r + k) mod c."""
  ids = list(range(candidates - rank))
  for k in range(loads):
    ids[k % len(ids)] = (candidates - rank + k) % candidates
  return ids


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_a_switched_run_passes_through_the_recorded_states(name, golden, x64):
  arrays, meta = golden(name)
  (params, frozen, candidates, opt_state), (loss, norm, count) = train(arrays, meta)
  adam, near = opt_state[0], dict(rtol=0, atol=1e-10)
  np.testing.assert_allclose(loss, arrays["loss"], **near)
  np.testing.assert_allclose(norm, arrays["grad_norm"], **near)
  np.testing.assert_array_equal(count, arrays["num"].sum(-1))
  for layer in meta["config"]["layers"]:
    ref = {key.removeprefix(f"{layer}/"): value for key, value in arrays.items() if key.startswith(f"{layer}/")}
    rank, total = ref["A"].shape[1], ref["candA"].shape[1]
    for row, t in enumerate(meta["rows"]["states"]):
      np.testing.assert_allclose(frozen[layer]["kernel"][t].T, ref["W"][row], **near)
      for key, factor, orient in (("A", "lora_a", np.asarray), ("B", "lora_b", np.transpose)):
        np.testing.assert_allclose(orient(params[layer][factor][t]), ref[key][row], **near)
        np.testing.assert_allclose(orient(adam.mu[layer][factor][t]), ref[f"m{key}"][row], **near)
        np.testing.assert_allclose(orient(adam.nu[layer][factor][t]), ref[f"v{key}"][row], **near)
        np.testing.assert_array_equal(adam.count[layer][factor][t][:, 0], ref[f"step{key}"][row])
      if "bias" in params[layer]:
        for tree, suffix in ((params, ""), (adam.mu, "/m"), (adam.nu, "/v"), (adam.count, "/step")):
          np.testing.assert_allclose(tree[layer]["bias"][t], arrays[f"other/{layer}_bias{suffix}"][row], **near)
    kept = candidates[layer]
    for row, t in enumerate(meta["rows"]["candidates"]):
      ids = spare_ids(kept["cursor"][t], rank, total)
      for key, factor in (("A", "a"), ("B", "b")):
        assert sorted(ids) == sorted(set(range(total)) - set(ref[f"sel{key}"][t])), (
          "the spares are the candidates in no slot"
        )
        np.testing.assert_allclose(kept[f"spare_{factor}"][t], ref[f"cand{key}"][row][ids], **near)
    np.testing.assert_array_equal(kept["cursor"] % rank, ref["curA"])
    np.testing.assert_array_equal((kept["cursor"] + rank // 2) % rank, ref["curB"])
    np.testing.assert_array_equal(kept["timer_a"], ref["fixedA"])
    np.testing.assert_array_equal(kept["timer_b"], ref["fixedB"])
  assert count.sum() == sum(meta["config"]["switched_per_layer"])


# --- a tiny LLaMA -------------------------------------------------------------------------------------------------

KINDS = {
  "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
  "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
}  # fmt: skip
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def ours(weights):
  """(params, frozen) from the recorded weights {name: array}; kernels with adapters are frozen."""
  stack = lambda kind, key, orient=np.asarray: np.stack(
    [orient(weights[f"model.layers.{layer}.{kind}.{key}"]) for layer in range(2)]
  )
  blocks, frozen = {mine: {"scale": stack(theirs, "weight")} for theirs, mine in NORMS.items()}, {}
  for theirs, mine in KINDS.items():
    kernel = {"kernel": stack(theirs, "weight", np.transpose)}
    if f"model.layers.0.{theirs}.lora_A" in weights:
      frozen[mine] = kernel
      blocks[mine] = {"lora_a": stack(theirs, "lora_A"), "lora_b": stack(theirs, "lora_B", np.transpose)}
    else:
      blocks[mine] = kernel
  params = {
    "embed": {"embedding": weights["model.embed_tokens.weight"]},
    "blocks": blocks,
    "norm": {"scale": weights["model.norm.weight"]},
    "head": {"kernel": weights["lm_head.weight"].T},
  }
  return params, {"blocks": frozen} if frozen else {}


def theirs(params):
  """Our parameters or gradients with the recorded names and orientation."""
  params = jax.tree.map(np.asarray, params)
  named = {"model.embed_tokens.weight": params["embed"]["embedding"]}
  named |= {"model.norm.weight": params["norm"]["scale"], "lm_head.weight": params["head"]["kernel"].T}
  keys = {"kernel": "weight", "lora_a": "lora_A", "lora_b": "lora_B", "scale": "weight"}
  for kind, mine in (KINDS | NORMS).items():
    for key, stack in params["blocks"][mine].items():
      for layer, value in enumerate(stack):
        named[f"model.layers.{layer}.{kind}.{keys[key]}"] = value.T if key in ("kernel", "lora_b") else value
  return named


def part(arrays, prefix):
  return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def config(meta, dtype, **changes):
  """The config of a recorded LLaMA."""
  ref = meta["config"]
  shape = dict(model__vocab_size=ref["vocab_size"], model__hidden_size=ref["hidden_size"])
  shape |= dict(model__intermediate_size=ref["intermediate_size"], model__num_layers=ref["num_hidden_layers"])
  shape |= dict(model__num_heads=ref["num_attention_heads"])
  return small_model.config(**shape, dtype=dtype, param_dtype=dtype, **changes)


def test_logits_are_the_recorded_ones_in_float32(golden):
  arrays, meta = golden("llama_forward")
  params, _ = ours(part(arrays, "w/"))
  model, ids = small_model.model(config(meta, "float32", method="full")), np.asarray(arrays["input_ids"], np.int32)
  logits, losses = jax.jit(lambda p: (model.apply({"params": p}, ids), row_losses(model, p, {}, ids)))(params)
  np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=1e-5)
  np.testing.assert_allclose(np.mean(losses), arrays["loss"], rtol=0, atol=1e-5)


def test_logits_loss_and_gradients_are_the_recorded_ones_in_float64(golden, x64):
  arrays, meta = golden("llama_forward")
  params = jax.tree.map(np.float64, ours(part(arrays, "w/"))[0])
  model, ids = small_model.model(config(meta, "float64", method="full")), np.asarray(arrays["input_ids"], np.int32)
  both = lambda p: (model.apply({"params": p}, ids), jax.value_and_grad(lambda p: mean_loss(model, p, {}, ids))(p))
  logits, (loss, grads) = jax.jit(both)(params)
  np.testing.assert_allclose(logits, arrays["f64_logits"], rtol=0, atol=1e-12)
  np.testing.assert_allclose(loss, arrays["f64_loss"], rtol=0, atol=1e-12)
  grads, recorded = theirs(grads), part(arrays, "f64_g/")
  assert grads.keys() == recorded.keys()
  for name, ref in recorded.items():
    np.testing.assert_allclose(grads[name][:: 4 if ref.ndim > 1 else 1], ref, rtol=0, atol=1e-12, err_msg=name)


def initial_state(options, devices, params, frozen):
  """The state before step 0 with these weights. `create` would compile the random initialisation, which is slow."""
  abstract, method = small_model.phase(options, devices).abstract, METHODS[options.method].build(options)
  assert jax.tree.map(jnp.shape, (params, frozen)) == jax.tree.map(jnp.shape, (abstract.params, abstract.frozen))
  state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)._replace(
    params=params,
    frozen=frozen,
    opt_state=jax.jit(method.optimizer.init)(params),
    spikes=initial_spike_state(options.spike.window),
  )
  return jax.device_put(state, replicated(small_model.mesh(devices)))


@pytest.mark.parametrize("method, devices", [("full", 1), ("lora", 1), ("lora", 2)])
def test_25_updates_of_the_train_step_are_the_recorded_ones(method, devices, golden, x64):
  arrays, meta = golden(f"llama_{method}_f64")
  meta, near = meta["info"], dict(rtol=0, atol=1e-9)
  training = dict(steps=meta["T"], learning_rate=meta["lr"], warmup_steps=meta["warmup"], rank=meta["r"])
  training |= dict(accumulation=meta["accum"], clip_norm=meta["clip"], batch_size=4, seq_len=16)
  options = config(meta, "float64", method=method, **training)
  step, state = small_model.step(options, devices), initial_state(options, devices, *ours(part(arrays, "init/")))
  for t in range(meta["T"]):
    rows = arrays["ids"][t].reshape(4, 16)  # two micro-batches
    state, metrics = step(state, small_model.shard_batch(rows, devices))
    np.testing.assert_allclose(metrics["loss"], arrays["loss"][t], **near)
    np.testing.assert_allclose(metrics["grad_norm"], arrays["grad_norm"][t], **near)
    np.testing.assert_allclose(metrics["learning_rate"], arrays["lr"][t], **near)
    if recorded := part(arrays, f"after{t + 1}/"):
      mine = theirs(state.params)
      for name, ref in recorded.items():
        np.testing.assert_allclose(mine[name][:: 4 if ref.ndim > 1 else 1], ref, **near, err_msg=name)

  model, ids = small_model.model(options), np.asarray(arrays["eval_ids"], np.int32)

  @jax.jit
  def evaluated(params, frozen):
    losses, kernels = row_losses(model, params, frozen, ids), {}
    for kind, layer in frozen.get("blocks", {}).items():
      adapter = params["blocks"][kind]
      kernels[kind] = merge(layer["kernel"], adapter["lora_a"], adapter["lora_b"], 1 / 8)
    return losses, kernels

  losses, kernels = jax.tree.map(np.asarray, evaluated(state.params, state.frozen))
  np.testing.assert_allclose(losses.mean(), arrays["eval_loss"], **near)
  for name, ref in part(arrays, "merged/").items():
    _, _, layer, kind = name.split(".", 3)
    np.testing.assert_allclose(kernels[KINDS[kind]][int(layer)].T[::8], ref, **near, err_msg=name)
  assert step._cache_size() == 1, "all steps share one compiled function"
  assert {"after2/lm_head.weight", "after25/lm_head.weight"} <= arrays.keys()
