"""Train methods side by side under equal tokens: same text, data order, steps, batch and evaluation.

python -m experiments.compare --workdir=runs/compare
python -m experiments.compare --methods=full,lora,switchlora --ranks=16,8 --seeds=3 --workdir=runs/compare \
    --learning_rates=full:5e-4,1e-3,2e-3 --learning_rates=lora,switchlora:5e-3,1e-2,2e-2

The learning rate is swept with the first seed; the other seeds run at the best one. The same command goes on
where it was stopped. `table.md`, `results.json`, `curves.png` and `parameters.png` appear in the workdir.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
from absl import flags

from experiments.common import cli, grid, results, settings
from switchlora_jax.errors import UserError
from switchlora_jax.methods import METHODS, keys_for

CONFIG = cli.define_config()
flags.declare_key_flag("config")
METHOD_NAMES = flags.DEFINE_list("methods", list(METHODS), f"methods to train, of {', '.join(METHODS)}")
RANKS = flags.DEFINE_list("ranks", None, "ranks of the low-rank methods; by default the config's")
LEARNING_RATES = flags.DEFINE_multi_string(
  "learning_rates",
  [],
  "RATE,RATE,… for every method, or METHOD,METHOD,…:RATE,RATE,… for some; by default a method's own",
)
settings.define_flags(seeds=3)
TIME = flags.DEFINE_bool("time", True, "measure the time of a training step of each method, after the runs")


def arms(config) -> list[grid.Arm]:
  """A line of the table for each method and rank."""
  unknown = [name for name in METHOD_NAMES.value if name not in METHODS]
  if unknown or not METHOD_NAMES.value:
    raise UserError(f"--methods has {', '.join(unknown) or 'none'}; they must be of {', '.join(METHODS)}")
  rates, found = learning_rates(), []
  ranks = settings.numbers("ranks", RANKS.value, int) or [config.rank]
  for method in METHOD_NAMES.value:
    keys = keys_for(config, method)
    if method == "full":
      found.append(grid.Arm("full", keys, rates.get("full", ())))
      continue
    for rank in ranks:
      found.append(grid.Arm(f"{method}, rank {rank}", keys | {"rank": rank}, rates.get(method, ())))
  return found


def learning_rates() -> dict[str, tuple[float, ...]]:
  """{method: the learning rates to choose from}; what is said of some methods goes before what is said of all."""
  of_all, of_some = {}, {}
  for text in LEARNING_RATES.value:
    names, colon, rates = text.rpartition(":")
    rates = tuple(settings.numbers("learning_rates", rates.split(","), float))
    if unknown := set(names.split(",") if colon else ()) - set(METHODS):
      raise UserError(f"--learning_rates={text} names {', '.join(sorted(unknown))}; expected of {', '.join(METHODS)}")
    (of_some if colon else of_all).update(dict.fromkeys(names.split(",") if colon else METHODS, rates))
  return of_all | of_some


def step_times(base: settings.Base, workdir: Path) -> dict[str, float]:
  """{label: time of a training step relative to full rank}, all methods in turns in one process of its own.

  GaLore's has its share of a refresh, and SwitchLoRA is timed at its first steps, where it is busiest. Empty
  where that process fails, as it says: what was trained for hours is written nevertheless.
  """
  out = workdir / "step_time.json"
  keys = [f"--config.{key}={value}" for key, value in base.overrides.items()]
  ranks = [f"--rank={rank}" for rank in settings.numbers("ranks", RANKS.value, int) or [base.config.rank]]
  refreshing = ["galore refreshing"] * ("galore" in METHOD_NAMES.value)
  methods = f"--methods={','.join(dict.fromkeys(['full', *METHOD_NAMES.value, *refreshing]))}"
  command = [
    sys.executable,
    "-m",
    "experiments.benchmark",
    f"--config={base.file}",
    *keys,
    *ranks,
    methods,
    f"--json={out}",
  ]
  if code := subprocess.run(command, env=settings.environment(), stdout=subprocess.DEVNULL).returncode:
    sys.stderr.write(f"no step times: the benchmark ended with exit code {code}, see above; all else is written\n")
    return {}
  ratios = {(row["program"], row["rank"]): row["time_ratio"] for row in json.loads(out.read_text())}
  for (phase, rank), ratio in ratios.items():
    if phase == "galore":
      ratios[phase, rank] += (ratios["galore refreshing", rank] - ratio) / base.config.galore.refresh_every
  return {name if name == "full" else f"{name}, rank {rank}": ratio for (name, rank), ratio in ratios.items()}


def main():
  """Check, run, time, write."""
  jax.config.update("jax_platforms", "cpu")  # this process only counts; the runs have the devices
  base, options = settings.base_from_flags(), settings.options()
  cli.set_precision(base.config)
  lines = arms(base.config)
  ran = grid.run_grid(base, lines, **options)
  times = step_times(base, options["workdir"]) if TIME.value else None
  results.conclude(lines, ran, options, f"{Path(base.file).stem}: methods compared", times)


if __name__ == "__main__":
  cli.run(main, continues=True)
