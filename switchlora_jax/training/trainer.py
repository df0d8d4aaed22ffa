"""A training run: build, restore, then step, report, evaluate and save until the last step."""

import contextlib
import logging
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax

from switchlora_jax.analysis.ranks import make_learnt_rank
from switchlora_jax.data import dataset, loader
from switchlora_jax.errors import Stopped
from switchlora_jax.methods.base import TrainState
from switchlora_jax.parallel import processes
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.parallel.supervision import Supervisor
from switchlora_jax.progress import print_line
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs import manifest
from switchlora_jax.runs.checkpoint import Checkpoints
from switchlora_jax.training import anomalies, metrics, report, warm_start
from switchlora_jax.training.evaluation import add_further, first, validate
from switchlora_jax.training.metrics import Metrics, due
from switchlora_jax.training.phases import Phase, build_phases, phase_at
from switchlora_jax.training.throughput import StepTracer
from switchlora_jax.training.writers import default_writers

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
  """A finished run, for its report.

  Attributes:
    phase: the last phase. state: the trained state. data: the dataset.
    rows: all rows of metrics.jsonl.
    first_step: number of steps that were done before this command continued the run; 0 for a new run.
    first_step_at: `time.monotonic()` at the end of the first step of this call; None if it did none.
  """

  phase: Phase
  state: TrainState
  data: dataset.Dataset
  rows: list[dict]
  first_step: int
  first_step_at: float | None


def train(
  config,
  workdir: Path,
  peer_seconds: float = 60,
  on_failure=None,
  heading: str = "",
  quiet: bool = False,
  peak_flops: float | None = None,
) -> Outcome:
  """Train a resolved config in `workdir`, from its newest valid checkpoint if there is one.

  With several processes, each of them calls it with the same config and directory.

  Args:
    peer_seconds: seconds without a heartbeat of another process after which the run ends.
    on_failure: see `Supervisor`; by default a failure is raised in the main thread.
    heading: text to print above the sizes of the run, once the data are ready.
    quiet: whether to print warnings alone: no description of the run, no progress, no results of evaluations.
    peak_flops: operations per second that a device reaches at most, for the metric `mfu`; None: it is not logged.
  Raises:
    UserError: config, data and directory do not match (raised before anything expensive); too many updates in a row
      were not finite; the run used up its rollbacks from loss spikes.
    Stopped: a signal requested the stop, and the run was saved.
  """
  with contextlib.ExitStack() as stack:
    supervisor = stack.enter_context(Supervisor(config.hang_seconds, peer_seconds, on_failure))
    processes.on_all_processes(lambda: dataset.check_data_config(config))
    processes.on_first_process(lambda: run_directory.prepare(workdir, config))
    processes.first_then_others(lambda: stack.enter_context(run_directory.locked(workdir)))
    return _train(config, workdir, supervisor, heading, quiet, peak_flops)


def _train(
  config, workdir: Path, supervisor: Supervisor, heading: str, quiet: bool, peak_flops: float | None
) -> Outcome:
  mesh = make_mesh(fsdp=config.sharding.fsdp)
  phases = build_phases(config, mesh)
  source = processes.on_all_processes(lambda: find_source(config, workdir, phases[0], mesh))
  data = prepare_data(config, quiet)
  if source:
    processes.on_all_processes(lambda: source.check_tokenizer(data.tokenizer_path))
  processes.on_first_process(lambda: run_directory.record(workdir, config, data))
  processes.on_all_processes(lambda: run_directory.check_shared(workdir))
  sizes, text = report.describe_run(config, *(phase.abstract for phase in phases)), report.describe_data(data.summary)
  shown = report.describe_warnings(config) if quiet else [*filter(None, (heading, sizes, text))]
  if shown:  # after all errors in the data
    processes.print_once("\n".join(shown))
  with jax.set_mesh(mesh), Checkpoints(workdir / "checkpoints", config.keep_checkpoints) as checkpoints:
    run = Run(config, workdir, phases, data, checkpoints, supervisor, quiet, peak_flops)
    # Inside Checkpoints, whose exit waits for a save that may need the others. The metrics are closed first, because
    # the process may be ended while `report_errors` waits.
    with supervisor.report_errors(), run:
      first_step = run.begin(source)
      if source:  # what the run starts from
        run.evaluate()
      supervisor.begin_steps()
      stop = False
      while run.done < config.steps and not stop:
        run.step()
        last = run.done == config.steps
        evaluate = due(run.done, config.eval_every) or last
        save = due(run.done, config.checkpoint_every) or last
        report_due = evaluate or save or due(run.done, config.log_every)
        spike_step = run.report() if report_due else None
        stop = supervisor.should_stop()  # after the wait in `report`, during which most signals arrive
        if stop and not report_due:
          spike_step = run.report()
        if spike_step is not None:  # a requested stop then ends at the restored step, which is saved
          run.roll_back(spike_step)
          continue
        if evaluate:
          run.evaluate()
        if save or stop:
          run.save()
  if run.done < config.steps:
    saved = f"after step {run.done}, which is saved; the same command continues"
    unsaved = "before anything was saved; the same command starts again"  # also after a rollback to the start
    raise Stopped(f"stopped by {supervisor.cause} {saved if run.done else unsaved}")
  return Outcome(run.phase, run.state, data, metrics.read(workdir / "metrics.jsonl"), first_step, run.first_step_at)


class Run:
  """A run in progress; a context manager that closes its metrics when it exits.

  Attributes:
    done: number of steps done so far.
    state: the train state after them.
    phase: the phase that `state` belongs to.
    metrics: collects and writes the metrics of the steps.
    first_step_at: `time.monotonic()` at the end of the first step; None before that.
  """

  def __init__(
    self,
    config,
    workdir: Path,
    phases: list[Phase],
    data: dataset.Dataset,
    checkpoints: Checkpoints,
    supervisor: Supervisor,
    quiet: bool,
    peak_flops: float | None,
  ):
    self._config, self._workdir, self._phases, self._checkpoints = config, workdir, phases, checkpoints
    self._supervisor, self._quiet = supervisor, quiet
    self._data, self._batch_of = data, loader.make_batch_fn(data.train, config)
    self._validate = make_evaluate(config, phases[0], data, quiet, supervisor.mark)
    self._peak_flops = peak_flops and peak_flops * jax.device_count()
    self._tracer = StepTracer(workdir / "tensorboard", config.profile_steps if processes.is_first() else 0)
    self.metrics, self.first_step_at = None, None

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    self._tracer.close()
    try:
      if self.metrics:
        self.metrics.close()
    except Exception as error:
      if kind is None:
        raise
      log.warning("the metrics could not be closed: %s", error)  # the exception in flight is what ended the run

  def begin(self, source: warm_start.Source | None) -> int:
    """Restore the newest valid checkpoint; without one, create the first state, from the weights of `source` if given.

    Returns:
      The number of steps done.
    """
    self._source = source
    self._supervisor.mark("restoring the newest checkpoint")
    self._restore()
    self._resume(self.done if self.done or not source else -1)  # step 0 is evaluated again
    return self.done

  def roll_back(self, step: int) -> None:
    """Restore the last checkpoint, and skip the batches up to that of the loss spike at step number `step`.

    The decision depends only on the metrics: a run that is killed before its next save repeats it.

    Raises:
      UserError: the run has used up its rollbacks.
    """
    self._supervisor.mark(f"going back from step {step}")
    before, self.state = self.state.spikes, None  # there may be no memory for two states
    anomalies.check_rollback_allowed(before, self._config.spike, step)
    self.metrics.close()
    self._restore()
    self.state = self.state._replace(spikes=anomalies.state_after_rollback(self.state.spikes, before, step - self.done))
    self._resume(self.done)

  def _restore(self):
    state = self._checkpoints.restore(lambda step: phase_at(self._phases, step).abstract)
    if state is None:
      state = self._source.state() if self._source else self._phases[0].create()
    self.state, self.done = state, int(state.step)

  def _resume(self, kept: int):
    """Prepare for the next step; metrics.jsonl keeps its rows up to step `kept`."""
    self._offset = int(self.state.spikes.offset)
    dataset.check_length_after_skips(self._data, self._config, self._offset)
    self.phase = phase_at(self._phases, self.done)
    writers = default_writers(self._workdir, kept) if processes.is_first() else []
    self.metrics = Metrics(self._config, self.done, writers, self._quiet, self._peak_flops)
    self._supervisor.mark("start of training")

  def step(self) -> None:
    """Do one training step, in the phase that it belongs to. Returns while the devices are still computing."""
    self._checkpoints.check()  # raises if a save in the background has failed
    main = self._phases[-1]
    if hand_over := self.phase is not main and self.done == main.start:
      self.state, self.phase = warm_start.hand_over(self.state, self.phase, main), main
      if processes.is_first() and not self._quiet:
        print_line(f"step {self.done}: hand-over from full rank to {self._config.method}")
    self._supervisor.mark(f"step {self.done + 1}, reading its batch")
    self._tracer.before_step()
    with jax.profiler.StepTraceAnnotation("train", step_num=self.done + 1):
      with self.metrics.reading_batch():
        batch = self.phase.shard_batch(self._batch_of(self.done + self._offset))
      self._supervisor.mark(f"step {self.done + 1}, on the devices")
      self.state, values = self.phase.step(self.state, batch)
    self._tracer.after_step(values)
    self.done += 1
    if self.first_step_at is None:
      jax.block_until_ready(values)
      self.first_step_at = time.monotonic()
    self.metrics.add(self.done, values | ({"hand_over": 1} if hand_over else {}))

  def report(self) -> int | None:
    """Wait for the steps so far, write their metrics, show the progress if that is due, and check the metrics.

    Returns:
      The number of the step from whose loss spike the run must roll back, or None.
    Raises:
      UserError: too many updates in a row were not finite.
    """
    rows = self.metrics.flush()
    if due(self.done, self._config.log_every) or self.done == self._config.steps:
      self.metrics.print_progress()
    spike_step = anomalies.report_spikes(rows, self._config.spike, log_warnings=processes.is_first())
    if spike_step is None:
      anomalies.check_progress(rows, self._config)
    return spike_step

  def evaluate(self) -> None:
    """Evaluate the state, and write the validation metrics. After `report`."""
    self._supervisor.mark(f"evaluation after step {self.done}")
    self.metrics.write_evaluation(self.done, self._validate(self.phase, self.state))

  def save(self) -> None:
    """Start to save the state, after config.json and metrics.jsonl on disk cover it. After `report`."""
    self._supervisor.mark(f"saving step {self.done}")
    processes.on_first_process(self.metrics.sync)
    processes.on_first_process(lambda: run_directory.update(self._workdir, self._config))
    self._checkpoints.save(self.done, self.state)


def find_source(config, workdir: Path, phase: Phase, mesh) -> warm_start.Source | None:
  """The source that `warm_start_from` names; None without one, and once the run has a finished checkpoint."""
  started = manifest.directories(workdir / "checkpoints")
  return warm_start.Source(config, phase, mesh) if config.warm_start_from and not started else None


def prepare_data(config, quiet: bool = False) -> dataset.Dataset:
  """The packed dataset. Process 0 prepares it; the others open it, or prepare their own if they share no cache."""
  share = (jax.process_index(), jax.process_count())
  progress = processes.is_first() and not quiet
  data = processes.first_then_others(lambda: dataset.open_dataset(config, progress=progress, share=share))
  further = {f"fingerprint of data.eval_also={text.label}": text.fingerprint for text in data.also}
  processes.check_same({"data fingerprint": data.fingerprint} | further)
  return data


def make_evaluate(config, start: Phase, data: dataset.Dataset, quiet: bool = False, mark=lambda what: None):
  """The evaluation of a run: (phase, state) -> metrics of the first `eval_tokens` tokens of each validation text.

  Adds `learnt_rank`, the effective rank of W_t - W_0, unless `warm_start_from` is set: then W_0 cannot be drawn again.

  Args:
    start: the first phase of the run.
    quiet: whether to show no progress.
    mark: called with a description before each further text is evaluated; see `Supervisor.mark`.
  """
  select = partial(first, tokens=config.eval_tokens, padded=config.data.packing == "pad")
  rows, also = select(data.valid), [text._replace(rows=select(text.rows)) for text in data.also]
  batch_size = config.batch_size // config.accumulation
  learnt_rank = None if config.warm_start_from else make_learnt_rank(start)

  def evaluate(phase, state) -> dict[str, float]:
    values = validate(phase, state, rows, batch_size, data.bytes_per_token, quiet)
    for text in also:
      mark(f"evaluation of {text.label}")
      add_further(values, text.label, validate(phase, state, text.rows, batch_size, text.bytes_per_token, quiet))
    if learnt_rank is not None:
      values["learnt_rank"] = float(learnt_rank(state.params, state.frozen, phase.scale))
    return values

  return evaluate
