"""What each training method adds to a step, behind one small interface.

A method is a module here and a line in `METHODS`. It has `LEARNING_RATE` and `MIN_LR_RATIO` (its
authors'), `check(config)`, which raises `UserError`, `describe(config)`, lines to print before a run,
and `build(config) -> Method`.
"""

from switchlora_jax.methods import full, galore, lora, relora, switchlora

METHODS = {"full": full, "lora": lora, "switchlora": switchlora, "relora": relora, "galore": galore}
