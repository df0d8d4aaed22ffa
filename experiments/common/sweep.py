"""Sweeps of training runs with equal token budgets: the part that compare, ablate and reproduce share.

A variant is one line of a table. Each variant is trained with the first seed at each of its learning rates, and with
the remaining seeds at the best of them. `search` has the rule by which the sweep of the first seed is extended. Each
trial is a run of `experiments.pretrain` in its own process and its own directory, and can be inspected, continued and
stopped like any other run. A trial that is finished in results.json does not need its directory: see `stored`.
"""

import functools
import importlib
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from experiments.common import cli, search, stored
from experiments.common.children import Children
from experiments.common.search import Point
from switchlora_jax.config import resolve
from switchlora_jax.data import dataset
from switchlora_jax.errors import UserError
from switchlora_jax.progress import print_line, progress_bar
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.training import metrics
from switchlora_jax.training.report import describe_warnings

flags.disclaim_key_flags()  # the flags that this module defines are listed by --help of the command that calls it


class BaseConfig(NamedTuple):
  """The config that all trials of a sweep start from.

  Attributes:
    file: path of the config file.
    overrides: keys changed relative to the file.
    config: the file's config with these overrides applied.
  """

  file: str
  overrides: dict[str, Any]
  config: ConfigDict


class Variant(NamedTuple):
  """One line of a table.

  Attributes:
    label: its name in tables and legends.
    overrides: keys changed relative to the base config.
    learning_rates: candidates for the first seed; empty selects the method's default.
    paper: the paper's perplexity, if it reports one.
    rest_learning_rates: candidates for embedding, norms and head, each with each of `learning_rates`; empty: not swept.
  """

  label: str
  overrides: dict[str, Any]
  learning_rates: tuple[float, ...] = ()
  paper: float | None = None
  rest_learning_rates: tuple[float, ...] = ()


class Trial(NamedTuple):
  """One run of a variant: its learning rates, its seed and the resolved config.

  Attributes:
    rest_learning_rate: of embedding, norms and head; None if it is not swept.
  """

  variant: Variant
  learning_rate: float
  seed: int
  config: FrozenConfigDict
  overrides: dict[str, Any]
  rest_learning_rate: float | None = None

  @property
  def name(self) -> str:
    """The name of its directory: `switchlora-rank-16_lr=0.02_seed=0`, or `full_lr=0.002_rest=0.01_seed=0`."""
    words = re.sub(r"[^\w.]+", "-", self.variant.label).strip("-")
    rest = "" if self.rest_learning_rate is None else f"_rest={self.rest_learning_rate:g}"
    return f"{words}_lr={self.learning_rate:g}{rest}_seed={self.seed}"

  @property
  def point(self) -> Point:
    """Its place in the sweep."""
    return self.learning_rate, self.rest_learning_rate


class TrialResult(NamedTuple):
  """A trial that has ended.

  Attributes:
    workdir: the directory of its run.
    failure: the reason if it failed, else None.
    cell: its entry of results.json, see `stored`, if the trial was finished there; `workdir` may not exist then.
  """

  trial: Trial
  workdir: Path
  failure: str | None
  cell: dict | None = None


# --- Flags and base configs --------------------------------------------------------------------------------------


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


def base_from_flags() -> BaseConfig:
  """The base config given by this command's own --config flags."""
  flag = flags.FLAGS["config"]
  return BaseConfig(config_flags.get_config_filename(flag), config_flags.get_override_values(flag), flags.FLAGS.config)


def base_from_file(name: str, overrides: dict[str, Any]) -> BaseConfig:
  """The base config `configs/{name}.py` with the given overrides."""
  config = ConfigDict(importlib.import_module(f"configs.{name}").get_config())
  update_config(config, overrides)
  return BaseConfig(str(cli.CONFIGS / f"{name}.py"), overrides, config)


def parse_config_value(config: ConfigDict, key: str, text: str):
  """Convert a value from the command line to the type of a config key.

  Raises:
    UserError: the key does not exist, or the text does not have its type.
  """
  try:
    kind = config.get_type(key) if "." not in key else config[key.rsplit(".", 1)[0]].get_type(key.rsplit(".", 1)[1])
  except (KeyError, AttributeError) as error:
    raise UserError(f"unknown config key {key!r}; configs/base.py lists all keys") from error
  try:
    return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
  except (KeyError, ValueError, AttributeError) as error:  # AttributeError: a section such as `switch`
    raise UserError(f"{key} must be of type {kind.__name__}; found {text!r}") from error


def update_config(config: ConfigDict, overrides: dict[str, Any]) -> None:
  """Set flattened keys such as `switch.interval` in place.

  Raises:
    UserError: a key does not exist, or its value has the wrong type.
  """
  for key, value in overrides.items():
    try:
      config.update_from_flattened_dict({key: value})
    except (KeyError, AttributeError) as error:
      raise UserError(f"unknown config key {key!r}; configs/base.py lists all keys") from error
    except TypeError as error:
      raise UserError(f"{key} (={value!r}) has the wrong type: {error}") from error


def default_processes() -> int:
  """One run per CPU core if JAX only finds CPUs, else one, because a process takes all accelerators."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return cores if probe_devices()[0] == "cpu" else 1


@functools.cache
def probe_devices() -> tuple[str, int]:
  """(platform, number of devices) of a run, such as ("gpu", 8); a child process queries them and releases them again.

  Raises:
    UserError: JAX does not start.
  """
  probe = [sys.executable, "-c", "import jax; print(jax.default_backend(), jax.device_count())"]
  done = subprocess.run(probe, capture_output=True, text=True)
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    raise UserError(f"JAX does not find its devices: {reason}; a run would not start either: check the drivers")
  platform, count = done.stdout.split()[-2:]
  return platform, int(count)


# --- Running a sweep ---------------------------------------------------------------------------------------------


def make_trial(
  base: BaseConfig,
  variant: Variant,
  learning_rate: float | None,
  seed_number: int,
  rest_learning_rate: float | None = None,
) -> Trial:
  """A trial of a variant.

  Args:
    learning_rate: None selects the method's default.
    seed_number: added to the seed of the base config.
    rest_learning_rate: of embedding, norms and head; None if it is not swept: the config's.
  """
  config = base.config.copy_and_resolve_references()  # a plain copy would share the placeholder of learning_rate
  update_config(config, variant.overrides)
  own = {"seed": config.seed + seed_number}
  if learning_rate is not None:
    own["learning_rate"] = learning_rate
  if rest_learning_rate is not None:
    own["rest_learning_rate"] = rest_learning_rate
  update_config(config, own)
  platform, devices = probe_devices()
  resolved = resolve(config, devices, platform)
  overrides = base.overrides | variant.overrides | own
  return Trial(variant, resolved.learning_rate, resolved.seed, resolved, overrides, rest_learning_rate)


def first_seed_trials(base: BaseConfig, variants) -> list[Trial]:
  """The trials of the first seed: each variant at each of its learning rates.

  Raises:
    UserError: a trial's config is invalid, or two trials have the same name. Nothing has run yet.
  """
  trials = [
    make_trial(base, variant, rate, 0, rest)
    for variant in variants
    for rate in variant.learning_rates or (None,)
    for rest in variant.rest_learning_rates or (None,)
  ]
  names = [trial.name for trial in trials]
  if duplicates := {name for name in names if names.count(name) > 1}:
    raise UserError(f"the sweep has duplicate runs ({', '.join(sorted(duplicates))}); give each value once")
  return trials


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
  fingerprints = prepare_datasets(trials, quiet)
  for label, config in {trial.variant.label: trial.config for trial in trials}.items():
    print("".join(f"{label}: {warning}\n" for warning in describe_warnings(config)), end="", flush=True)
  ended, lock = [], threading.Lock()

  def end(result: TrialResult, ran: bool):
    with lock:
      ended.append(result)
      if ran and record:
        record(list(ended))

  shared = dict(fingerprints=fingerprints, folder=folder, processes=processes, quiet=quiet, cells=cells, end=end)
  stage = "sweep" if len(trials) > len(variants) else "runs"
  results = run_trials(base, trials, stage=stage, **shared)
  while more := extension_trials(base, variants, results, read_at, extend, quiet):
    results += run_trials(base, more, stage="extension", **shared)
  best = [(variant, best_rates(variant, results, read_at)) for variant in variants]
  more = [make_trial(base, v, point[0], n, point[1]) for n in range(1, seeds) for v, point in best if point]
  return results + (run_trials(base, more, stage="seeds", **shared) if more else [])


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


def describe_point(point: Point) -> str:
  """`learning rate 0.002`, or `learning rate 0.002 (embedding, norms, head: 0.01)`."""
  rest = "" if point[1] is None else f" (embedding, norms, head: {point[1]:g})"
  return f"learning rate {point[0]:g}{rest}"


def prepare_datasets(trials: list[Trial], quiet: bool = False) -> dict[str, str]:
  """Tokenize each dataset once, before several processes need it; returns {label of a variant: fingerprint}."""
  prepared = {}

  def fingerprint(config) -> str:
    key = config.data, config.seq_len, config.model.vocab_size, config.steps * config.batch_size
    if key not in prepared:
      prepared[key] = dataset.open_dataset(config, progress=not quiet).fingerprint
    return prepared[key]

  return {trial.variant.label: fingerprint(trial.config) for trial in trials}


def run_trials(
  base: BaseConfig,
  trials: list[Trial],
  *,
  fingerprints: dict[str, str],
  folder: Path,
  processes: int,
  stage: str,
  quiet: bool,
  cells: dict[str, dict],
  end: Callable[[TrialResult, bool], None],
) -> list[TrialResult]:
  """Run the unfinished trials, `processes` at a time; a failed trial does not stop the others.

  Args:
    fingerprints: from `prepare_datasets`.
    stage: label of the progress bar.
    quiet: whether to print failed runs alone.
    cells: {name: cell} of results.json, from `stored.read_cells`.
    end: called with each result, and whether its process has run now.
  Raises:
    UserError: a directory holds a run with another config or other data. No trial has run yet.
  """
  for trial in trials:
    check_same_run(folder / trial.name, trial.config, fingerprints[trial.variant.label])
  finished = {trial.name: finished_result(trial, folder, fingerprints[trial.variant.label], cells) for trial in trials}
  shares, children = SimpleQueue(), Children()
  for share in range(processes):
    shares.put(share)
  shape = dict(total=len(trials), desc=stage, unit="run")
  with progress_bar(**shape, shown=not quiet) as bar, ThreadPoolExecutor(processes) as pool:

    def run_next(trial: Trial) -> TrialResult:
      if not (result := finished[trial.name]):
        share = shares.get()
        try:
          result = run_trial(base, trial, folder, (share, processes), children)
        finally:
          shares.put(share)
      end(result, not finished[trial.name])
      if result.failure or not quiet:
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


def finished_result(trial: Trial, folder: Path, fingerprint: str, cells: dict[str, dict]) -> TrialResult | None:
  """The result of a trial that has finished in its directory, or else in results.json; None if it has to run."""
  workdir, cell = folder / trial.name, cells.get(trial.name)
  if is_finished(workdir, trial.config):
    return TrialResult(trial, workdir, None)
  if cell is None or cell["failure"]:
    return None
  if (difference := stored.mismatch(cell, trial.config, fingerprint)) is None:
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


def check_same_run(workdir: Path, config, fingerprint: str):
  """Raise `UserError` if `workdir` holds a run with another config or other data, which must not be continued."""
  saved = run_directory.read(workdir)
  if saved and (changed := run_directory.changed_keys(workdir, saved, config)):
    raise run_directory.another_run(workdir, changed)
  run_directory.check_same_data(workdir, saved, fingerprint)


# --- Reading results ---------------------------------------------------------------------------------------------


def evaluations(workdir: Path) -> list[dict]:
  """The evaluation rows of a run's metrics.jsonl."""
  return list(read_metrics(workdir)[0])


def read_metrics(workdir: Path) -> tuple[list[dict], list[dict]]:
  """The evaluation rows of a run's metrics.jsonl, and tokens and the `metrics.TIMED` of its training rows.

  The rows are kept in memory until the file changes. They must not be changed.
  """
  path = workdir / "metrics.jsonl"
  found = path.stat() if path.exists() else None
  return _parse_metrics(path, found and (found.st_mtime_ns, found.st_size))


@functools.cache
def _parse_metrics(path: Path, version) -> tuple[list[dict], list[dict]]:
  del version  # of the file, a key of the cache
  rows = metrics.read(path)
  kept = ("tokens", *metrics.TIMED)
  timed = [{key: row[key] for key in kept if key in row} for row in rows if "tokens_per_second" in row]
  return [row for row in rows if "val_loss" in row], timed


def trial_evaluations(result: TrialResult) -> list[dict]:
  """The evaluation rows of a trial, `step`, `val_loss` and `val_ppl` at least, from its directory or results.json."""
  if result.cell is None:
    return evaluations(result.workdir)
  perplexity = lambda loss: None if loss is None or loss > math.log(sys.float_info.max) else math.exp(loss)
  return [{"step": step, "val_loss": loss, "val_ppl": perplexity(loss)} for step, loss in result.cell["curve"]]


def evaluation_step(config, read_at: float) -> int:
  """The step whose validation loss is compared: the fraction `read_at` of the run's steps.

  Raises:
    UserError: the run has no evaluation at that step.
  """
  step = round(read_at * config.steps)
  if step != config.steps and step % config.eval_every:
    raise UserError(
      f"the validation loss is compared at step {step} ({read_at:g} of {config.steps} steps), but eval_every "
      f"(={config.eval_every}) has no evaluation there; set --config.eval_every to a divisor of {step}"
    )
  return step


def evaluation_loss(result: TrialResult, read_at: float) -> float:
  """The validation loss of a trial at `evaluation_step`, in nats per token; infinite if it failed or diverged.

  Raises:
    UserError: the run has no evaluation at that step, because it was made with another `eval_every`.
  """
  if result.failure:
    return math.inf
  step = evaluation_step(result.trial.config, read_at)
  for row in trial_evaluations(result):
    if row["step"] == step:
      return math.inf if row["val_ppl"] is None else row["val_loss"]
  if result.cell:
    raise UserError(
      f"the entry {result.trial.name} of results.json has no evaluation at step {step}; delete the entry, and the same "
      "command runs it again"
    )
  raise UserError(f"{result.workdir} has no evaluation at step {step}; delete it, and the same command runs it again")


def point_losses(variant: Variant, results: list[TrialResult], read_at: float) -> dict[Point, float]:
  """{point: loss} of a variant's first seed, infinite for runs that failed or diverged."""
  own = [result for result in results if result.trial.variant is variant]
  first_seed = min(result.trial.seed for result in own)
  return {r.trial.point: evaluation_loss(r, read_at) for r in own if r.trial.seed == first_seed}


def best_rates(variant: Variant, results: list[TrialResult], read_at: float) -> Point | None:
  """The learning rates with the lowest loss for a variant's first seed; None if no trial has a finite loss."""
  return search.best_point(point_losses(variant, results, read_at))


def best_learning_rate(variant: Variant, results: list[TrialResult], read_at: float) -> float | None:
  """The first of `best_rates`."""
  best = best_rates(variant, results, read_at)
  return best[0] if best else None


def trial_summary(result: TrialResult) -> str:
  """The outcome of a trial in a few words, for the progress output."""
  last = trial_evaluations(result)[-1]
  return "diverged" if last["val_ppl"] is None else f"validation perplexity {last['val_ppl']:.2f}"
