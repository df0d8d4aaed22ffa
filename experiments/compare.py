"""Train methods side by side with equal token budgets: same text, data order, steps, batch size and evaluation.

python -m experiments.compare --workdir=runs/compare
python -m experiments.compare --methods=full,lora,switchlora --ranks=16,8 --seeds=3 --workdir=runs/compare \
    --learning_rates=full:5e-4,1e-3,2e-3 --learning_rates=lora,switchlora:5e-3,1e-2,2e-2

The first seed sweeps the learning rates; the other seeds use the best one. The same command continues a comparison
that was stopped. Writes table.md, results.json, and curves and parameters as .png and .svg to --workdir.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
from absl import flags

from experiments.common import cli, results, sweep
from experiments.common.children import environment
from experiments.common.sweep import BaseConfig, Variant
from switchlora_jax.errors import UserError
from switchlora_jax.methods import LOW_RANK, METHODS, keys_for

CONFIG = cli.define_config()
flags.declare_key_flag("config")
METHOD_NAMES = flags.DEFINE_list("methods", list(METHODS), f"methods to train, from {', '.join(METHODS)}")
RANKS = flags.DEFINE_list("ranks", None, "ranks of the low-rank methods; default: the config's")
LEARNING_RATES = flags.DEFINE_multi_string(
  "learning_rates",
  [],
  "RATE,RATE,… for all methods, or METHOD,METHOD,…:RATE,RATE,… for some; repeatable; default: each method's own",
)
sweep.define_sweep_flags(seeds=3)
TIME = flags.DEFINE_bool("time", True, "after the runs, measure the time per training step of each method")


def method_variants(config) -> list[Variant]:
  """One variant per method and rank."""
  unknown = [name for name in METHOD_NAMES.value if name not in METHODS]
  if unknown or not METHOD_NAMES.value:
    raise UserError(f"--methods has {', '.join(unknown) or 'none'}; expected some of {', '.join(METHODS)}")
  rates, found = learning_rates(), []
  ranks = sweep.parse_numbers("ranks", RANKS.value, int) or [config.rank]
  for method in METHOD_NAMES.value:
    keys = keys_for(config, method)
    if method not in LOW_RANK:
      found.append(Variant(method, keys, rates.get(method, ())))
      continue
    for rank in ranks:
      found.append(Variant(f"{method}, rank {rank}", keys | {"rank": rank}, rates.get(method, ())))
  return found


def learning_rates() -> dict[str, tuple[float, ...]]:
  """{method: learning rates to sweep}; values for named methods take precedence over values for all methods."""
  for_all, for_named = {}, {}
  for text in LEARNING_RATES.value:
    names, colon, rates = text.rpartition(":")
    rates = tuple(sweep.parse_numbers("learning_rates", rates.split(","), float))
    if unknown := set(names.split(",") if colon else ()) - set(METHOD_NAMES.value):
      raise UserError(
        f"--learning_rates={text} names {', '.join(sorted(unknown))}; expected some of --methods, which are "
        f"{', '.join(METHOD_NAMES.value)}"
      )
    (for_named if colon else for_all).update(dict.fromkeys(names.split(",") if colon else METHODS, rates))
  return for_all | for_named


def step_times(base: BaseConfig, workdir: Path) -> dict[str, float]:
  """{label: time per training step relative to full rank}, measured by experiments.benchmark in a child process.

  GaLore's time includes its share of a projector refresh. SwitchLoRA is timed at its first steps, where it switches
  most. If the benchmark fails, its error is on stderr and the result is empty, so that the runs are still reported.
  """
  out = workdir / "step_time.json"
  keys = [f"--config.{key}={value}" for key, value in base.overrides.items()]
  ranks = [f"--rank={rank}" for rank in sweep.parse_numbers("ranks", RANKS.value, int) or [base.config.rank]]
  refreshing = ["galore refreshing"] * ("galore" in METHOD_NAMES.value)
  methods = f"--methods={','.join(dict.fromkeys(['full', *METHOD_NAMES.value, *refreshing]))}"
  benchmark = [sys.executable, "-m", "experiments.benchmark", f"--config={base.file}"]
  command = [*benchmark, *keys, *ranks, methods, f"--json={out}", *["--quiet"] * flags.FLAGS.quiet]
  if code := subprocess.run(command, env=environment(), stdout=subprocess.DEVNULL).returncode:
    sys.stderr.write(f"no step times: the benchmark failed with exit code {code}, see above; all else is written\n")
    return {}
  ratios = {(row["program"], row["rank"]): row["time_ratio"] for row in json.loads(out.read_text())}
  for (program, rank), ratio in ratios.items():
    if program == "galore":
      ratios[program, rank] += (ratios["galore refreshing", rank] - ratio) / base.config.galore.refresh_every
  return {f"{name}, rank {rank}" if rank else name: ratio for (name, rank), ratio in ratios.items()}


def main():
  """Check the flags, run the sweep, time the steps, write the results."""
  jax.config.update("jax_platforms", "cpu")  # this process only counts parameters; the runs use the devices
  base, options = sweep.base_from_flags(), sweep.sweep_options()
  cli.set_precision(base.config)
  variants = method_variants(base.config)
  trial_results = sweep.run_sweep(base, variants, **options, quiet=flags.FLAGS.quiet)
  times = step_times(base, options["workdir"]) if TIME.value else None
  results.conclude(variants, trial_results, options, f"{Path(base.file).stem}: comparison of methods", times)


if __name__ == "__main__":
  cli.run(main, continues=True)
