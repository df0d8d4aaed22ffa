"""What each training method adds to a step, behind one small interface.

A method is a module here and a line in `METHODS`. It has `LEARNING_RATE` and `MIN_LR_RATIO` (its
authors'), `check(config)`, which raises `UserError`, `describe(config)`, lines to print before a run,
and `build(config) -> Method`.
"""

from ml_collections import FrozenConfigDict

from switchlora_jax.methods import full, galore, lora, relora, switchlora

METHODS = {"full": full, "lora": lora, "switchlora": switchlora, "relora": relora, "galore": galore}
FREEZING = ("lora", "switchlora", "relora")  # those that freeze the kernels


def keys_for(config, method: str) -> dict:
  """The keys of a config to change so that another method trains under it, without what that method has no use for."""
  keys = {"method": method}
  if method == "full" and config.warm_start_steps:
    keys["warm_start_steps"] = 0
  if method not in FREEZING and config.frozen_dtype is not None:
    keys["frozen_dtype"] = config.param_dtype
  return keys


def full_rank_config(config) -> FrozenConfigDict:
  """The config of the full-rank phase of a run with `warm_start_steps`, over the same horizon as the run.

  Its learning rate and warm-up are `warm_start_learning_rate` and `warm_start_warmup_steps`. `min_lr_ratio` is that of
  full rank: the run's own value, 0.1 by default for GaLore, applies to the phase that follows.
  """
  changes = {
    "method": "full",
    "learning_rate": config.warm_start_learning_rate,
    "warmup_steps": config.warm_start_warmup_steps,
    "min_lr_ratio": full.MIN_LR_RATIO,
    "warm_start_steps": 0,
  }
  return FrozenConfigDict(config.to_dict() | changes)


def config_at(config, step: int) -> FrozenConfigDict:
  """The config of the phase that made the state before step `step`: of full rank up to step `warm_start_steps`."""
  return full_rank_config(config) if max(step, 1) <= config.warm_start_steps else config
