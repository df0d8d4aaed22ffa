"""What each training method adds to a step, behind one small interface.

A method is a module here and a line in `METHODS`. It has `LEARNING_RATE` and `MIN_LR_RATIO` (its
authors'), `check(config)`, which raises `UserError`, `describe(config)`, lines to print before a run,
and `build(config) -> Method`.
"""

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
