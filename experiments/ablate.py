"""Ablations of SwitchLoRA: change one setting at a time, with equal token budgets.

python -m experiments.ablate --study=interval --workdir=runs/interval
python -m experiments.ablate --study=state --seeds=3 --config.rank=16 --workdir=runs/state

Writes the same files as experiments.compare: table.md, results.json, and curves and parameters as .png and .svg.
"""

import jax
from absl import flags

from experiments.common import cli, results, sweep
from experiments.common.trials import base_from_flags
from experiments.paper import studies
from switchlora_jax.errors import UserError

CONFIG = cli.define_config()
flags.declare_key_flag("config")
STUDY = flags.DEFINE_string("study", None, f"the ablation to run, one of {', '.join(studies.STUDIES)}")
LEARNING_RATES = flags.DEFINE_list("learning_rates", None, "learning rates to sweep; default: the config's")
sweep.define_sweep_flags(seeds=1)
sweep.define_search_flags()


def main():
  """Check the flags, run the sweep, write the results."""
  jax.config.update("jax_platforms", "cpu")  # this process only counts parameters; the runs use the devices
  if STUDY.value not in studies.STUDIES:
    found = "missing" if STUDY.value is None else f"{STUDY.value!r}, which does not exist"
    raise UserError(f"--study is {found}; it must be one of {', '.join(studies.STUDIES)}")
  base = base_from_flags()
  cli.set_precision(base.config)
  rates = sweep.parse_numbers("learning_rates", LEARNING_RATES.value, float)
  variants = studies.study_variants(STUDY.value, base.config, rates)
  study = studies.STUDIES[STUDY.value](base.config)
  options, title = sweep.sweep_options(), f"{study.question} ({study.source} of the paper)"
  shown = options | {"allow_edges": flags.FLAGS.allow_edges}
  search = {"extend": flags.FLAGS.extend, "record": results.recorder(variants, shown, title)}
  trial_results = sweep.run_sweep(base, variants, **options, **search, quiet=flags.FLAGS.quiet)
  results.conclude(variants, trial_results, shown, title)


if __name__ == "__main__":
  cli.run(main, continues=True)
