"""Sweeps of training runs with equal token budgets: the part that compare, ablate and reproduce share.

A variant is one line of a table. Each variant is trained with the first seed at each of its learning rates, and with
the remaining seeds at the best of them. `search` has the rule by which the sweep of the first seed is extended. Each
trial is a run of `experiments.pretrain` in its own process and its own directory, and can be inspected, continued and
stopped like any other run. A trial that is finished in results.json does not need its directory: see `stored`. `trials`
has the config of each trial, and `outcomes` reads its losses.
"""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from absl import flags

from experiments.common import cli, search, stored
from experiments.common.children import Children
from experiments.common.outcomes import (
  TrialResult,
  best_rates,
  evaluation_step,
  evaluations,
  point_losses,
  trial_summary,
)
from experiments.common.search import Point
from experiments.common.trials import BaseConfig, Trial, first_seed_trials, make_trial, probe_devices
from switchlora_jax.data import dataset
from switchlora_jax.data.folders import Dataset
from switchlora_jax.errors import UserError
from switchlora_jax.progress import print_line, progress_bar
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.training.report import describe_warnings

flags.disclaim_key_flags()  # the flags that this module defines are listed by --help of the command that calls it


# --- Flags -------------------------------------------------------------------------------------------------------


def define_sweep_flags(*, seeds: int):
  """Define the flags shared by all commands that run a sweep; `seeds` is the default of --seeds."""
  flags.DEFINE_string("workdir", None, "directory of the sweep; created, or continued if it already holds one")
  flags.DEFINE_integer("seeds", seeds, "number of seeds per variant at its best learning rate", lower_bound=1)
  flags.DEFINE_integer(
    "processes", None, "number of concurrent runs; default: one per CPU core, or one if JAX has accelerators",
    lower_bound=1,
  )  # fmt: skip
  cli.define_quiet()


def define_search_flags():
  """Define the flags of commands that sweep learning rates."""
  flags.DEFINE_integer(
    "extend", 4, "largest number of learning rates added below, and above, the given ones of a dimension until the "
    "best one is inside; 0: run only the given ones", lower_bound=0,
  )  # fmt: skip
  flags.DEFINE_bool("allow_edges", False, "accept a best learning rate at the edge of its sweep")


def parse_rates(flag: str, texts: list[str], names: list[str], all_names: str) -> dict[str, tuple[float, ...]]:
  """{name: rates} of a repeatable flag; values for named variants take precedence over values for all.

  Args:
    texts: the values of the flag, each `RATE,RATE,…` or `NAME,NAME,…:RATE,RATE,…`.
    names: the names that may occur.
    all_names: what the names are, for the error.
  Raises:
    UserError: a name is not one of them, or a rate is not a number.
  """
  for_all, for_named = {}, {}
  for text in texts:
    named, colon, words = text.rpartition(":")
    rates = tuple(parse_numbers(flag, words.split(","), float))
    chosen = named.split(",") if colon else names
    if unknown := set(chosen) - set(names):
      raise UserError(
        f"--{flag}={text} names {', '.join(sorted(unknown))}; expected some of {all_names}, which are "
        f"{', '.join(names)}"
      )
    (for_named if colon else for_all).update(dict.fromkeys(chosen, rates))
  return for_all | for_named


def sweep_options() -> dict:
  """The keyword arguments of `run_sweep` from these flags; losses are read at the last step of a run."""
  values, workdir = flags.FLAGS, sweep_workdir()
  processes = values.processes or default_processes()
  return {"workdir": workdir, "seeds": values.seeds, "processes": processes, "read_at": 1.0}


def sweep_workdir() -> Path:
  """The directory of the sweep.

  Raises:
    UserError: the flag is missing.
  """
  if flags.FLAGS.workdir is None:
    raise UserError("--workdir is missing: give a directory for the runs, for example --workdir=runs/grid")
  return Path(flags.FLAGS.workdir).expanduser()


def parse_numbers(flag: str, words: list[str] | None, kind: type) -> list:
  """The words of a list flag converted to `kind` (int or float).

  Raises:
    UserError: a word is not such a number.
  """
  try:
    return [kind(word) for word in words or []]
  except ValueError as error:
    raise UserError(f"--{flag} must be a list of numbers such as 1e-3,2e-3 or 32,16; {error}") from error


def default_processes() -> int:
  """One run per CPU core if JAX only finds CPUs, else one, because a process takes all accelerators."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return cores if probe_devices()[0] == "cpu" else 1


# --- Running a sweep ---------------------------------------------------------------------------------------------


class Runner(NamedTuple):
  """How a sweep runs its trials; the same in all of its stages.

  Attributes:
    folder: where each trial has its directory.
    processes: number of concurrent runs.
    quiet: whether to print failed runs alone.
    data: from `prepare_datasets`.
    cells: {name: cell} of results.json, from `stored.read_cells`.
    end: called with each result, and whether its process has run now.
  """

  base: BaseConfig
  folder: Path
  processes: int
  quiet: bool
  data: dict[str, Dataset]
  cells: dict[str, dict]
  end: Callable[[TrialResult, bool], None]


def run_sweep(
  base: BaseConfig,
  variants,
  *,
  seeds: int,
  workdir: Path,
  processes: int,
  read_at: float,
  quiet: bool = False,
  extend: int = 0,
  record: Callable[[list[TrialResult]], None] | None = None,
  reuse: bool = True,
) -> list[TrialResult]:
  """Run the unfinished trials of a sweep: all learning rates with the first seed, then the best ones with the others.

  Args:
    seeds: number of seeds per variant at its best learning rate, including the first.
    processes: number of concurrent runs.
    read_at: fraction of a run's steps at which its validation loss is compared.
    quiet: whether to print failed runs alone.
    extend: largest number of rates below, and above, the given ones of a dimension; see `search`. 0: none.
    record: called with all results so far after each run that ends, by one thread at a time.
    reuse: whether a trial counts as finished if results.json has its results but its directory is gone.
  Raises:
    UserError: a config, the data or `read_at` is invalid. Nothing has run yet.
  """
  trials = first_seed_trials(base, variants)
  for trial in trials:
    evaluation_step(trial.config, read_at)
  cells, folder = stored.read_cells(workdir) if reuse else {}, workdir / "cells"
  cli.make_folder(folder)
  data = prepare_datasets(trials, quiet)
  for label, config in {trial.variant.label: trial.config for trial in trials}.items():
    print("".join(f"{label}: {warning}\n" for warning in describe_warnings(config)), end="", flush=True)
  runner = Runner(base, folder, processes, quiet, data, cells, collector(record))
  results = run_trials(runner, trials, "sweep" if len(trials) > len(variants) else "runs")
  while more := extension_trials(base, variants, results, read_at, extend, quiet):
    results += run_trials(runner, more, "extension")
  more = seed_trials(base, variants, results, read_at, seeds)
  return results + (run_trials(runner, more, "seeds") if more else [])


def collector(record: Callable[[list[TrialResult]], None] | None) -> Callable[[TrialResult, bool], None]:
  """`Runner.end` that collects the results, and calls `record` with all of them after each run that ends."""
  ended, lock = [], threading.Lock()

  def end(result: TrialResult, ran: bool):
    with lock:
      ended.append(result)
      if ran and record:
        record(list(ended))

  return end


def extension_trials(
  base: BaseConfig, variants, results: list[TrialResult], read_at: float, limit: int, quiet: bool
) -> list[Trial]:
  """The next trial of each variant whose best learning rates are not inside the sweep yet; see `search.next_point`.

  One trial per variant: the next best point then decides the next trial, and the trials do not depend on the number
  of concurrent runs.
  """
  trials = []
  for variant in variants if limit else ():
    given, losses = (variant.learning_rates, variant.rest_learning_rates), point_losses(variant, results, read_at)
    if all(result.failure for result in results if result.trial.variant is variant):
      continue
    if point := search.next_point(losses, given, limit):
      trials.append(make_trial(base, variant, point[0] if given[0] else None, 0, point[1]))
      best = search.best_point(losses)
      so_far = f"best of {len(losses)} so far: {describe_point(best)}" if best else f"all {len(losses)} diverged"
      if not quiet:
        print_line(f"{variant.label}: {so_far}; next neighbour: {describe_point(point)}")
  return trials


def seed_trials(base: BaseConfig, variants, results: list[TrialResult], read_at: float, seeds: int) -> list[Trial]:
  """The trials of all seeds but the first, at the best learning rates of each variant that has any."""
  best = [(variant, best_rates(variant, results, read_at)) for variant in variants]
  return [make_trial(base, v, point[0], n, point[1]) for n in range(1, seeds) for v, point in best if point]


def describe_point(point: Point) -> str:
  """`learning rate 0.002`, or `learning rate 0.002 (embedding, norms, head: 0.01)`."""
  rest = "" if point[1] is None else f" (embedding, norms, head: {point[1]:g})"
  return f"learning rate {point[0]:g}{rest}"


def prepare_datasets(trials: list[Trial], quiet: bool = False) -> dict[str, Dataset]:
  """Tokenize each dataset once, before several processes need it; returns {label of a variant: dataset}."""
  prepared = {}

  def prepare(config) -> Dataset:
    key = config.data, config.seq_len, config.model.vocab_size, config.steps * config.batch_size
    if key not in prepared:
      prepared[key] = dataset.open_dataset(config, progress=not quiet)
    return prepared[key]

  return {trial.variant.label: prepare(trial.config) for trial in trials}


def run_trials(runner: Runner, trials: list[Trial], stage: str) -> list[TrialResult]:
  """Run the unfinished trials, `runner.processes` at a time; a failed trial does not stop the others.

  Args:
    stage: label of the progress bar.
  Raises:
    UserError: a directory holds a run with another config or other data. No trial has run yet.
  """
  folder, data = runner.folder, runner.data
  for trial in trials:
    check_same_run(folder / trial.name, trial.config, data[trial.variant.label])
  finished = {trial.name: finished_result(trial, folder, data[trial.variant.label], runner.cells) for trial in trials}
  shares, children = SimpleQueue(), Children()
  for share in range(runner.processes):
    shares.put(share)
  shape = dict(total=len(trials), desc=stage, unit="run")
  with progress_bar(**shape, shown=not runner.quiet) as bar, ThreadPoolExecutor(runner.processes) as pool:

    def run_next(trial: Trial) -> TrialResult:
      if not (result := finished[trial.name]):
        share = shares.get()
        try:
          result = run_trial(runner.base, trial, folder, (share, runner.processes), children)
        finally:
          shares.put(share)
      runner.end(result, not finished[trial.name])
      if result.failure or not runner.quiet:
        print_line(f"{trial.name}: {result.failure or trial_summary(result)}")
      bar.update()
      return result

    futures = [pool.submit(run_next, trial) for trial in trials]
    try:
      with children:
        return [future.result() for future in futures]
    except BaseException:  # KeyboardInterrupt in particular
      pool.shutdown(cancel_futures=True)  # else the pool starts all queued trials before it closes
      raise


def run_trial(base: BaseConfig, trial: Trial, folder: Path, share: tuple[int, int], children: Children) -> TrialResult:
  """Run one trial in a process, unless it has finished; its output is appended to a log beside its directory."""
  workdir, log = folder / trial.name, folder / f"{trial.name}.log"
  if is_finished(workdir, trial.config):
    return TrialResult(trial, workdir, None)
  with log.open("a") as output:  # keeps the output of earlier attempts
    code = children.run(trial_command(base, trial, workdir), output, share)
  last_line = (log.read_text().strip().splitlines() or ["no output"])[-1]
  return TrialResult(trial, workdir, f"failed with exit code {code}: {last_line} (see {log})" if code else None)


def finished_result(trial: Trial, folder: Path, data: Dataset, cells: dict[str, dict]) -> TrialResult | None:
  """The result of a trial that has finished in its directory, or else in results.json; None if it has to run."""
  workdir, cell = folder / trial.name, cells.get(trial.name)
  if is_finished(workdir, trial.config):
    return TrialResult(trial, workdir, None)
  if cell is None or cell["failure"]:
    return None
  if (difference := stored.mismatch(cell, trial.config, data)) is None:
    return TrialResult(trial, workdir, None, cell)
  print_line(f"{trial.name} runs, since results.json holds another run of this name ({difference})")
  return None


def trial_command(base: BaseConfig, trial: Trial, workdir: Path) -> list[str]:
  """The command line of a trial."""
  keys = [f"--config.{key}={value}" for key, value in trial.overrides.items()]
  return [sys.executable, "-m", "experiments.pretrain", f"--config={base.file}", *keys, f"--workdir={workdir}"]


def is_finished(workdir: Path, config) -> bool:
  """Whether `workdir` holds a run with this config, see `changed_keys`, that was evaluated after its last step."""
  saved = run_directory.read(workdir)
  if saved is None or run_directory.changed_keys(workdir, saved, config):
    return False
  return any(row["step"] == config.steps for row in evaluations(workdir))


def check_same_run(workdir: Path, config, data: Dataset):
  """Raise `UserError` if `workdir` holds a run with another config or other data, which must not be continued."""
  saved = run_directory.read(workdir)
  if saved and (changed := run_directory.changed_keys(workdir, saved, config)):
    raise run_directory.another_run(workdir, changed)
  run_directory.check_same_data(workdir, saved, data)
