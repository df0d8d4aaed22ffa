"""Invalid configs raise an error with its remedy, before anything is built; defaults are filled in."""

import pytest
from tiny import tiny_config

from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.runs.directory import differences

MISTAKES = {
  "late warm start": (
    dict(method="lora", warm_start_steps=10),
    "warm_start_steps (=10) leaves 2 of 12 steps, in which the learning rate would only warm up (warmup_steps = 2)",
  ),
  "unknown method": (dict(method="loar"), "method (='loar') must be one of full, lora, switchlora"),
  "rank 0": (dict(rank=0), "rank (=0) must be at least 1"),
  "rank 1": (dict(rank=1), "rank (=1) cannot switch"),
  "no spares": (dict(rank=16), "rank (=16) leaves no spare vectors in any layer (min(in, out) = 16)"),
  "heads": (dict(model__num_heads=3), "model.num_heads (=3) must divide model.hidden_size (=16)"),
  "odd head": (
    dict(model__num_heads=16),
    "(model.hidden_size / model.num_heads = 16 / 16 = 1) must be even",
  ),
  "head size": (dict(model__head_dim=5), "model.head_dim (=5) must be a positive even integer"),
  "heads of keys": (dict(model__num_kv_heads=3), "model.num_kv_heads (=3) must be a divisor of model.num_heads (=2)"),
  "epsilon": (dict(model__norm_eps=0.0), "model.norm_eps (=0) must lie between 0 and 1"),
  "positions": (dict(model__max_position=15), "seq_len (=16) must be at most model.max_position (=15)"),
  "rotary base": (dict(model__rope__base=1.0), "model.rope.base (=1) must be greater than 1"),
  "scaling": (
    dict(model__rope__scaling="ntk"),
    "model.rope.scaling (='ntk') must be one of none, linear, dynamic",
  ),
  "unused factor": (
    dict(model__rope__factor=2.0),
    "model.rope.factor (=2.0) is not used with model.rope.scaling=none; leave it at 1.0, or set --config.model.rope.s",
  ),
  "unused length": (
    dict(model__rope__scaling="linear", model__rope__original_length=8),
    "model.rope.original_length (=8) is not used with model.rope.scaling=linear; leave it at 0, or set --config.model",
  ),
  "attention factor": (
    dict(model__rope__scaling="yarn", model__rope__original_length=8, model__rope__attention_factor=-1.0),
    "model.rope.attention_factor (=-1) must be greater than 0",
  ),
  "small heads": (
    dict(model__rope__scaling="dynamic", model__rope__original_length=8, model__head_dim=2),
    "the size of a head (=2) must be at least 4 with model.rope.scaling=dynamic",
  ),
  "factor": (
    dict(model__rope__scaling="linear", model__rope__factor=0.5),
    "model.rope.factor (=0.5) must be at least 1",
  ),
  "original positions": (
    dict(model__rope__scaling="yarn", model__rope__factor=2.0),
    "model.rope.original_length (=0) must be the number of positions of the original training with model.rope.",
  ),
  "llama3 factors": (
    dict(model__rope__scaling="llama3", model__rope__original_length=8, model__rope__low_freq_factor=4.0),
    "model.rope.low_freq_factor (=4) must be greater than 0 and less than model.rope.high_freq_factor (=4)",
  ),
  "yarn factors": (
    dict(model__rope__scaling="yarn", model__rope__original_length=8, model__rope__beta_slow=40.0),
    "model.rope.beta_slow (=40) must be greater than 0 and less than model.rope.beta_fast (=32)",
  ),
  "interval": (dict(switch__interval=9, switch__freeze_steps=5), "switch.interval (=9) must be 0 (never switch) or"),
  "negative interval": (dict(switch__interval=-1), "must not be negative"),
  "decay": (dict(switch__decay_to=0.0), "switch.decay_to (=0.0) must lie between 0 and 1"),
  "batch": (dict(batch_size=12), "batch_size (=12) must be a multiple of devices × accumulation (=8 × 1)"),
  "accumulation": (dict(accumulation=2), "(=8 × 2); try --config.batch_size=16"),
  "seed": (dict(seed=-1), "seed (=-1) must not be negative"),
  "trace": (dict(profile_steps=-1), "profile_steps (=-1) must not be negative"),
  "hang": (dict(hang_seconds=-1.0), "hang_seconds (=-1.0) must be greater than 0, or 0 for never"),
  "steps": (dict(steps=0), "steps (=0) must be greater than 0"),
  "warm-up": (dict(warmup_steps=12), "warmup_steps (=12) must be at least 0 and less than steps (=12)"),
  "warm start's warm-up": (
    dict(warm_start_warmup_steps=12),
    "warm_start_warmup_steps (=12) must be at least 0 and less than steps (=12); set --config.warm_start_warmup_steps",
  ),
  "negative warm-up": (dict(warm_start_warmup_steps=-1), "warm_start_warmup_steps (=-1) must be at least 0"),
  "learning rate": (dict(learning_rate=0.0), "learning_rate (=0.0) must be greater than 0"),
  "dtype": (dict(dtype="float8"), "dtype (='float8') must be one of float32, bfloat16, float64"),
  "remat": (dict(remat="half"), "remat (='half') must be one of none, linear, full; set --config.remat"),
  "frozen dtype": (
    dict(frozen_dtype="int4"),
    "frozen_dtype (='int4') must be one of float32, bfloat16, float64, int8",
  ),
  "int8 masters": (dict(param_dtype="int8"), "param_dtype (='int8') must be one of float32, bfloat16, float64; set"),
  "int8 under bfloat16": (
    dict(param_dtype="bfloat16", frozen_dtype="int8"),
    "frozen_dtype (='int8') needs param_dtype=float32, found 'bfloat16'; set --config.param_dtype or",
  ),
  "frozen under float64": (
    dict(param_dtype="float64", frozen_dtype="bfloat16"),
    "frozen_dtype (='bfloat16') must be the same as param_dtype (='float64'), or one of the two",
  ),
  "frozen above float32": (
    dict(frozen_dtype="float64"),
    "frozen_dtype (='float64') must be the same as param_dtype (='float32'), or one of the two",
  ),
  "fsdp": (
    dict(sharding__fsdp=3),
    "sharding.fsdp (=3) must divide the number of devices (=8) and model.hidden_size (=16); set --config.sharding",
  ),
  "nothing split": (
    dict(sharding__frozen="sharded"),
    "sharding.frozen (='sharded') splits nothing while sharding.fsdp is 1; set --config.sharding.fsdp as well",
  ),
  "placement": (
    dict(sharding__candidates="disk"),
    "sharding.candidates (='disk') must be one of sharded, replicated, host; set --config.sharding.candidates",
  ),
  "candidates dtype": (
    dict(param_dtype="float64", candidates_dtype="bfloat16"),
    "candidates_dtype (='bfloat16') must be the same as param_dtype (='float64'), or one of the two",
  ),
  "spike action": (dict(spike__action="stop"), "spike.action (='stop') must be one of report, skip, rollback; set"),
  "spike window": (dict(spike__window=1), "spike.window (=1) must be at least 2, to define a deviation; set"),
  "spike threshold": (dict(spike__threshold=0.0), "spike.threshold (=0.0) must be greater than 0"),
  "rollbacks": (dict(spike__max_rollbacks=0), "spike.max_rollbacks (=0) must be at least 1; set"),
  "nothing frozen": (
    dict(method="full", frozen_dtype="bfloat16"),
    "frozen_dtype (='bfloat16') applies to the frozen kernels of layers with adapters, but --config.method=full",
  ),
  "nothing frozen either": (
    dict(method="galore", frozen_dtype="bfloat16"),
    "--config.method=galore has no frozen kernels",
  ),
  "rate is no number": (dict(learning_rate=float("nan")), "learning_rate (=nan) must be a finite number; set"),
  "rate without bounds": (
    dict(warm_start_learning_rate=float("inf")),
    "warm_start_learning_rate (=inf) must be a finite",
  ),
  "no clipping": (dict(clip_norm=float("nan")), "clip_norm (=nan) must be a finite number; set --config.clip_norm"),
  "what another method uses": (dict(galore__scale=float("nan")), "galore.scale (=nan) must be a finite number"),
  "steps beyond 32 bits": (dict(steps=2**31), "steps (=2147483648) must lie between ±2147483647; set --config.steps"),
  "seed beyond 32 bits": (dict(seed=-(10**30)), "must lie between ±2147483647; set --config.seed"),
  "huge odd head": (dict(model__hidden_size=2**31 - 1), "must divide model.hidden_size (=2147483647); try --config"),
  "init": (dict(switch__init="kaiming"), "switch.init (='kaiming') must be one of switchlora, lora"),
  "short rows": (dict(seq_len=1), "seq_len (=1) must be at least 2"),
  "candidates": (dict(switch__candidates="new"), "switch.candidates (='new') must be stored (evicted vectors are kept"),
  "order of fresh ones": (
    dict(switch__candidates="fresh", switch__order="random"),
    "switch.order is a setting of stored candidates, and switch.candidates=fresh stores none; leave out --config.sw",
  ),
  "place of fresh ones": (
    dict(switch__candidates="fresh", sharding__candidates="host"),
    "sharding.candidates is a setting of stored candidates",
  ),
  "dtype of fresh ones": (
    dict(switch__candidates="fresh", candidates_dtype="bfloat16"),
    "candidates_dtype is a setting of stored candidates",
  ),
  "order": (dict(switch__order="shuffled"), "switch.order (='shuffled') must be one of sequential, random; set"),
  "switching decay": (
    dict(switch__decay="linear"),
    "switch.decay (='linear') must be one of exponential, learning_rate",
  ),
  "state": (dict(switch__state="drop"), "switch.state (='drop') must be one of reset, keep, transport; set --config"),
  "slots": (
    dict(switch__slots="oldest"),
    "switch.slots (='oldest') must be one of sequential, snr; set --config.switch",
  ),
  "age": (dict(switch__min_age=-1), "switch.min_age (=-1) must not be negative, and switch.snr_below (=1.0) must be"),
  "noise": (dict(switch__snr_below=0.0), "switch.snr_below (=0.0) must be greater than 0; set --config.switch.min_age"),
  "transport of zeros": (
    dict(switch__state="transport", switch__init="lora"),
    "switch.state=transport cannot be combined with switch.init=lora, which sets B and its candidates to zero; set",
  ),
  "negative start": (dict(switch__start=-1), "switch.start (=-1) must be at least 0 and less than steps (="),
  "late start": (dict(switch__start=100), "switch.start (=100) must be at least 0 and less than steps (="),
  "negative ratio": (dict(min_lr_ratio=-0.1), "min_lr_ratio (=-0.1) must lie between 0 and 1; set --config.min_lr"),
  "large ratio": (dict(min_lr_ratio=1.5), "min_lr_ratio (=1.5) must lie between 0 and 1"),
  "negative warm start": (dict(warm_start_steps=-1), "warm_start_steps (=-1) must lie between 0 and steps (=12); set"),
  "long warm start": (dict(warm_start_steps=13), "warm_start_steps (=13) must lie between 0 and steps (=12)"),
  "warm start's rate": (
    dict(warm_start_learning_rate=0.0),
    "warm_start_learning_rate (=0.0) must be greater than 0; set --config.warm_start_learning_rate",
  ),
  "warm start of full": (dict(method="full", warm_start_steps=3), "warm_start_steps (=3) needs a low-rank --config.me"),
  "two warm starts": (
    dict(warm_start_steps=3, warm_start_from="runs/full"),
    "warm_start_steps (=3) and warm_start_from (='runs/full') exclude each other",
  ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_invalid_config_raises_an_error_with_a_remedy(tmp_path, name):
  changes, sentence = MISTAKES[name]
  with pytest.raises(UserError) as caught:
    resolve(tiny_config(tmp_path, **changes), devices=8)
  assert sentence in str(caught.value)


@pytest.mark.parametrize(
  "changes",
  [
    dict(),
    dict(method="lora", rank=1),
    dict(method="lora", rank=16),
    dict(method="full", rank=0),
    dict(switch__interval=0),
    dict(switch__interval=10, switch__freeze_steps=5),
    dict(
      switch__order="random",
      switch__state="transport",
      switch__decay="learning_rate",
      switch__start=1,
      switch__slots="snr",
    ),
    dict(switch__candidates="fresh", sharding__candidates="replicated"),
    dict(warm_start_steps=12),
    dict(warm_start_steps=2, warm_start_warmup_steps=11),
    dict(method="galore", warm_start_steps=5),
    dict(method="full", warm_start_from="runs/full"),
    dict(min_lr_ratio=0.0),
    dict(min_lr_ratio=1.0),
    dict(frozen_dtype="bfloat16"),
    dict(frozen_dtype="int8"),
    dict(switch__start=12, switch__interval=0),
    dict(param_dtype="bfloat16", frozen_dtype="float32"),
    dict(method="relora", frozen_dtype="bfloat16", rank=4, relora__restart_every=6, relora__restart_warmup_steps=1),
    dict(method="full", frozen_dtype="float32"),
    dict(method="sltrain", frozen_dtype="float32", sltrain__density=1.0, sltrain__restart_every=1),
    dict(method="factored", rank=16, factored__restart_every=0),
    dict(clip_norm=float("inf")),
    dict(eval_tokens=10**12, keep_checkpoints=10**12, steps=2**31 - 1),
  ],
)
def test_a_valid_config_is_accepted(tmp_path, changes):
  resolve(tiny_config(tmp_path, **changes), devices=8)


@pytest.mark.parametrize(
  ("method", "rate", "ratio"),
  [
    ("full", 1e-3, 0),
    ("lora", 1e-2, 0),
    ("switchlora", 2e-2, 0),
    ("relora", 1e-3, 0.1),
    ("galore", 1e-2, 0.1),
    ("fira", 1e-2, 0.1),
    ("apollo", 1e-2, 0.1),
    ("apollo_mini", 1e-2, 0.1),
    ("frugal", 1e-3, 0.1),
    ("ldadam", 1e-3, 0.1),
    ("sltrain", 3e-3, 0.1),
    ("factored", 1.5e-3, 0.1),
  ],
)
def test_learning_rate_and_final_ratio_default_to_those_of_the_papers(tmp_path, method, rate, ratio):
  config = resolve(tiny_config(tmp_path, method=method), 8)
  assert (config.learning_rate, config.min_lr_ratio) == (rate, ratio)
  config = resolve(tiny_config(tmp_path, method=method, learning_rate=0.5, min_lr_ratio=0.25), 8)
  assert (config.learning_rate, config.min_lr_ratio) == (0.5, 0.25)


def test_the_warm_up_of_a_warm_start_defaults_to_that_of_the_run(tmp_path):
  found = [resolve(tiny_config(tmp_path, warm_start_warmup_steps=n), 8).warm_start_warmup_steps for n in (None, 0, 5)]
  assert found == [2, 0, 5]


def test_gpus_compute_in_bfloat16_by_default(tmp_path):
  computed = lambda platform, **changes: resolve(tiny_config(tmp_path, **changes), 8, platform).dtype
  assert (computed("gpu"), computed("cpu"), computed("tpu")) == ("bfloat16", "float32", "float32")
  assert resolve(tiny_config(tmp_path), 8).dtype == "float32"
  assert (computed("gpu", dtype="float32"), computed("cpu", dtype="bfloat16")) == ("float32", "bfloat16")
  assert resolve(tiny_config(tmp_path), 8, "gpu").param_dtype == "float32", "whatever is computed in"


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float64"])
def test_frozen_dtype_defaults_to_param_dtype(tmp_path, stored):
  assert resolve(tiny_config(tmp_path, param_dtype=stored), 8).frozen_dtype == stored
  assert resolve(tiny_config(tmp_path, frozen_dtype="bfloat16"), 8).frozen_dtype == "bfloat16"


def test_the_given_config_is_not_changed(tmp_path):
  config = tiny_config(tmp_path)
  before = config.to_dict()
  resolve(config, 8)
  assert config.to_dict() == before


def test_differences_name_the_changed_keys(tmp_path):
  old = resolve(tiny_config(tmp_path), 8).to_dict()
  new = resolve(tiny_config(tmp_path, rank=6, switch__interval=4, eval_every=7), 8).to_dict()
  assert differences(old, new) == ["rank: 4 → 6", "switch.interval: 2 → 4"]
  assert differences(old, old) == []
