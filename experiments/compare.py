"""Train methods side by side with equal token budgets: same text, data order, steps, batch size and evaluation.

python -m experiments.compare --workdir=runs/compare
python -m experiments.compare --methods=full,lora,switchlora --ranks=16,8 --seeds=3 --workdir=runs/compare \
    --learning_rates=full:5e-4,1e-3,2e-3 --learning_rates=lora,switchlora:5e-3,1e-2,2e-2
python -m experiments.compare --methods=full --variant='muon:method=full,optimizer.name=muon' --workdir=runs/muon \
    --learning_rates=1e-3,2e-3 --rest_learning_rates=2e-3,4e-3
python -m experiments.compare --redraw --workdir=runs/compare

The first seed sweeps the learning rates, and extends the sweep until the best one is inside. The other seeds use the
best one. The same command continues a comparison that was stopped, also on another machine from results.json alone.
Writes table.md, results.json, and curves, parameters and rates as .png and .svg to --workdir.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
from absl import flags

from experiments.common import cli, refreshes, results, sweep
from experiments.common.children import environment
from experiments.common.trials import BaseConfig, Variant, base_from_flags, parse_config_value
from switchlora_jax.errors import UserError
from switchlora_jax.methods import LOW_RANK, METHODS, keys_for
from switchlora_jax.runs.directory import flatten

CONFIG = cli.define_config()
flags.declare_key_flag("config")
METHOD_NAMES = flags.DEFINE_list("methods", list(METHODS), f"methods to train, from {', '.join(METHODS)}")
RANKS = flags.DEFINE_list("ranks", None, "ranks of the low-rank methods; default: the config's")
VARIANT = flags.DEFINE_multi_string(
  "variant",
  [],
  "LABEL:KEY=VALUE,KEY=VALUE,…: a further row, the config with these keys changed; other flags name it by its label; "
  "repeatable",
)
LEARNING_RATES = flags.DEFINE_multi_string(
  "learning_rates",
  [],
  "RATE,RATE,… for all methods, or METHOD,METHOD,…:RATE,RATE,… for some; repeatable; default: each method's own",
)
REST_LEARNING_RATES = flags.DEFINE_multi_string(
  "rest_learning_rates",
  [],
  "learning rates of embedding, norms and head, each with each of --learning_rates; same syntax; default: not swept, "
  "config.rest_learning_rate",
)
REFERENCE = flags.DEFINE_string(
  "reference", None, "method, variant or row that the others are compared with; default: the first row"
)
REDRAW = flags.DEFINE_bool("redraw", False, "write table and figures again from --workdir's results.json; no runs")
sweep.define_sweep_flags(seeds=3)
sweep.define_search_flags()
TIME = flags.DEFINE_bool("time", True, "after the runs, measure the time per training step of each method")


REST = "rest_learning_rate"


def method_variants(config) -> list[Variant]:
  """One variant per method and rank, then those of --variant."""
  unknown = [name for name in METHOD_NAMES.value if name not in METHODS]
  if unknown or not (METHOD_NAMES.value or VARIANT.value):
    raise UserError(f"--methods has {', '.join(unknown) or 'none'}; expected some of {', '.join(METHODS)}")
  further = further_variants(config)
  names, kinds = [*METHOD_NAMES.value, *further], "--methods and --variant" if further else "--methods"
  rates = sweep.parse_rates("learning_rates", LEARNING_RATES.value, names, kinds)
  rests = sweep.parse_rates("rest_learning_rates", REST_LEARNING_RATES.value, names, kinds)
  found = []
  make = lambda name, label, keys: found.append(
    Variant(label, keys, rates.get(name, ()), rest_learning_rates=rests.get(name, ()))
  )
  ranks = sweep.parse_numbers("ranks", RANKS.value, int) or [config.rank]
  for method in METHOD_NAMES.value:
    keys = keys_for(config, method)
    if method not in LOW_RANK:
      make(method, method, keys)
      continue
    for rank in ranks:
      make(method, f"{method}, rank {rank}", keys | {"rank": rank})
  for label, keys in further.items():
    for flag, key, swept in (("learning_rates", "learning_rate", rates), ("rest_learning_rates", REST, rests)):
      if key in keys and label in swept:
        raise UserError(
          f"--variant={label}:… fixes {key} (={keys[key]}), and --{flag} sweeps it as well; leave out one of them, or "
          f"name the rows of --{flag}"
        )
    make(label, label, keys)
  return found


def further_variants(config) -> dict[str, dict]:
  """{label: changed keys} of --variant.

  Keys that the method of a variant does not accept are reset, as for --methods.

  Raises:
    UserError: an entry has another form, a label is taken, or a key or value is invalid.
  """
  found = {}
  for text in VARIANT.value:
    label, colon, pairs = text.partition(":")
    words = [pair.partition("=") for pair in pairs.split(",")]
    if not (label and colon and all(key and equals for key, equals, _ in words)) or "," in label:
      raise UserError(
        f"--variant={text} must be LABEL:KEY=VALUE,KEY=VALUE,… with a label without commas, for example "
        "--variant='muon:method=full,optimizer.name=muon'"
      )
    if label in METHODS or label in found:
      raise UserError(f"--variant={text} needs a label of its own; {label} is taken; choose another")
    keys = {key: parse_config_value(config, key, value) for key, _, value in words}
    method = keys.get("method", config.method)
    found[label] = keys_for(config, method) | keys if method in METHODS else keys  # else `resolve` reports the method
  return found


def reference_label(variants: list[Variant]) -> str:
  """The label of the row that the others are compared with.

  Raises:
    UserError: --reference names none or several rows.
  """
  labels, name = [variant.label for variant in variants], REFERENCE.value
  if name is None or name in labels:
    return name or labels[0]
  matching = [label for label in labels if label.startswith(f"{name}, rank ")]
  if len(matching) != 1:
    raise UserError(f"--reference (={name!r}) must name one row of the table; give one of: {'; '.join(labels)}")
  return matching[0]


def step_times(base: BaseConfig, workdir: Path) -> dict[str, float]:
  """{label: time per training step relative to full rank}, measured by experiments.benchmark in a child process.

  The time of a method with `refreshes` includes their share. SwitchLoRA is timed at its first steps, where it switches
  most. If the benchmark fails, its error is on stderr and the result is empty, so that the runs are still reported.
  """
  out = workdir / "step_time.json"
  keys = [f"--config.{key}={value}" for key, value in base.overrides.items()]
  ranks = [f"--rank={rank}" for rank in sweep.parse_numbers("ranks", RANKS.value, int) or [base.config.rank]]
  intervals = {
    name: flatten(base.config)[key] for name, key in refreshes.INTERVALS.items() if name in METHOD_NAMES.value
  }
  refreshing = [refreshes.program(name) for name, interval in intervals.items() if interval]
  methods = f"--methods={','.join(dict.fromkeys(['full', *METHOD_NAMES.value, *refreshing]))}"
  benchmark = [sys.executable, "-m", "experiments.benchmark", f"--config={base.file}"]
  command = [*benchmark, *keys, *ranks, methods, f"--json={out}", *["--quiet"] * flags.FLAGS.quiet]
  if code := subprocess.run(command, env=environment(), stdout=subprocess.DEVNULL).returncode:
    sys.stderr.write(f"no step times: the benchmark failed with exit code {code}, see above; all else is written\n")
    return {}
  ratios = {(row["program"], row["rank"]): row["time_ratio"] for row in json.loads(out.read_text())}
  for (program, rank), ratio in ratios.items():
    if intervals.get(program):
      ratios[program, rank] += (ratios[refreshes.program(program), rank] - ratio) / intervals[program]
  return {f"{name}, rank {rank}" if rank else name: ratio for (name, rank), ratio in ratios.items()}


def main():
  """Check the flags, run the sweep, time the steps, write the results."""
  jax.config.update("jax_platforms", "cpu")  # this process only counts parameters; the runs use the devices
  if REDRAW.value:
    if ignored := [name for name in ("allow_edges", "reference", "seeds", "extend") if flags.FLAGS[name].present]:
      raise UserError(
        f"--redraw draws what results.json has, for which --{ignored[0]} is already decided; repeat the command "
        f"without --redraw: it runs nothing that is finished"
      )
    results.redraw(sweep.sweep_workdir())
    return
  base, options = base_from_flags(), sweep.sweep_options()
  cli.set_precision(base.config)
  variants = method_variants(base.config)
  title = f"{Path(base.file).stem}: comparison of methods"
  shown = options | {"allow_edges": flags.FLAGS.allow_edges, "reference": reference_label(variants)}
  record = results.recorder(variants, shown, title)
  search = {"extend": flags.FLAGS.extend, "record": record}
  trial_results = sweep.run_sweep(base, variants, **options, **search, quiet=flags.FLAGS.quiet)
  times = step_times(base, options["workdir"]) if TIME.value else None
  results.conclude(variants, trial_results, shown, title, times)


if __name__ == "__main__":
  cli.run(main, continues=True)
