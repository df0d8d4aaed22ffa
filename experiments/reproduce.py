"""Run a table or a figure of the paper and print its numbers beside ours.

python -m experiments.reproduce --item=table2 --workdir=runs/table2             # minutes on a laptop
python -m experiments.reproduce --item=table2 --scale=paper --workdir=runs/table2_paper \
    --set=data.path='c4/en/c4-train.*.json.gz' --set=data.eval_path='c4/en/c4-validation.*.json.gz' \
    --set=data.tokenizer=t5.model                                               # --dry_run: the commands, for a cluster

What an item trains, and the paper's numbers, stand in experiments/paper/items.py.
"""

import shlex
import sys
from pathlib import Path

import jax
from absl import flags

from experiments.common import cli, grid, results, settings, spectra
from experiments.paper import items, studies
from switchlora_jax.errors import UserError, to_stderr
from switchlora_jax.glue import tasks as glue
from switchlora_jax.runs.directory import open_run

ITEM = flags.DEFINE_string("item", None, f"what to run: {', '.join(items.ITEMS)}")
SCALE = flags.DEFINE_enum("scale", "mini", items.SCALES, "mini: minutes on a laptop; paper: the paper's own sizes")
SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE: change a key of the config for every run; repeat for several")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the command of every run, and run nothing")
settings.define_flags(seeds=1)


def changed_keys() -> dict:
  """What --set says, with the types that the config has; it may not make a line another than it is called."""
  config, keys = items.base(SCALE.value).config, {}
  for text in SET.value:
    key, equals, value = text.partition("=")
    if not equals:
      raise UserError(f"--set={text} must be KEY=VALUE, say --set=data.path='c4/*.json.gz'")
    keys[key] = settings.parse_value(config, key, value)
  if fixed := sorted(keys.keys() & {"method", "rank", *items.SHAPE}):
    raise UserError(f"--set={fixed[0]} would change what the lines are; for that use experiments.compare or .ablate")
  return keys


def arms_of(item: items.Item, base: settings.Base, keys: dict) -> list[grid.Arm]:
  """What is trained for an item; `keys`, from --set, go before what its lines set."""
  if not item.study:
    lines = [items.arm(line, SCALE.value) for line in item.lines]
    arms = [arm._replace(overrides=arm.overrides | keys) for arm in lines]
    if len({frozenset(arm.overrides.items()) for arm in arms}) < len(arms):
      raise UserError(f"--set={','.join(keys)} makes two lines the same run; leave out what tells them apart")
    return arms
  batch = {"batch_size": 128} if SCALE.value == "paper" else {}  # Appendix B
  rank = 128 if SCALE.value == "paper" else 16
  shared = items.size_keys("130M", SCALE.value) | batch | {"rank": rank} | keys
  config = base.config.copy_and_resolve_references()
  settings.update(config, shared)
  found = [arm for name in item.study.split(",") for arm in studies.arms(name, config)]
  return [arm._replace(overrides=shared | arm.overrides) for arm in distinct(config, found)]


def distinct(config, arms: list[grid.Arm]) -> list[grid.Arm]:
  """The arms without those that train what one before them trains: two studies share the config's own setting."""
  kept = {}
  for arm in arms:
    changed = config.copy_and_resolve_references()
    settings.update(changed, arm.overrides)
    kept.setdefault(changed.to_json(), arm)
  return list(kept.values())


def missing_data(config) -> str | None:
  """What to add to the command where its runs want a text and none is named; else None."""
  if config.data.source == "docs" or config.data.path:
    return None
  return (
    f"data.path is empty, and data.source (={config.data.source}) wants a text; add --set=data.path='c4/*.json.gz', or "
    "--set=data.source=prepared --set=data.path=FOLDER, of experiments.prepare_data, if all lines have its seq_len"
  )


def dry_run(item: items.Item, base: settings.Base, arms: list[grid.Arm]):
  """Print the command of every run, into the directory in which this command then finds it, and what is to follow."""
  first = grid.sweep_cells(base, arms)
  more = [grid.make_cell(base, arm, None, n) for n in range(1, flags.FLAGS.seeds) for arm in arms]
  workdir = Path(flags.FLAGS.workdir or f"runs/{ITEM.value}")
  for cell in first + more:
    print(shlex.join(grid.command(base, cell, workdir / "cells" / cell.name)))
  if item.glue:
    print(fine_tuning(first, workdir))
  if missing := missing_data(base.config):
    to_stderr(f"these commands cannot run: {missing}")


def fine_tuning(cells: list[grid.Cell], workdir: Path) -> str:
  """The command that fine-tunes on GLUE what the cells have trained, on rows no longer than theirs."""
  models = [f"--model={workdir / 'cells' / cell.name}" for cell in cells]
  shared = {
    "task": ",".join(glue.TASKS),
    "data": glue.HUB,
    "seq_len": min(512, *(cell.config.seq_len for cell in cells)),  # the paper's, at most
    "workdir": workdir / "glue",
  }
  words = [f"--{flag}={value}" for flag, value in (shared | items.FINE_TUNING[SCALE.value]).items()]
  return shlex.join([sys.executable, "-m", "experiments.finetune_glue", *models, *words])


def tell_glue(item: items.Item, ran: list[grid.Ran], workdir: Path):
  """Print what the paper found on GLUE, and the command that fine-tunes the best run of each line."""
  best = {}
  for one in sorted(ran, key=lambda one: grid.read_loss(one, item.read_at)):
    best.setdefault(one.cell.arm.label, one.cell)
  print(f"\nthe paper's, after fine-tuning:\n\n{results.markdown(item.paper)}")
  print(f"to fine-tune ours:\n\n{fine_tuning([best[line.label] for line in item.lines], workdir)}")


def tell(item: items.Item):
  """Print an item that no training stands behind."""
  if item.facts:
    print(f"ours, from the configs:\n\n{results.markdown(item.facts())}")
  if item.paper:
    print(f"the paper's:\n\n{results.markdown(item.paper)}")
  if item.used:
    print(f"ours are the same: {item.used}")


def main():
  """Check, then print facts, or run and write."""
  jax.config.update("jax_platforms", "cpu")  # this process only counts; the runs have the devices
  if ITEM.value not in items.ITEMS:
    found = "missing" if ITEM.value is None else f"{ITEM.value!r}, which there is not"
    raise UserError(f"--item is {found}; it must be one of {', '.join(items.ITEMS)}")
  item = items.ITEMS[ITEM.value]
  print(f"{ITEM.value}: {item.title}")
  if not item.lines and not item.study:
    tell(item)
    return
  keys = changed_keys()
  base = items.base(SCALE.value, keys)
  arms = arms_of(item, base, keys)
  if DRY_RUN.value:
    dry_run(item, base, arms)
    return
  if missing := missing_data(base.config):
    raise UserError(missing)
  options = settings.options() | {"read_at": item.read_at}
  ran = grid.run_grid(base, arms, **options)
  results.conclude(arms, ran, options, f"{ITEM.value}, {SCALE.value} scale: {item.title}")
  if item.glue:
    tell_glue(item, ran, options["workdir"])
  if item.spectra:
    spectra.conclude([open_run(r.workdir) for r in ran], options["workdir"])


if __name__ == "__main__":
  cli.run(main, continues=True)
