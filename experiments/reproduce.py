"""Run a table or a figure of the paper and print the paper's numbers beside ours.

python -m experiments.reproduce --item=table2 --workdir=runs/table2             # minutes on a laptop
python -m experiments.reproduce --item=table2 --scale=paper --dry_run           # the commands, for a cluster
python -m experiments.reproduce --item=table2 --scale=paper --workdir=runs/table2_paper \
    --set=data.path='c4/en/c4-train.*.json.gz' --set=data.eval_path='c4/en/c4-validation.*.json.gz' \
    --set=data.tokenizer=t5.model                                               # from a local copy of C4

At the paper's scale, runs train on folders of prepared C4, data/c4_SEQ_LEN, with T5's vocabulary and C4's validation
split. --dry_run prints the commands that prepare them as well. The keys of `SOURCE_KEYS` then describe the text that is
prepared. With --set=data.source they describe the text of the runs, as elsewhere.

--item=galore_table2 is Table 2 of GaLore, whose documents are cut or padded: data/c4_SEQ_LEN_pad.

experiments/paper/items.py defines the runs of each item and holds the paper's numbers. Items that are trained write
the same files as experiments.compare to --workdir.
"""

import os
import shlex
import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

from experiments.common import cli, results, spectra, sweep
from experiments.common.outcomes import TrialResult, evaluation_loss
from experiments.common.results_table import markdown
from experiments.common.trials import (
  BaseConfig,
  Trial,
  Variant,
  first_seed_trials,
  make_trial,
  parse_config_value,
  update_config,
)
from experiments.paper import items, studies
from switchlora_jax.data.corpus import matching_files
from switchlora_jax.data.shards import read_manifest
from switchlora_jax.data.tokenizer import load_tokenizer, locate, size_to_train, tokenizer_sha256
from switchlora_jax.errors import UserError, to_stderr
from switchlora_jax.glue import tasks as glue
from switchlora_jax.runs.directory import open_run
from switchlora_jax.runs.tokenizer_files import tokenizer_in

ITEM = flags.DEFINE_string("item", None, f"table or figure to reproduce, one of {', '.join(items.ITEMS)}")
SCALE = flags.DEFINE_enum("scale", "mini", items.SCALES, "mini: minutes on a laptop; paper: the paper's own sizes")
SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE: set a config key for all runs; repeatable")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the command of each run, and run nothing")
sweep.define_sweep_flags(seeds=1)
# Of the text that C4 is prepared from: flags of experiments.prepare_data.
SOURCE_KEYS = tuple(f"data.{flag}" for flag in ("path", "eval_path", "tokenizer", "field", "bad_rows"))
T5_PIECES = (32_000, 32_100)  # of T5's SentencePiece model, without and with its 100 sentinels


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
    keys[key] = parse_config_value(config, key, value)
  local = [bool(keys.get(key)) for key in ("data.path", "data.eval_path")]
  if prepares_c4(keys) and any(local) and not all(local):
    raise UserError(
      "data.path and data.eval_path must be given together: the paper trains on C4 and validates on C4's validation "
      "split; add --set=data.eval_path='c4/en/c4-validation.*.json.gz', or set data.source as well, for example "
      "--set=data.source=prepared for a folder of experiments.prepare_data"
    )
  if fixed := sorted(keys.keys() & {"method", "rank", *items.SHAPE}):
    raise UserError(f"--set={fixed[0]} would contradict the labels of the lines; use experiments.compare or .ablate")
  return keys


def prepares_c4(keys: dict) -> bool:
  """Whether the runs train on the paper's data, so that the keys of `SOURCE_KEYS` are for preparing them."""
  return SCALE.value == "paper" and "data.source" not in keys


def item_variants(item: items.Item, base: BaseConfig, keys: dict) -> list[Variant]:
  """The variants of an item; `keys`, from --set, take precedence over those of its lines."""
  variants = trained_variants(item, base, keys)
  if not prepares_c4(keys):
    return variants
  folders = [items.c4_folder(config) for config in changed_configs(base.config, variants)]
  data = [{"data.source": "prepared", "data.path": folder} for folder in folders]
  return [variant._replace(overrides=variant.overrides | own) for variant, own in zip(variants, data, strict=True)]


def trained_variants(item: items.Item, base: BaseConfig, keys: dict) -> list[Variant]:
  """The variants of an item without their data."""
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
  update_config(config, shared)
  found = [variant for name in item.study.split(",") for variant in studies.study_variants(name, config)]
  return [variant._replace(overrides=shared | variant.overrides) for variant in distinct_variants(config, found)]


def distinct_variants(config, variants: list[Variant]) -> list[Variant]:
  """The variants without duplicate configs: two studies share the config's own setting."""
  kept = {}
  for variant, changed in zip(variants, changed_configs(config, variants), strict=True):
    kept.setdefault(changed.to_json(), variant)
  return list(kept.values())


def changed_configs(config, variants: list[Variant]) -> list[ConfigDict]:
  """The config of each variant, not resolved; `config` is the base."""
  found = []
  for variant in variants:
    found.append(config.copy_and_resolve_references())
    update_config(found[-1], variant.overrides)
  return found


def item_title(item: items.Item, configs: list[FrozenConfigDict], keys: dict) -> str:
  """The title of the results: the item, the models that are trained, and the step whose perplexity is compared.

  At the paper's scale, models and step are the paper's. The step is then given only if --set changes it.

  Args:
    configs: the resolved config of each run.
    keys: from --set.
  """
  name = f"{ITEM.value}, {SCALE.value} scale"
  name += "" if item.source == "the paper" else f", the column `paper` is of {item.source}"
  read = dict.fromkeys(f"step {round(item.read_at * c.steps):,} of {c.steps:,}" for c in configs)
  if SCALE.value == "paper":
    return f"{name}: {item.title}" + (f"; here at {', '.join(read)}" if "steps" in keys else "")
  return f"{name}: {items.MINI_MODELS}, at {', '.join(read)}; in the paper: {item.title}"


def preparation_commands(configs: list[FrozenConfigDict], keys: dict) -> dict[str, str]:
  """{folder: the command that prepares it} of the C4 that runs at the paper's scale read."""
  given = {"data.tokenizer": "t5.model"} | {key: keys[key] for key in SOURCE_KEYS if keys.get(key)}
  options = [f"--{key.removeprefix('data.')}={value}" for key, value in given.items()]
  command = [sys.executable, "-m", "experiments.prepare_data", "--source=c4", *options]
  found = {}
  for folder in dict.fromkeys(map(items.c4_folder, configs)):
    trained_on_it = [config for config in configs if items.c4_folder(config) == folder]
    seq_len, packing = trained_on_it[0].seq_len, trained_on_it[0].data.packing
    words = [f"--seq_len={seq_len}", *([] if packing == "pack" else [f"--packing={packing}"])]
    words += [f"--take={items.c4_documents(trained_on_it)}", f"--out={folder}"]
    found[folder] = shlex.join([*command, *words])
  return found


def check_prepared(folder: Path, manifest: dict, configs: list[FrozenConfigDict], keys: dict):
  """Raise `UserError` unless a finished folder is the paper's data for these runs, or those of the keys of --set."""
  train, valid = manifest["train"], manifest["valid"]
  needed = max(config.steps * config.batch_size for config in configs)
  pieces, given = load_tokenizer(tokenizer_in(folder)).size, keys.get("data.tokenizer")
  faults = {
    "it has no validation split": valid is None,
    f"it has {train['rows']:,} training rows, and a run needs {needed:,}": train["rows"] < needed,
    f"its tokenizer has {pieces:,} pieces, not T5's {T5_PIECES[0]:,}": not (given or pieces in T5_PIECES),
  }
  if given:
    key = "--set=data.tokenizer"
    trained = size_to_train(given, key) is not None
    wanted = given if trained else tokenizer_sha256(locate(given, key))
    found_there = manifest["request"]["tokenizer"] if trained else manifest["tokenizer"]
    faults["its tokenizer is not data.tokenizer"] = found_there != wanted
  for number, key in enumerate(("data.path", "data.eval_path")):
    if pattern := keys.get(key):
      wanted = [os.path.abspath(file) for file in matching_files(pattern, f"--set={key}")]
      faults[f"it was not made of the files of {key}"] = [o[0] for o in manifest["request"]["text"][number]] != wanted
  if found := [fault for fault, holds in faults.items() if holds]:
    raise UserError(
      f"{folder} must hold C4 as the paper uses it: {'; '.join(found)}; move it away and prepare the data again "
      f"(--dry_run prints the command), or pass --set=data.source=prepared --set=data.path={folder} to use it as it is"
    )


def missing_data(configs: list[FrozenConfigDict], keys: dict) -> str | None:
  """The sentence that names the missing command or flag if the runs have no data yet; else None.

  Raises:
    UserError: a folder is prepared, but not as these runs need it.
  """
  if prepares_c4(keys):
    missing = []
    for folder, command in preparation_commands(configs, keys).items():
      if (manifest := read_manifest(Path(folder))) is None:
        missing.append(command)
      else:
        trained_on_it = [config for config in configs if items.c4_folder(config) == folder]
        check_prepared(Path(folder), manifest, trained_on_it, keys)
    return f"prepare the data first, by: {'; then by: '.join(missing)}" if missing else None
  config = configs[0]
  if config.data.source == "docs" or config.data.path:
    return None
  return (
    f"data.path is empty, but data.source (={config.data.source}) needs a text; add --set=data.path='c4/*.json.gz', or "
    "--set=data.source=prepared --set=data.path=FOLDER with a folder of experiments.prepare_data, if all lines have "
    "its seq_len"
  )


def dry_run(item: items.Item, base: BaseConfig, variants: list[Variant], keys: dict):
  """Print the commands of the data, of each run and of the fine-tuning, with the directories of a run without it."""
  first = first_seed_trials(base, variants)
  configs = [trial.config for trial in first]
  if prepares_c4(keys):
    print(*preparation_commands(configs, keys).values(), sep="\n")
  more = [make_trial(base, variant, None, n) for n in range(1, flags.FLAGS.seeds) for variant in variants]
  workdir = Path(flags.FLAGS.workdir or f"runs/{ITEM.value}")
  for trial in first + more:
    print(shlex.join(sweep.trial_command(base, trial, workdir / "cells" / trial.name)))
  if item.glue:
    print(fine_tuning_command(first, workdir))
  if not prepares_c4(keys) and (missing := missing_data(configs, keys)):
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
  for result in sorted(trial_results, key=lambda result: evaluation_loss(result, item.read_at)):
    best.setdefault(result.trial.variant.label, result.trial)
  print(f"\nthe paper's, after fine-tuning:\n\n{markdown(item.paper)}")
  print(f"to fine-tune ours:\n\n{fine_tuning_command([best[line.label(SCALE.value)] for line in item.lines], workdir)}")


def print_facts(item: items.Item):
  """Print an item that needs no training."""
  if item.facts:
    print(f"ours, from the configs:\n\n{markdown(item.facts())}")
  if item.paper:
    print(f"the paper's:\n\n{markdown(item.paper)}")
  if item.used:
    print(f"ours are the same: {item.used}")


def main():
  """Check the flags, then print facts, or run a sweep and write its results."""
  jax.config.update("jax_platforms", "cpu")  # this process only counts parameters; the runs use the devices
  if ITEM.value not in items.ITEMS:
    found = "missing" if ITEM.value is None else f"{ITEM.value!r}, which does not exist"
    raise UserError(f"--item is {found}; it must be one of {', '.join(items.ITEMS)}")
  item = items.ITEMS[ITEM.value]
  if not item.lines and not item.study:
    print(f"{ITEM.value}: {item.title}")
    print_facts(item)
    return
  keys = set_keys()
  run_keys = {key: value for key, value in keys.items() if not (prepares_c4(keys) and key in SOURCE_KEYS)}
  base = items.base_config(SCALE.value, run_keys)
  variants = item_variants(item, base, run_keys)
  configs = [trial.config for trial in first_seed_trials(base, variants)]
  title = item_title(item, configs, keys)
  print(title)
  if item.paper and not item.glue:
    print(f"\nnumbers of {item.source}, not ours:\n\n{markdown(item.paper)}")
  if DRY_RUN.value:
    dry_run(item, base, variants, keys)
    return
  if missing := missing_data(configs, keys):
    raise UserError(missing)
  options = sweep.sweep_options() | {"read_at": item.read_at}
  record = results.recorder(variants, options, title)
  shown = {"record": record, "quiet": flags.FLAGS.quiet}
  needs_weights = bool(item.glue or item.spectra)  # which results.json does not have
  trial_results = sweep.run_sweep(base, variants, **options, **shown, reuse=not needs_weights)
  results.conclude(variants, trial_results, options, title)
  if item.glue:
    print_glue(item, trial_results, options["workdir"])
  if item.spectra:
    spectra.conclude([open_run(result.workdir) for result in trial_results], options["workdir"], flags.FLAGS.quiet)


if __name__ == "__main__":
  cli.run(main, continues=True)
