"""The training methods, one module per method, and the table from which `config.method` selects one.

To add a method, write `methods/NAME.py`, and add it to `METHODS`, and to at most one of `FREEZING`, `FACTORS` and
`PROJECTING`. If the method has settings of its own, add a section `config.NAME` to `configs/base.py`. The module has:

  LEARNING_RATE, MIN_LR_RATIO   the defaults of `config.learning_rate` and `config.min_lr_ratio`
  ACCEPTED                      {name: default coefficients} of the optimizers that it works with, see `optimizers`
  check(config)                 raises `UserError` if a setting of the method is invalid
  describe(config)              lines that a run prints before it starts
  warnings(config)              sentences that a run prints as warnings before it starts
  build(config)                 returns a `base.Method`, whose docstring lists what a method can change

`tests/methods/test_methods.py` runs the contract tests for every method in the table.
"""

from ml_collections import FrozenConfigDict

from switchlora_jax.methods import (
  apollo,
  apollo_mini,
  factored,
  fira,
  frugal,
  full,
  galore,
  ldadam,
  lora,
  relora,
  sltrain,
  switchlora,
)
from switchlora_jax.methods.schedules import default_final_ratio

METHODS = {
  "full": full,
  "lora": lora,
  "switchlora": switchlora,
  "relora": relora,
  "galore": galore,
  "fira": fira,
  "apollo": apollo,
  "apollo_mini": apollo_mini,
  "frugal": frugal,
  "ldadam": ldadam,
  "sltrain": sltrain,
  "factored": factored,
}
FREEZING = ("lora", "switchlora", "relora")  # the methods with frozen base kernels
FACTORS = (*FREEZING, "sltrain", "factored")  # the methods whose layers have factors A and B
PROJECTING = ("galore", "fira", "apollo", "frugal", "ldadam")  # the methods that project gradients to `config.rank`
LOW_RANK = (*FACTORS, *PROJECTING)  # the methods that use `config.rank`


def keys_for(config, method: str) -> dict:
  """The config keys to change so that another method trains with it.

  Resets `frozen_dtype` and `warm_start_steps` where the method does not accept them.
  """
  keys = {"method": method}
  if method == "full" and config.warm_start_steps:
    keys["warm_start_steps"] = 0
  if method not in FREEZING and config.frozen_dtype is not None:
    keys["frozen_dtype"] = config.param_dtype
  return keys


def full_rank_config(config) -> FrozenConfigDict:
  """The config of the full-rank phase of a run with `warm_start_steps`; its schedule spans the steps of the whole run.

  Its learning rates and warm-up are `warm_start_learning_rate`, `warm_start_rest_learning_rate` and
  `warm_start_warmup_steps`. `min_lr_ratio`, and coefficients of the optimizer that are those of the method, are the
  defaults of full rank; the values of the run apply to the phase that follows.
  """
  name = config.optimizer.name
  own, of_full = METHODS[config.method].ACCEPTED[name]._asdict(), full.ACCEPTED[name]._asdict()
  replaced = {key: of_full[key] for key, default in own.items() if config.optimizer[key] == default}
  changes = {
    "method": "full",
    "learning_rate": config.warm_start_learning_rate,
    "rest_learning_rate": config.warm_start_rest_learning_rate,
    "warmup_steps": config.warm_start_warmup_steps,
    "min_lr_ratio": default_final_ratio(config, full.MIN_LR_RATIO),
    "warm_start_steps": 0,
    "optimizer": config.optimizer.to_dict() | replaced,
  }
  return FrozenConfigDict(config.to_dict() | changes)


def config_at(config, step: int) -> FrozenConfigDict:
  """The config of the phase that made the state before step `step`: of full rank up to step `warm_start_steps`."""
  return full_rank_config(config) if max(step, 1) <= config.warm_start_steps else config
