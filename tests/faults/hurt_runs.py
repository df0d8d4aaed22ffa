"""Real runs of the training command for fault injection, and comparisons of their results."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from paths import ROOT
from tiny import ONE_DEVICE, flags_of, tiny_config

from switchlora_jax.training import metrics

PATIENCE = int(os.environ.get("FAULTS_PATIENCE", 600))  # seconds that a tiny run may take on a busy machine


class Run(NamedTuple):
  """A training process, its --workdir, its output files, and the process that writes `stderr`."""

  process: subprocess.Popen
  workdir: Path
  stdout: Path
  stderr: Path
  scribe: subprocess.Popen

  def until(self, step: int):
    """Wait until metrics.jsonl has a line of a step; fails if the process ends before."""
    self.wait_for(lambda: last_step(self.workdir) >= step, f"step {step}")

  def wait_for(self, happened, what: str):
    """Wait until `happened()`; fails if the process ends before."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
      assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}: {self.said()}"
      assert time.monotonic() < deadline, f"no {what} within {PATIENCE} s: {self.said()}"
      time.sleep(0.01)

  def end(self, patience: float = PATIENCE) -> int:
    """Wait for its end and return the exit code."""
    try:
      code = self.process.wait(patience)
      self.scribe.wait(patience)
      return code
    finally:
      self.process.kill()

  def kill(self):
    """Send SIGKILL to the process, which must still be running."""
    self.process.kill()
    assert (code := self.end()) == -signal.SIGKILL, f"it had ended with {code} before: {self.said()}"

  def errors(self) -> list[str]:
    """Return the lines with errors that it printed, also those after a progress bar."""
    return [line for line in self.said().replace("\r", "\n").splitlines() if line.startswith("error: ")]

  def said(self) -> str:
    """Return its output on stderr."""
    return self.stderr.read_text()


def start(config, workdir: Path, *flags: str, fault: str | None = None, devices: int | None = None, **popen) -> Run:
  """Start the command on an unresolved config; `fault` as for `inject.py`, `popen` as for `subprocess.Popen`.

  Without `devices` it has one, and uses the compilation cache.
  """
  entry = ["-m", "experiments.pretrain"] if fault is None else [str(ROOT / "tests" / "faults" / "inject.py"), fault]
  command = [sys.executable, *entry, *flags_of(config), f"--workdir={workdir}", *flags]
  number = len(list(workdir.parent.glob(f"{workdir.name}.stderr.*")))
  outputs = [workdir.with_name(f"{workdir.name}.{name}.{number}") for name in ("stdout", "stderr")]
  several = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
  environment = os.environ | (ONE_DEVICE if devices is None else several)
  with outputs[0].open("w") as stdout, outputs[1].open("w") as stderr:
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, **popen)
    scribe = subprocess.Popen(["cat"], stdin=process.stderr, stdout=stderr)  # a full disk must not truncate the output
  process.stderr.close()
  return Run(process, workdir, *outputs, scribe)


def start_pair(config, workdir: Path, *flags: str, faults=(None, None), devices: int = 1) -> list[Run]:
  """Start two processes of one run with `devices` devices and an optional fault each."""
  with socket.create_server(("127.0.0.1", 0)) as probe:
    port = probe.getsockname()[1]
  place = lambda process: [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={process}"]
  return [
    start(config, workdir, *flags, *place(process), fault=fault, devices=devices)
    for process, fault in enumerate(faults)
  ]


def finish(config, workdir: Path, *flags: str, **more) -> Run:
  """Run the command to its end, which must be successful; `more` as for `start`."""
  hurt_at = last_step(workdir)
  run = start(config, workdir, *flags, **more)
  end_well([run], hurt_at)
  return run


def finish_pair(config, workdir: Path, *flags: str, devices: int = 1) -> list[Run]:
  """The same by two processes."""
  hurt_at = last_step(workdir)
  pair = start_pair(config, workdir, *flags, devices=devices)
  end_well(pair, hurt_at)
  return pair


def end_well(runs: list[Run], hurt_at: int):
  """Wait for the successful end of all processes of a run, and print the time until it passed the step of the fault."""
  began = time.monotonic()
  further = lambda: last_step(runs[0].workdir) > hurt_at
  while not further() and runs[0].process.poll() is None and time.monotonic() < began + PATIENCE:
    time.sleep(0.01)
  if hurt_at and further():
    print(f"recovered in {time.monotonic() - began:.1f} s: further than step {hurt_at}, where it was hurt")
  for run in runs:
    assert run.end() == 0, run.said()


def last_step(workdir: Path) -> int:
  """Return the last step in metrics.jsonl, 0 before the first."""
  rows = metrics.read(workdir / "metrics.jsonl")
  return rows[-1]["step"] if rows else 0


def saved_steps(workdir: Path) -> list[int]:
  """Return the steps that have a finished checkpoint."""
  names = (path.name for path in (workdir / "checkpoints").iterdir())
  return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))


def lines(workdir: Path) -> list[dict]:
  """Return the rows of metrics.jsonl without the one number that depends on time."""
  return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics.read(workdir / "metrics.jsonl")]


def saved_arrays(workdir: Path) -> dict[str, np.ndarray]:
  """Return every array of the newest checkpoint by its path in the state."""
  path = workdir / "checkpoints" / str(saved_steps(workdir)[-1]) / "state"
  with ocp.PyTreeCheckpointer() as reader:
    described = reader.metadata(path).item_metadata.tree
    wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described)
    state = reader.restore(path, restore_args=wanted)
  return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in jax.tree.leaves_with_path(state)}


def state_hash(workdir: Path) -> str:
  """SHA-256 of every array of the newest checkpoint, with its name, dtype and shape."""
  digest = hashlib.sha256()
  for name, leaf in sorted(saved_arrays(workdir).items()):
    digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
  return digest.hexdigest()


def assert_same_end(run: Path, whole: Path):
  """The run ended as the uninterrupted one: every array of its last checkpoint, and every number it wrote."""
  assert saved_steps(run)[-1] == saved_steps(whole)[-1]
  assert state_hash(run) == state_hash(whole)
  assert lines(run) == lines(whole)


def assert_same_numbers(run: Path, whole: Path):
  """The same numbers up to rounding, since other devices sum in another order; switches are exactly the same."""
  rows, others = lines(run), lines(whole)
  assert [row.keys() for row in rows] == [row.keys() for row in others]
  exact = {"step", "switched", "frozen_share", "coverage", "learning_rate", "skipped"}
  for row, expected in zip(rows, others, strict=True):
    assert {k: row[k] for k in exact & row.keys()} == {k: expected[k] for k in exact & row.keys()}
    ours, theirs = (np.array(list(numbers.values()), float) for numbers in (row, expected))  # None is NaN
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, err_msg=str(row["step"]))


def small(folder: Path, **changes):
  """The config of most cases: 40 steps, one device, a checkpoint every 5 steps, a line after every step."""
  return tiny_config(folder, **dict(steps=40, checkpoint_every=5, eval_every=20, log_every=1) | changes)
