"""Pre-train a LLaMA. The same command in the same --workdir continues a run that was stopped.

python -m experiments.pretrain --config=configs/llama_tiny.py --workdir=runs/tiny
python -m experiments.pretrain --config=configs/llama_350m.py --config.rank=128 --dry_run
"""

from pathlib import Path

import jax
from absl import flags

from experiments import cli
from switchlora_jax import report, trainer
from switchlora_jax.config import resolve
from switchlora_jax.errors import UserError
from switchlora_jax.program import phases
from switchlora_jax.sharding import make_mesh

CONFIG = cli.define_config()
flags.declare_key_flag("config")  # shown by --help
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run: created, or continued if it holds one")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the resolved config and all sizes, allocate nothing, and exit")


def main():
  """Check, then describe or train and conclude."""
  config = resolve(CONFIG.value, jax.device_count(), jax.default_backend())
  cli.set_precision(config)
  if DRY_RUN.value:
    print(report.describe(config, *(program.abstract for program in phases(config, make_mesh()))))
    return
  if WORKDIR.value is None:
    raise UserError("--workdir is missing: give the directory in which the run is kept, say --workdir=runs/tiny")
  workdir = Path(WORKDIR.value).expanduser()
  outcome = trainer.train(config, workdir)
  print(report.conclude(config, workdir, outcome))
  print(f"continue for twice as long: {report.continue_command(config.steps * 2)}")


if __name__ == "__main__":
  cli.run(main)
