"""The story of a run: build, restore, then step, report, evaluate, save until the last step."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import jax

from switchlora_jax.analysis.ranks import make_learnt_rank
from switchlora_jax.data import batches, dataset
from switchlora_jax.errors import Stopped
from switchlora_jax.methods.base import TrainState
from switchlora_jax.parallel import processes
from switchlora_jax.parallel.sharding import make_mesh
from switchlora_jax.parallel.supervision import Supervisor
from switchlora_jax.runs import directory as run_directory
from switchlora_jax.runs import manifest
from switchlora_jax.runs.checkpoint import Checkpoints
from switchlora_jax.training import anomalies, metrics, report, warm_start
from switchlora_jax.training.evaluation import first, validate
from switchlora_jax.training.phases import Phase, build_phases, phase_at
from switchlora_jax.training.train_log import Log, due


class Outcome(NamedTuple):
  """What a finished run hands to its report: the trained state, its numbers, and where it began this time."""

  phase: Phase
  state: TrainState
  data: dataset.Dataset
  rows: list[dict]
  first_step: int


def train(config, workdir: Path, peer_seconds: float = 60, on_failure=None) -> Outcome:
  """Train as `config` (resolved) says in `workdir`, from its newest good checkpoint if there is one.

  With several processes, each of them calls it with the same config and directory.

  Args:
    peer_seconds: without a sign of life of another process after which the run ends.
    on_failure: of `Supervisor`; by default an exception is raised in the main thread.
  Raises:
    UserError: before anything expensive where config, data or directory do not fit together; while
      training when too many updates in a row were not finite, or the run went back from too many loss spikes.
    Stopped: it was told to by a signal, and has saved.
  """
  with contextlib.ExitStack() as stack:
    supervisor = stack.enter_context(Supervisor(config.hang_seconds, peer_seconds, on_failure))
    processes.on_all_processes(lambda: dataset.check(config))
    processes.on_first_process(lambda: run_directory.prepare(workdir, config))
    processes.first_then_others(lambda: stack.enter_context(run_directory.held(workdir)))
    return _train(config, workdir, supervisor)


def _train(config, workdir: Path, supervisor: Supervisor) -> Outcome:
  mesh = make_mesh(fsdp=config.sharding.fsdp)
  phases = build_phases(config, mesh)
  source = processes.on_all_processes(lambda: find_source(config, workdir, phases[0], mesh))
  processes.print_once(report.describe(config, *(phase.abstract for phase in phases)))
  data = prepare_data(config)
  if source:
    processes.on_all_processes(lambda: source.check_tokenizer(data.tokenizer_path))
  processes.on_first_process(lambda: run_directory.record(workdir, config, data))
  processes.on_all_processes(lambda: run_directory.check_shared(workdir))
  with jax.set_mesh(mesh), Checkpoints(workdir / "checkpoints", config.keep_checkpoints) as checkpoints:
    run = Run(config, workdir, phases, data, checkpoints, supervisor)
    with supervisor.report_errors():  # before waiting for checkpoints, which may need the other processes
      first_step = run.begin(source)
      supervisor.begin_steps()
      stop = False
      while run.done < config.steps and not stop:
        try:
          run.step()
          stop, last = supervisor.should_stop(), run.done == config.steps
          if due(run.done, config.eval_every) or last:
            run.evaluate()
          if due(run.done, config.checkpoint_every) or last or stop:
            run.save()
        except anomalies.SpikeDetected as spiked:  # nothing was saved since: `save` looks first
          stop = stop or supervisor.should_stop()  # not when it comes to this step again
          run.go_back(spiked.step)
      run.log.close()
  if run.done < config.steps:
    saved = f"after step {run.done}, which is saved; the same command continues"
    nothing = "before anything was saved; the same command starts again"  # it went back to its start
    raise Stopped(f"stopped by {supervisor.cause} {saved if run.done else nothing}")
  return Outcome(run.phase, run.state, data, metrics.read(workdir / "metrics.jsonl"), first_step)


class Run:
  """A run in flight: where it stands, and what can happen to it.

  Attributes:
    done: steps done so far. state: before the next one. program: which made it, of the phase it is in.
    log: where the numbers of its steps go.
  """

  def __init__(
    self,
    config,
    workdir: Path,
    phases: list[Phase],
    data: dataset.Dataset,
    checkpoints: Checkpoints,
    supervisor: Supervisor,
  ):
    self._config, self._workdir, self._phases, self._checkpoints = config, workdir, phases, checkpoints
    self._supervisor = supervisor
    self._data, self._batch_of = data, batches.by_step(data.train, config)
    self._validate = make_evaluate(config, phases[0], data)

  def begin(self, source: warm_start.Source | None) -> int:
    """Take up the newest good checkpoint, or start, from the weights of `source` if there is one; returns `done`."""
    self._source = source
    self._supervisor.mark("restoring the newest checkpoint")
    self._restore()
    self._go_on()
    return self.done

  def go_back(self, step: int):
    """Leave out the batch of a loss spike, that of step number `step`, and what was done since the last checkpoint.

    All follows from the numbers of the steps: a run that is killed on the way, and started again, does the same.
    """
    self._supervisor.mark(f"going back from step {step}")
    before, self.state = self.state.spikes, None  # there may be no room for two states
    anomalies.check_rollback_allowed(before, self._config.spike, step)
    self.log.close()
    self._restore()
    self.state = self.state._replace(spikes=anomalies.state_after_rollback(self.state.spikes, before, step - self.done))
    self._go_on()

  def _restore(self):
    state = self._checkpoints.restore(lambda step: phase_at(self._phases, step).abstract)
    if state is None:
      state = self._source.state() if self._source else self._phases[0].create()
    self.state, self.done = state, int(state.step)

  def _go_on(self):
    self._ahead = int(self.state.spikes.offset)
    dataset.check_ahead(self._data, self._config, self._ahead)
    self.phase = phase_at(self._phases, self.done)
    self.log = Log(self._workdir, self._config, self.done)
    self._supervisor.mark("start of training")

  def step(self):
    """One training step, in the program whose phase it belongs to."""
    self._checkpoints.check()  # a save that has failed in the meantime
    main = self._phases[-1]
    if self.phase is not main and self.done == main.start:
      self.state, self.phase = warm_start.hand_over(self.state, self.phase, main), main
    self._supervisor.mark(f"step {self.done + 1}, reading its batch")
    rows = self.phase.shard_batch(self._batch_of(self.done + self._ahead))
    self._supervisor.mark(f"step {self.done + 1}, on the devices")
    self.state, numbers = self.phase.step(self.state, rows)
    self.done += 1
    self.log.add(self.done, numbers)

  def evaluate(self):
    """Write what the validation rows say of the state."""
    self.log.flush()
    self._supervisor.mark(f"evaluation after step {self.done}")
    self.log.evaluation(self.done, self._validate(self.phase, self.state))

  def save(self):
    """Begin to save the state; what config.json and metrics.jsonl say of it is on disk before it can be returned to."""
    self.log.flush()
    self._supervisor.mark(f"saving step {self.done}")
    processes.on_first_process(self.log.settle)
    processes.on_first_process(lambda: run_directory.update(self._workdir, self._config))
    self._checkpoints.save(self.done, self.state)


def find_source(config, workdir: Path, phase: Phase, mesh) -> warm_start.Source | None:
  """What `warm_start_from` names; from its first finished checkpoint on, a run does not need it any more."""
  started = manifest.directories(workdir / "checkpoints")
  return warm_start.Source(config, phase, mesh) if config.warm_start_from and not started else None


def prepare_data(config) -> dataset.Dataset:
  """The packed rows, made by the first process and found by the others, or made again where they share no cache."""
  share = (jax.process_index(), jax.process_count())
  data = processes.first_then_others(lambda: dataset.prepare(config, progress=processes.is_first(), share=share))
  processes.check_same({"data fingerprint": data.fingerprint})
  processes.print_once(report.describe_data(data.summary))
  return data


def make_evaluate(config, start: Phase, data: dataset.Dataset):
  """(program, state) -> what `validate` says of the first `eval_tokens` tokens of the validation rows.

  And, unless the run started from another's weights, the effective rank of what the weights have learnt since.
  """
  rows, batch_size = first(data.valid, config.eval_tokens), config.batch_size // config.accumulation
  learnt_rank = None if config.warm_start_from else make_learnt_rank(start)

  def evaluate(phase, state) -> dict[str, float]:
    numbers = validate(phase, state, rows, batch_size, data.bytes_per_token)
    if learnt_rank is not None:
      numbers["learnt_rank"] = float(learnt_rank(state.params, state.frozen, phase.scale))
    return numbers

  return evaluate
