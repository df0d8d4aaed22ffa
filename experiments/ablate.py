"""Change one thing about SwitchLoRA at a time, under equal tokens.

python -m experiments.ablate --study=interval --workdir=runs/interval
python -m experiments.ablate --study=reset --seeds=3 --config.rank=16 --workdir=runs/reset

The outputs are those of experiments.compare: table.md, results.json, curves.png and parameters.png.
"""

import jax
from absl import flags

from experiments.common import cli, grid, results, settings
from experiments.paper import studies
from switchlora_jax.errors import UserError

CONFIG = cli.define_config()
flags.declare_key_flag("config")
STUDY = flags.DEFINE_string("study", None, f"what to change: {', '.join(studies.STUDIES)}")
LEARNING_RATES = flags.DEFINE_list("learning_rates", None, "learning rates to choose from; by default the config's")
settings.define_flags(seeds=1)


def main():
  """Check, run, write."""
  jax.config.update("jax_platforms", "cpu")  # this process only counts; the runs have the devices
  if STUDY.value not in studies.STUDIES:
    found = "missing" if STUDY.value is None else f"{STUDY.value!r}, which there is not"
    raise UserError(f"--study is {found}; it must be one of {', '.join(studies.STUDIES)}")
  base = settings.base_from_flags()
  cli.set_precision(base.config)
  rates = settings.numbers("learning_rates", LEARNING_RATES.value, float)
  lines = studies.arms(STUDY.value, base.config, rates)
  study = studies.STUDIES[STUDY.value](base.config)
  options = settings.options()
  ran = grid.run_grid(base, lines, **options)
  results.conclude(lines, ran, options, f"{study.question} ({study.source} of the paper)")


if __name__ == "__main__":
  cli.run(main, continues=True)
