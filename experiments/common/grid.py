"""A grid of training runs under equal tokens: what compare, ablate and reproduce have in common.

An arm is one line of a table. Every arm is trained once at each of its learning rates with the first seed,
then at the best of them with the other seeds; every such cell is a run of `experiments.pretrain` in a process
and a directory of its own, so it can be looked at, continued and killed like any other.
"""

import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from ml_collections import FrozenConfigDict

from experiments.common import cli
from experiments.common.children import Children
from experiments.common.settings import Base, platform, update
from switchlora_jax.config import resolve
from switchlora_jax.data import dataset
from switchlora_jax.errors import UserError
from switchlora_jax.methods import METHODS
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs.directory import differences
from switchlora_jax.training import metrics


class Arm(NamedTuple):
  """One line of a table.

  Attributes:
    label: its name there.
    overrides: the keys changed against the base.
    learning_rates: to choose from with the first seed; empty: the method's own.
    paper: the paper's number, where it has one.
  """

  label: str
  overrides: dict[str, Any]
  learning_rates: tuple[float, ...] = ()
  paper: float | None = None


class Cell(NamedTuple):
  """One run of an arm."""

  arm: Arm
  learning_rate: float
  seed: int
  config: FrozenConfigDict
  overrides: dict[str, Any]

  @property
  def name(self) -> str:
    """The name of its directory: `switchlora-rank-16_lr=0.02_seed=0`."""
    words = re.sub(r"[^\w.]+", "-", self.arm.label).strip("-")
    return f"{words}_lr={self.learning_rate:g}_seed={self.seed}"


class Ran(NamedTuple):
  """A cell that was run, and why it failed if it did."""

  cell: Cell
  workdir: Path
  failure: str | None


def make_cell(base: Base, arm: Arm, learning_rate: float | None, seed_number: int) -> Cell:
  """The cell of an arm at a learning rate (None: the method's own) and the so-manieth seed of the base."""
  config = base.config.copy_and_resolve_references()  # a plain copy would share the placeholder of learning_rate
  update(config, arm.overrides)
  own = {"seed": config.seed + seed_number}
  if learning_rate is not None:
    own["learning_rate"] = learning_rate
  update(config, own)
  resolved = resolve(config, devices=1, platform=platform())
  return Cell(arm, resolved.learning_rate, resolved.seed, resolved, base.overrides | arm.overrides | own)


def sweep_cells(base: Base, arms) -> list[Cell]:
  """The cells of the first seed: every arm at each of its learning rates.

  Raises:
    UserError: some cell's config makes no sense, or two cells are the same; before anything is run.
  """
  cells = [make_cell(base, arm, rate, 0) for arm in arms for rate in arm.learning_rates or (None,)]
  names = [cell.name for cell in cells]
  if twice := {name for name in names if names.count(name) > 1}:
    raise UserError(f"the grid has cells twice ({', '.join(sorted(twice))}); give every value once")
  return cells


def run_grid(base: Base, arms, *, seeds: int, workdir: Path, processes: int, read_at: float) -> list[Ran]:
  """Run what is not finished yet of a grid: the sweep of learning rates, then the other seeds at the best of each arm.

  Args:
    seeds: runs of each arm at its best learning rate, the sweep's own included.
    processes: runs at one time.
    read_at: the fraction of a run's steps at which its validation loss is read.
  Raises:
    UserError: before anything is run, where a config, the data or `read_at` make no sense.
  """
  cells = sweep_cells(base, arms)
  for cell in cells:
    read_step(cell.config, read_at)
  for arm, config in {cell.arm.label: cell.config for cell in cells}.items():
    print("".join(f"{arm}: {warning}\n" for warning in warnings(config)), end="", flush=True)
  folder = workdir / "cells"
  cli.make_folder(folder)
  texts = prepare_data(cells)
  ran = run_cells(base, cells, texts, folder, processes, "sweep" if len(cells) > len(arms) else "runs")
  best = [(arm, best_of(arm, ran, read_at)) for arm in arms]
  more = [make_cell(base, arm, rate, n) for n in range(1, seeds) for arm, rate in best if rate is not None]
  return ran + (run_cells(base, more, texts, folder, processes, "seeds") if more else [])


def warnings(config) -> list[str]:
  """What a method warns of before a run of this config."""
  return [line for line in METHODS[config.method].describe(config) if line.startswith("WARNING")]


def prepare_data(cells: list[Cell]) -> dict[str, str]:
  """{label of an arm: fingerprint of its data}; each text is tokenised once, before many processes want it."""
  made = {}

  def fingerprint(config) -> str:
    wanted = config.data, config.seq_len, config.model.vocab_size, config.steps * config.batch_size
    if wanted not in made:
      made[wanted] = dataset.open_dataset(config).fingerprint
    return made[wanted]

  return {cell.arm.label: fingerprint(cell.config) for cell in cells}


def run_cells(
  base: Base, cells: list[Cell], texts: dict[str, str], folder: Path, processes: int, what: str
) -> list[Ran]:
  """Run the cells that are not finished yet, so many at a time; one that fails does not stop the others.

  Args:
    texts: as from `prepare_data`.
  Raises:
    UserError: before any of them is run, where a directory holds another run, or one on another text.
  """
  for cell in cells:
    check_same_run(folder / cell.name, cell.config, texts[cell.arm.label])
  shares, children = SimpleQueue(), Children()
  for share in range(processes):
    shares.put(share)
  with metrics.progress_bar(len(cells), what=what, unit="run") as bar, ThreadPoolExecutor(processes) as pool:

    def one(cell: Cell) -> Ran:
      share = shares.get()
      try:
        ran = run_cell(base, cell, folder, (share, processes), children)
      finally:
        shares.put(share)
      bar.write(f"{cell.name}: {ran.failure or summary(ran)}")
      bar.update()
      return ran

    futures = [pool.submit(one, cell) for cell in cells]
    try:
      with children:
        return [future.result() for future in futures]
    except BaseException:  # Ctrl-C above all
      pool.shutdown(cancel_futures=True)  # else the runs that still wait would be started before the pool lets go
      raise


def run_cell(base: Base, cell: Cell, folder: Path, share: tuple[int, int], children: Children) -> Ran:
  """Run one cell in a process, unless it is finished; its output goes to a file beside its directory."""
  workdir, log = folder / cell.name, folder / f"{cell.name}.log"
  if finished(workdir, cell.config):
    return Ran(cell, workdir, None)
  with log.open("a") as output:  # behind what an earlier try said
    code = children.run(command(base, cell, workdir), output, share)
  last_line = (log.read_text().strip().splitlines() or ["no output"])[-1]
  return Ran(cell, workdir, f"failed with exit code {code}: {last_line} (see {log})" if code else None)


def command(base: Base, cell: Cell, workdir: Path) -> list[str]:
  """The command line of a cell."""
  keys = [f"--config.{key}={value}" for key, value in cell.overrides.items()]
  return [sys.executable, "-m", "experiments.pretrain", f"--config={base.file}", *keys, f"--workdir={workdir}"]


def finished(workdir: Path, config) -> bool:
  """Whether a run of this very config lies there, evaluated after its last step."""
  saved = run_directory.read(workdir)
  if saved is None or differences(saved["config"], config.to_dict()):
    return False
  return any(row["step"] == config.steps for row in evaluations(workdir))


def check_same_run(workdir: Path, config, fingerprint: str):
  """Raise `UserError` where a run of another config or other data lies: neither to be taken for this nor extended."""
  saved = run_directory.read(workdir)
  if saved and (changed := differences(saved["config"], config.to_dict())):
    raise run_directory.another_run(workdir, changed)
  run_directory.check_same_data(workdir, saved, fingerprint)


def evaluations(workdir: Path) -> list[dict]:
  """The evaluations of a run so far."""
  return [row for row in metrics.read(workdir / "metrics.jsonl") if "val_loss" in row]


def read_step(config, read_at: float) -> int:
  """The step at which a run's validation loss is read: the fraction `read_at` of its steps.

  Raises:
    UserError: the run is not evaluated then.
  """
  step = round(read_at * config.steps)
  if step != config.steps and step % config.eval_every:
    raise UserError(
      f"the validation loss is read at step {step} ({read_at:g} of {config.steps}), where eval_every "
      f"(={config.eval_every}) does not evaluate; set --config.eval_every to a divisor of {step}"
    )
  return step


def read_loss(ran: Ran, read_at: float) -> float:
  """The validation loss of a cell where it is read, in nats a token; infinite where it failed or diverged.

  Raises:
    UserError: the run was not evaluated then, because it was made with another `eval_every`.
  """
  if ran.failure:
    return math.inf
  step = read_step(ran.cell.config, read_at)
  for row in evaluations(ran.workdir):
    if row["step"] == step:
      return math.inf if row["val_ppl"] is None else row["val_loss"]
  raise UserError(f"{ran.workdir} was not evaluated at step {step}; delete it, and the same command runs it again")


def best_of(arm: Arm, ran: list[Ran], read_at: float) -> float | None:
  """The learning rate with which an arm's first seed ended lowest, or None where no cell of it did."""
  own = [r for r in ran if r.cell.arm is arm]
  first_seed = min(r.cell.seed for r in own)
  losses = {r.cell.learning_rate: read_loss(r, read_at) for r in own if r.cell.seed == first_seed}
  best = min(losses, key=losses.get)
  return best if math.isfinite(losses[best]) else None


def summary(ran: Ran) -> str:
  """How a cell ended."""
  last = evaluations(ran.workdir)[-1]
  return "diverged" if last["val_ppl"] is None else f"validation perplexity {last['val_ppl']:.2f}"
