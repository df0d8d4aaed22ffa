"""Resolve a config: check it and fill in defaults that depend on other keys.

The rest of the package only reads resolved configs. A section of the config is checked by the module that uses it: a
method checks its settings, and `training.anomalies` checks `spike`. This module checks the keys that all methods share.
"""

import math

from ml_collections import ConfigDict, FrozenConfigDict

from switchlora_jax.errors import UserError
from switchlora_jax.methods import METHODS, optimizers, schedules
from switchlora_jax.models.architecture import architecture_of, check_architecture
from switchlora_jax.models.llama import REMAT
from switchlora_jax.runs.directory import FREE, LAYOUT, flatten
from switchlora_jax.training import anomalies

POSITIVE = (
  "steps",
  "batch_size",
  "seq_len",
  "accumulation",
  "clip_norm",
  "eval_every",
  "eval_tokens",
  "checkpoint_every",
  "keep_checkpoints",
  "log_every",
  "max_skipped",
  *(f"model.{key}" for key in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")),
)
DTYPES = ("float32", "bfloat16", "float64")
INT8 = "int8"  # of base kernels, with a scale per row
# param_dtype with another dtype of kernels or spares
MIXED = (("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", INT8))

SHARDINGS = ("sharded", "replicated")
LARGEST = 2**31 - 1  # integers on a device and in shapes have 32 bits


def resolve(config: ConfigDict, devices: int, platform: str = "cpu") -> FrozenConfigDict:
  """Check the values of a config, also against the number of devices, and fill in its unset keys.

  Args:
    devices: number of devices of the run, over all processes.
    platform: the value of `jax.default_backend()` in the run. On "gpu", `dtype` defaults to bfloat16.
  Returns:
    The resolved config, which cannot be changed.
  Raises:
    UserError: a value is invalid; the message names the key, its value and what to set instead.
  """
  _check_ranges(config)
  _check_positive(config)
  check_architecture(config.model, config.seq_len)
  _check_training(config, devices)
  _check_sharding(config, devices)
  _check_precision(config)
  anomalies.check_spike_config(config.spike)
  if config.method not in METHODS:
    raise UserError(f"method (={config.method!r}) must be one of {', '.join(METHODS)}; set --config.method")
  method = METHODS[config.method]
  method.check(config)
  optimizers.check(config, method.ACCEPTED)
  schedules.check(config)
  _check_warm_start(config)
  return FrozenConfigDict(fill_defaults(config, platform))


def fill_defaults(config: ConfigDict, platform: str = "cpu") -> ConfigDict:
  """A copy of a valid config whose unset keys have the values that follow from its other keys."""
  config, method = config.copy_and_resolve_references(), METHODS[config.method]  # `copy` would share the placeholders
  if config.learning_rate is None:
    config.learning_rate = method.LEARNING_RATE
  if config.rest_learning_rate is None:
    config.rest_learning_rate = config.learning_rate
  if config.warm_start_learning_rate is None:
    config.warm_start_learning_rate = METHODS["full"].LEARNING_RATE
  if config.warm_start_rest_learning_rate is None:
    config.warm_start_rest_learning_rate = config.warm_start_learning_rate
  if config.warm_start_warmup_steps is None:
    config.warm_start_warmup_steps = config.warmup_steps
  if config.min_lr_ratio is None:
    config.min_lr_ratio = schedules.default_final_ratio(config, method.MIN_LR_RATIO)
  for key, default in method.ACCEPTED[config.optimizer.name]._asdict().items():
    if config.optimizer[key] is None:
      config.optimizer[key] = default
  if config.optimizer.moments_dtype is None:
    config.optimizer.moments_dtype = config.param_dtype
  if config.dtype is None:
    config.dtype = "bfloat16" if platform == "gpu" else "float32"
  for key in ("frozen_dtype", "candidates_dtype"):
    if config[key] is None:
      config[key] = config.param_dtype
  model = architecture_of(config.model)
  config.model.update(num_kv_heads=model.num_kv_heads, head_dim=model.head_dim)
  if config.model.max_position is None:
    config.model.max_position = config.seq_len
  return config


def _check_ranges(config):
  """Reject NaN, infinity (except for `clip_norm`, where it disables clipping) and integers beyond 32 bits."""
  beyond_32_bits = {*FREE, "eval_tokens"} - {*LAYOUT, "profile_steps"}
  for key, value in flatten(config).items():
    if isinstance(value, float) and not math.isfinite(value) and (key, value) != ("clip_norm", math.inf):
      raise UserError(f"{key} (={value}) must be a finite number; set --config.{key}")
    if isinstance(value, int) and abs(value) > LARGEST and key not in beyond_32_bits:
      raise UserError(f"{key} (={value}) must lie between ±{LARGEST}; set --config.{key}")


def _check_positive(config):
  flat = flatten(config)
  for key in POSITIVE:
    if not flat[key] > 0:
      raise UserError(f"{key} (={flat[key]}) must be greater than 0; set --config.{key}")


def _check_sharding(config, devices: int):
  fsdp, hidden = config.sharding.fsdp, config.model.hidden_size
  if fsdp < 1 or devices % fsdp or hidden % fsdp:
    raise UserError(
      f"sharding.fsdp (={fsdp}) must divide the number of devices (={devices}) and model.hidden_size (={hidden}); "
      f"set --config.sharding.fsdp"
    )
  if fsdp == 1 and config.sharding.frozen == "sharded":
    raise UserError(
      "sharding.frozen (='sharded') splits nothing while sharding.fsdp is 1; set --config.sharding.fsdp as well"
    )
  allowed = {**dict.fromkeys(("trained", "optimizer", "frozen"), SHARDINGS), "candidates": (*SHARDINGS, "host")}
  for key, values in allowed.items():
    if config.sharding[key] not in values:
      raise UserError(
        f"sharding.{key} (={config.sharding[key]!r}) must be one of {', '.join(values)}; set --config.sharding.{key}"
      )


def _check_training(config, devices: int):
  share = devices * config.accumulation
  if config.batch_size % share:
    below = config.batch_size // share * share
    options = " or ".join(str(n) for n in (below, below + share) if n)
    raise UserError(
      f"batch_size (={config.batch_size}) must be a multiple of devices × accumulation "
      f"(={devices} × {config.accumulation}); try --config.batch_size={options}"
    )
  if config.seq_len < 2:
    raise UserError(f"seq_len (={config.seq_len}) must be at least 2, to have a next token; set --config.seq_len")
  for key in ("warmup_steps", "warm_start_warmup_steps"):  # the schedules of both phases span all steps
    if config[key] is not None and not 0 <= config[key] < config.steps:
      raise UserError(
        f"{key} (={config[key]}) must be at least 0 and less than steps (={config.steps}); "
        f"set --config.{key} or --config.steps"
      )
  for key in (f"{phase}{which}learning_rate" for phase in ("", "warm_start_") for which in ("", "rest_")):
    if config[key] is not None and not config[key] > 0:
      raise UserError(f"{key} (={config[key]}) must be greater than 0; set --config.{key}")
  if config.min_lr_ratio is not None and not 0 <= config.min_lr_ratio <= 1:
    raise UserError(f"min_lr_ratio (={config.min_lr_ratio}) must lie between 0 and 1; set --config.min_lr_ratio")
  if config.hang_seconds < 0:
    raise UserError(
      f"hang_seconds (={config.hang_seconds}) must be greater than 0, or 0 for never; set --config.hang_seconds"
    )
  if config.profile_steps < 0:
    raise UserError(f"profile_steps (={config.profile_steps}) must not be negative; set --config.profile_steps")
  if config.seed < 0:
    raise UserError(f"seed (={config.seed}) must not be negative; set --config.seed")
  if config.remat not in REMAT:
    raise UserError(f"remat (={config.remat!r}) must be one of {', '.join(REMAT)}; set --config.remat")


def _check_precision(config):
  stored, narrow = config.param_dtype, ("frozen_dtype", "candidates_dtype")
  further = {"dtype": (None,), "param_dtype": (), "frozen_dtype": (INT8, None), "candidates_dtype": (None,)}
  for key, others in further.items():
    if config[key] not in (allowed := (*DTYPES, *others)):
      names = ", ".join(name for name in allowed if name)
      raise UserError(f"{key} (={config[key]!r}) must be one of {names}; set --config.{key}")
  if config.frozen_dtype == INT8 and stored != "float32":
    raise UserError(
      f"frozen_dtype (='int8') needs param_dtype=float32, found {stored!r}; set --config.param_dtype or "
      f"--config.frozen_dtype"
    )
  for key in narrow:
    if config[key] not in (None, stored) and (stored, config[key]) not in MIXED:
      raise UserError(
        f"{key} (={config[key]!r}) must be the same as param_dtype (={stored!r}), or one of the two bfloat16 and the "
        f"other float32; set --config.{key} or --config.param_dtype"
      )


def _check_warm_start(config):
  steps = config.warm_start_steps
  if not 0 <= steps <= config.steps:
    raise UserError(
      f"warm_start_steps (={steps}) must lie between 0 and steps (={config.steps}); set --config.warm_start_steps"
    )
  if steps and 0 < config.steps - steps <= config.warmup_steps:
    raise UserError(
      f"warm_start_steps (={steps}) leaves {config.steps - steps} of {config.steps} steps, in which the learning rate "
      f"would only warm up (warmup_steps = {config.warmup_steps}); lower one of them"
    )
  if steps and config.method == "full":
    raise UserError(f"warm_start_steps (={steps}) needs a low-rank --config.method to hand over to; found full")
  if steps and config.warm_start_from:
    raise UserError(
      f"warm_start_steps (={steps}) and warm_start_from (={config.warm_start_from!r}) exclude each other: "
      f"full-rank steps in this run, or the weights of another run; set only one of them"
    )
