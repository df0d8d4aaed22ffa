"""The story of a run: build, restore, then step, report, evaluate, save until the last step."""

import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from switchlora_jax import dataset, hosts, metrics, report, run_directory, train_state, warm_start
from switchlora_jax.analysis import make_learnt_rank
from switchlora_jax.checkpoint import Checkpoints
from switchlora_jax.errors import UserError
from switchlora_jax.evaluation import first, validate
from switchlora_jax.program import Program, phases, trained_by
from switchlora_jax.sharding import make_mesh


class Outcome(NamedTuple):
  """What a finished run hands to its report: the trained state, its numbers, and where it began this time."""

  program: Program
  state: train_state.TrainState
  data: dataset.Dataset
  rows: list[dict]
  first_step: int


def train(config, workdir: Path) -> Outcome:
  """Train as `config` (resolved) says in `workdir`, from its newest good checkpoint if there is one.

  With several processes, each of them calls it with the same config and directory.

  Raises:
    UserError: before anything expensive where config, data or directory do not fit together; while
      training when too many updates in a row were not finite.
  """
  hosts.everywhere(lambda: dataset.check(config))
  hosts.on_first(lambda: run_directory.prepare(workdir, config))
  mesh = make_mesh(fsdp=config.sharding.fsdp)
  programs = phases(config, mesh)
  # From its first finished checkpoint on, a run does not need the other any more.
  started = any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))
  wanted = config.warm_start_from and not started
  open_source = lambda: warm_start.Source(config, programs[0], mesh) if wanted else None
  source = hosts.everywhere(open_source)
  hosts.say(report.describe(config, *(program.abstract for program in programs)))
  data = prepare_data(config)
  if source:
    hosts.everywhere(lambda: source.check_tokenizer(data.tokenizer_path))
  hosts.on_first(lambda: run_directory.record(workdir, config, data))
  hosts.everywhere(lambda: run_directory.check_shared(workdir))
  evaluate, batch_of = make_evaluate(config, programs[0], data), dataset.batches(data, config)

  with jax.set_mesh(mesh), Checkpoints(workdir / "checkpoints", config.keep_checkpoints) as checkpoints:
    state = checkpoints.restore(lambda step: trained_by(programs, step).abstract)
    if state is None:
      state = source.state() if source else programs[0].create()
    first = int(state.step)
    program = trained_by(programs, first)
    log = Log(workdir, config, first)
    for step in range(first, config.steps):
      if program is not programs[-1] and step == programs[-1].start:
        state, program = warm_start.hand_over(state, program, programs[-1]), programs[-1]
      state, numbers = program.step(state, program.place(batch_of(step)))
      done = step + 1
      last = done == config.steps
      log.add(done, numbers)
      if due(done, config.eval_every) or last:
        log.flush()
        log.evaluation(done, evaluate(program, state))
      if due(done, config.checkpoint_every) or last:
        log.flush()  # the lines of a step are on disk before the step can be returned to
        hosts.on_first(lambda: run_directory.update(workdir, config))
        checkpoints.save(done, state)
    log.close()
  return Outcome(program, state, data, metrics.read(workdir / "metrics.jsonl"), first)


def prepare_data(config) -> dataset.Dataset:
  """The packed rows, made by the first process and found by the others, or made again where they share no cache."""
  share = (jax.process_index(), jax.process_count())
  data = hosts.first_then_others(lambda: dataset.prepare(config, progress=hosts.is_first(), share=share))
  hosts.check_same({"data fingerprint": data.fingerprint})
  hosts.say(report.describe_data(data.summary))
  return data


def due(step: int, every: int) -> bool:
  """Whether something that happens every so many steps happens after `step`."""
  return step % every == 0


def make_evaluate(config, start: Program, data: dataset.Dataset):
  """(program, state) -> what `validate` says of the first `eval_tokens` tokens of the validation rows.

  And, unless the run started from another's weights, the effective rank of what the weights have learnt since.
  """
  rows, batch_size = first(data.valid, config.eval_tokens), config.batch_size // config.accumulation
  learnt_rank = None if config.warm_start_from else make_learnt_rank(start)

  def evaluate(program, state) -> dict[str, float]:
    numbers = validate(program, state, rows, batch_size, data.bytes_per_token)
    if learnt_rank is not None:
      numbers["learnt_rank"] = float(learnt_rank(state.params, state.frozen, program.scale))
    return numbers

  return evaluate


class Log:
  """Collects the numbers of each step on the device, and writes them out every `log_every` steps.

  On every process, since each must find out by itself that the run goes nowhere; only the first writes.
  """

  def __init__(self, workdir: Path, config, start: int):
    self._metrics, self._config = metrics.Metrics(workdir, start) if hosts.is_first() else None, config
    self._bar = metrics.progress_bar(config.steps, start, shown=hosts.is_first())
    self._waiting, self._since = [], time.monotonic()

  def add(self, step: int, numbers: dict):
    """Take the numbers of a step, still being computed."""
    self._waiting.append({"step": step} | numbers)
    if due(step, self._config.log_every):
      self.flush()

  def flush(self):
    """Wait for the numbers collected so far and write them; stop the run if it goes nowhere."""
    if not self._waiting:
      return
    rows = [{name: value.item() for name, value in row.items()} for row in jax.tree.map(np.asarray, self._waiting)]
    seconds = time.monotonic() - self._since
    speed = len(rows) * self._config.batch_size * self._config.seq_len / seconds
    self._write([row | {"tokens_per_second": round(speed, 1)} for row in rows])
    self._bar.update(len(rows))
    shown = {"loss": f"{rows[-1]['loss']:.3f}", "tokens/s": f"{speed:,.0f}"}
    self._bar.set_postfix(shown | ({"skipped": rows[-1]["skipped"]} if rows[-1]["skipped"] else {}))
    self._waiting, self._since = [], time.monotonic()
    self._stop_if_stuck(rows)

  def _stop_if_stuck(self, rows):
    worst, limit = max(row["skipped_in_a_row"] for row in rows), self._config.max_skipped
    if worst >= limit:
      self.close()
      raise UserError(
        f"the run was stopped after step {rows[-1]['step']}: {worst} updates in a row had a loss or gradient that "
        f"was not finite (max_skipped = {limit}); lower --config.learning_rate (= {self._config.learning_rate}) in a "
        f"new --workdir, or look at the data of these steps"
      )

  def evaluation(self, step: int, numbers: dict):
    """Write the numbers of an evaluation after `step`; flushed before it, its time is not training time."""
    self._write([{"step": step} | numbers])
    if hosts.is_first():
      self._bar.write(f"step {step}: validation perplexity {numbers['val_ppl']:.2f}")
    self._since = time.monotonic()

  def _write(self, rows: list[dict]):
    if self._metrics:
      self._metrics.write(rows)

  def close(self):
    """Write what is left and end the bar."""
    self._bar.close()
    if self._metrics:
      self._metrics.close()
