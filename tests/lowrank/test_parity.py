"""Whole runs against the authors' code: switched layers, and tiny LLaMAs through the real train step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_model

from switchlora_jax.lowrank.layers import lora_vectors, merge, merged_dense
from switchlora_jax.lowrank.optimizer import clip_by_global_norm, vector_adam
from switchlora_jax.lowrank.switching import SwitchSchedule, switch
from switchlora_jax.methods.schedules import cosine_schedule
from switchlora_jax.models.loss import mean_loss, row_losses
from switchlora_jax.parallel.sharding import replicated

pytestmark = pytest.mark.user_flags

# --- switched layers, state by state ------------------------------------------------------------------------------

TRAJECTORIES = [
  "traj_lin_N5_step64",
  "traj_lin_origin_step64",
  "traj_lin_r8_multi_step64",
  "traj_lin_wide_step64",
  "traj_mlp2_clip_cos_step64",
]


def first_state(arrays, meta):
  """Parameters, base kernels and candidates before step 0, a layer each name."""
  params, frozen, candidates = {}, {}, {}
  for name in meta["config"]["layers"]:
    of = lambda key, name=name: jnp.asarray(arrays[f"{name}/{key}"][0])
    spares = arrays[f"{name}/candA"].shape[1] - of("A").shape[0]
    timer = jnp.zeros(of("A").shape[0], jnp.int32)
    params[name] = {"lora_a": of("A"), "lora_b": of("B").T}
    if f"other/{name}_bias" in arrays:
      params[name]["bias"] = jnp.asarray(arrays[f"other/{name}_bias"][0])
    frozen[name] = {"kernel": of("W").T}
    candidates[name] = {"spare_a": of("candA")[:spares], "spare_b": of("candB")[:spares]}
    candidates[name] |= {"timer_a": timer, "timer_b": timer, "cursor": jnp.zeros((), jnp.int32)}
  return params, frozen, candidates


def train(arrays, meta):
  """The 60 steps from the recorded draws: states before each step and at the end, and (loss, norm, count) of each."""
  ref, names = meta["config"], meta["config"]["layers"]
  scale = ref["scaling"][0]
  point = ref["expect_switch_descend_step"] / ref["total_steps"]
  schedule = SwitchSchedule(ref["interval"], ref["N"], ref["total_steps"], point, decay_to=0.3)
  cosine = cosine_schedule(ref["lr"], ref["warmup"], ref["T"])
  tx = vector_adam(cosine if ref["scheduler"] == "cosine" else ref["lr"], vectors=lora_vectors)

  def loss_of(params, frozen, x, y):
    for name in names:
      layer = params[name]
      x = merged_dense(x, frozen[name]["kernel"], layer["lora_a"], layer["lora_b"], scale)
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

  state = first_state(arrays, meta)
  state = (*state, tx.init(state[0]))
  batches = (jnp.arange(ref["T"], dtype=jnp.int32), *(jnp.asarray(arrays[key]) for key in ("X", "Y", "u")))
  last, (states, *reports) = jax.jit(lambda state: jax.lax.scan(one, state, batches))(state)
  states = jax.tree.map(lambda before, end: np.concatenate([before, end[None]]), states, last)
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
      for key, side, turn in (("A", "lora_a", np.asarray), ("B", "lora_b", np.transpose)):
        np.testing.assert_allclose(turn(params[layer][side][t]), ref[key][row], **near)
        np.testing.assert_allclose(turn(adam.mu[layer][side][t]), ref[f"m{key}"][row], **near)
        np.testing.assert_allclose(turn(adam.nu[layer][side][t]), ref[f"v{key}"][row], **near)
        np.testing.assert_array_equal(adam.count[layer][side][t][:, 0], ref[f"step{key}"][row])
      if "bias" in params[layer]:
        for tree, suffix in ((params, ""), (adam.mu, "/m"), (adam.nu, "/v"), (adam.count, "/step")):
          np.testing.assert_allclose(tree[layer]["bias"][t], arrays[f"other/{layer}_bias{suffix}"][row], **near)
    kept = candidates[layer]
    for row, t in enumerate(meta["rows"]["candidates"]):
      ids = spare_ids(kept["cursor"][t], rank, total)
      for key, side in (("A", "a"), ("B", "b")):
        assert sorted(ids) == sorted(set(range(total)) - set(ref[f"sel{key}"][t])), "the spares are what no slot holds"
        np.testing.assert_allclose(kept[f"spare_{side}"][t], ref[f"cand{key}"][row][ids], **near)
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
  """(params, frozen) from the recorded weights {name: array}; where there are adapters the kernels are frozen."""
  stack = lambda kind, key, turn=np.asarray: jnp.stack(
    [jnp.asarray(turn(weights[f"model.layers.{layer}.{kind}.{key}"])) for layer in range(2)]
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
    "embed": {"embedding": jnp.asarray(weights["model.embed_tokens.weight"])},
    "blocks": blocks,
    "norm": {"scale": jnp.asarray(weights["model.norm.weight"])},
    "head": {"kernel": jnp.asarray(weights["lm_head.weight"].T)},
  }
  return params, {"blocks": frozen} if frozen else {}


def theirs(params):
  """The recorded names and orientation of our parameters or gradients."""
  named = {"model.embed_tokens.weight": params["embed"]["embedding"]}
  named |= {"model.norm.weight": params["norm"]["scale"], "lm_head.weight": params["head"]["kernel"].T}
  keys = {"kernel": "weight", "lora_a": "lora_A", "lora_b": "lora_B", "scale": "weight"}
  for kind, mine in (KINDS | NORMS).items():
    for key, stack in params["blocks"][mine].items():
      for layer, value in enumerate(stack):
        named[f"model.layers.{layer}.{kind}.{keys[key]}"] = value.T if key in ("kernel", "lora_b") else value
  return {name: np.asarray(value) for name, value in named.items()}


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
  model, ids = small_model.model(config(meta, "float32", method="full")), jnp.asarray(arrays["input_ids"], jnp.int32)
  np.testing.assert_allclose(model.apply({"params": params}, ids), arrays["logits"], rtol=0, atol=1e-5)
  np.testing.assert_allclose(row_losses(model, params, {}, ids).mean(), arrays["loss"], rtol=0, atol=1e-5)


def test_logits_loss_and_gradients_are_the_recorded_ones_in_float64(golden, x64):
  arrays, meta = golden("llama_forward")
  params = jax.tree.map(lambda w: w.astype(jnp.float64), ours(part(arrays, "w/"))[0])
  model, ids = small_model.model(config(meta, "float64", method="full")), jnp.asarray(arrays["input_ids"], jnp.int32)
  np.testing.assert_allclose(model.apply({"params": params}, ids), arrays["f64_logits"], rtol=0, atol=1e-12)
  loss, grads = jax.value_and_grad(lambda p: mean_loss(model, p, {}, ids))(params)
  np.testing.assert_allclose(loss, arrays["f64_loss"], rtol=0, atol=1e-12)
  grads, recorded = theirs(grads), part(arrays, "f64_g/")
  assert grads.keys() == recorded.keys()
  for name, ref in recorded.items():
    np.testing.assert_allclose(grads[name][:: 4 if ref.ndim > 1 else 1], ref, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("method, devices", [("full", 1), ("lora", 1), ("lora", 2)])
def test_25_updates_of_the_train_step_are_the_recorded_ones(method, devices, golden, x64):
  arrays, meta = golden(f"llama_{method}_f64")
  meta, near = meta["info"], dict(rtol=0, atol=1e-9)
  training = dict(steps=meta["T"], learning_rate=meta["lr"], warmup_steps=meta["warmup"], rank=meta["r"])
  training |= dict(accumulation=meta["accum"], clip_norm=meta["clip"], batch_size=4, seq_len=16)
  options = config(meta, "float64", method=method, **training)
  step, state = small_model.step(options, devices), small_model.first_state(options, devices)
  params, frozen = jax.device_put(ours(part(arrays, "init/")), replicated(small_model.mesh(devices)))
  assert jax.tree.map(jnp.shape, (params, frozen)) == jax.tree.map(jnp.shape, (state.params, state.frozen))
  state = state._replace(params=params, frozen=frozen)
  for t in range(meta["T"]):
    rows = arrays["ids"][t].reshape(4, 16)  # of two micro-batches
    state, metrics = step(state, small_model.shard_batch(rows, devices))
    np.testing.assert_allclose(metrics["loss"], arrays["loss"][t], **near)
    np.testing.assert_allclose(metrics["grad_norm"], arrays["grad_norm"][t], **near)
    np.testing.assert_allclose(metrics["learning_rate"], arrays["lr"][t], **near)
    for name, ref in part(arrays, f"after{t + 1}/").items():
      mine = theirs(state.params)[name]
      np.testing.assert_allclose(mine[:: 4 if ref.ndim > 1 else 1], ref, **near, err_msg=name)

  model, ids = small_model.model(options), jnp.asarray(arrays["eval_ids"], jnp.int32)
  np.testing.assert_allclose(row_losses(model, state.params, state.frozen, ids).mean(), arrays["eval_loss"], **near)
  for name, ref in part(arrays, "merged/").items():
    _, _, layer, kind = name.split(".", 3)
    adapter, kernel = (tree["blocks"][KINDS[kind]] for tree in (state.params, state.frozen))
    merged = merge(kernel["kernel"][int(layer)], adapter["lora_a"][int(layer)], adapter["lora_b"][int(layer)], 1 / 8)
    np.testing.assert_allclose(merged.T[::8], ref, **near, err_msg=name)
  assert step._cache_size() == 1, "all in float64, none compiled anew"
  assert {"after2/lm_head.weight", "after25/lm_head.weight"} <= arrays.keys()
