"""Run a table or a figure of the paper and print the paper's numbers beside ours.

python -m experiments.reproduce --item=table2 --workdir=runs/table2             # minutes on a laptop
python -m experiments.reproduce --item=table2 --scale=paper --workdir=runs/table2_paper \
    --set=data.path='c4/en/c4-train.*.json.gz' --set=data.eval_path='c4/en/c4-validation.*.json.gz' \
    --set=data.tokenizer=t5.model                                               # --dry_run: the commands, for a cluster

experiments/paper/items.py defines the runs of each item and holds the paper's numbers. Items that are trained write
the same files as experiments.compare to --workdir.
"""

import shlex
import sys
from pathlib import Path

import jax
from absl import flags

from experiments.common import cli, results, spectra, sweep
from experiments.common.sweep import BaseConfig, Trial, TrialResult, Variant
from experiments.paper import items, studies
from switchlora_jax.errors import UserError, to_stderr
from switchlora_jax.glue import tasks as glue
from switchlora_jax.runs.directory import open_run

ITEM = flags.DEFINE_string("item", None, f"table or figure to reproduce, one of {', '.join(items.ITEMS)}")
SCALE = flags.DEFINE_enum("scale", "mini", items.SCALES, "mini: minutes on a laptop; paper: the paper's own sizes")
SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE: set a config key for all runs; repeatable")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the command of each run, and run nothing")
sweep.define_sweep_flags(seeds=1)


def set_keys() -> dict:
  """The keys of --set, with the types of the config.

  Raises:
    UserError: a key is unknown, or would contradict the labels of the lines.
  """
  config, keys = items.base_config(SCALE.value).config, {}
  for text in SET.value:
    key, equals, value = text.partition("=")
    if not equals:
      raise UserError(f"--set={text} must be KEY=VALUE, for example --set=data.path='c4/*.json.gz'")
    keys[key] = sweep.parse_config_value(config, key, value)
  if fixed := sorted(keys.keys() & {"method", "rank", *items.SHAPE}):
    raise UserError(f"--set={fixed[0]} would contradict the labels of the lines; use experiments.compare or .ablate")
  return keys


def item_variants(item: items.Item, base: BaseConfig, keys: dict) -> list[Variant]:
  """The variants of an item; `keys`, from --set, take precedence over those of its lines."""
  if not item.study:
    lines = [items.line_variant(line, SCALE.value) for line in item.lines]
    variants = [variant._replace(overrides=variant.overrides | keys) for variant in lines]
    if len({frozenset(variant.overrides.items()) for variant in variants}) < len(variants):
      raise UserError(f"--set={','.join(keys)} makes two lines identical; remove the key in which they differ")
    return variants
  batch = {"batch_size": 128} if SCALE.value == "paper" else {}  # Appendix B
  rank = 128 if SCALE.value == "paper" else 16
  shared = items.size_keys("130M", SCALE.value) | batch | {"rank": rank} | keys
  config = base.config.copy_and_resolve_references()
  sweep.update_config(config, shared)
  found = [variant for name in item.study.split(",") for variant in studies.study_variants(name, config)]
  return [variant._replace(overrides=shared | variant.overrides) for variant in distinct_variants(config, found)]


def distinct_variants(config, variants: list[Variant]) -> list[Variant]:
  """The variants without duplicate configs: two studies share the config's own setting."""
  kept = {}
  for variant in variants:
    changed = config.copy_and_resolve_references()
    sweep.update_config(changed, variant.overrides)
    kept.setdefault(changed.to_json(), variant)
  return list(kept.values())


def missing_data(config) -> str | None:
  """The sentence that names the missing flag if the runs need a text and none is given; else None."""
  if config.data.source == "docs" or config.data.path:
    return None
  return (
    f"data.path is empty, but data.source (={config.data.source}) needs a text; add --set=data.path='c4/*.json.gz', or "
    "--set=data.source=prepared --set=data.path=FOLDER with a folder of experiments.prepare_data, if all lines have "
    "its seq_len"
  )


def dry_run(item: items.Item, base: BaseConfig, variants: list[Variant]):
  """Print the command of each run and of the fine-tuning; their directories are those of this command without it."""
  first = sweep.first_seed_trials(base, variants)
  more = [sweep.make_trial(base, variant, None, n) for n in range(1, flags.FLAGS.seeds) for variant in variants]
  workdir = Path(flags.FLAGS.workdir or f"runs/{ITEM.value}")
  for trial in first + more:
    print(shlex.join(sweep.trial_command(base, trial, workdir / "cells" / trial.name)))
  if item.glue:
    print(fine_tuning_command(first, workdir))
  if missing := missing_data(base.config):
    to_stderr(f"these commands cannot run yet: {missing}")


def fine_tuning_command(trials: list[Trial], workdir: Path) -> str:
  """The command that fine-tunes trained models on GLUE, with sequences no longer than in their training."""
  models = [f"--model={workdir / 'cells' / trial.name}" for trial in trials]
  shared = {
    "task": ",".join(glue.TASKS),
    "data": glue.HUB,
    "seq_len": min(512, *(trial.config.seq_len for trial in trials)),  # 512: the paper's
    "workdir": workdir / "glue",
  }
  words = [f"--{flag}={value}" for flag, value in (shared | items.FINE_TUNING[SCALE.value]).items()]
  return shlex.join([sys.executable, "-m", "experiments.finetune_glue", *models, *words])


def print_glue(item: items.Item, trial_results: list[TrialResult], workdir: Path):
  """Print the paper's GLUE scores and the command that fine-tunes the best run of each line."""
  best = {}
  for result in sorted(trial_results, key=lambda result: sweep.evaluation_loss(result, item.read_at)):
    best.setdefault(result.trial.variant.label, result.trial)
  print(f"\nthe paper's, after fine-tuning:\n\n{results.markdown(item.paper)}")
  print(f"to fine-tune ours:\n\n{fine_tuning_command([best[line.label] for line in item.lines], workdir)}")


def print_facts(item: items.Item):
  """Print an item that needs no training."""
  if item.facts:
    print(f"ours, from the configs:\n\n{results.markdown(item.facts())}")
  if item.paper:
    print(f"the paper's:\n\n{results.markdown(item.paper)}")
  if item.used:
    print(f"ours are the same: {item.used}")


def main():
  """Check the flags, then print facts, or run a sweep and write its results."""
  jax.config.update("jax_platforms", "cpu")  # this process only counts parameters; the runs use the devices
  if ITEM.value not in items.ITEMS:
    found = "missing" if ITEM.value is None else f"{ITEM.value!r}, which does not exist"
    raise UserError(f"--item is {found}; it must be one of {', '.join(items.ITEMS)}")
  item = items.ITEMS[ITEM.value]
  print(f"{ITEM.value}: {item.title}")
  if not item.lines and not item.study:
    print_facts(item)
    return
  keys = set_keys()
  base = items.base_config(SCALE.value, keys)
  variants = item_variants(item, base, keys)
  if DRY_RUN.value:
    dry_run(item, base, variants)
    return
  if missing := missing_data(base.config):
    raise UserError(missing)
  options = sweep.sweep_options() | {"read_at": item.read_at}
  trial_results = sweep.run_sweep(base, variants, **options)
  results.conclude(variants, trial_results, options, f"{ITEM.value}, {SCALE.value} scale: {item.title}")
  if item.glue:
    print_glue(item, trial_results, options["workdir"])
  if item.spectra:
    spectra.conclude([open_run(result.workdir) for result in trial_results], options["workdir"])


if __name__ == "__main__":
  cli.run(main, continues=True)
