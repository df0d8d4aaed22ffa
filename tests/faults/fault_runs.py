"""Runs of the training command with injected faults, and comparisons of their results."""

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

RUN_TIMEOUT = int(os.environ.get("FAULTS_RUN_TIMEOUT", 600))  # seconds that a tiny run may take on a busy machine


class Run(NamedTuple):
  """A training process, its --workdir, its output files, and the process that copies its output to `stderr`."""

  process: subprocess.Popen
  workdir: Path
  stdout: Path
  stderr: Path
  copier: subprocess.Popen

  def wait_for_step(self, step: int):
    """Waits until metrics.jsonl has a line of a step; fails if the process ends before."""
    self.wait_for(lambda: last_step(self.workdir) >= step, f"step {step}")

  def wait_for(self, condition, what: str):
    """Waits until `condition()`; fails if the process ends before."""
    deadline = time.monotonic() + RUN_TIMEOUT
    while not condition():
      assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}: {self.output()}"
      assert time.monotonic() < deadline, f"no {what} within {RUN_TIMEOUT} s: {self.output()}"
      time.sleep(0.01)

  def exit_code(self, patience: float = RUN_TIMEOUT) -> int:
    """Waits until the process has ended and returns its exit code."""
    try:
      code = self.process.wait(patience)
      self.copier.wait(patience)
      return code
    finally:
      self.process.kill()

  def kill(self):
    """Sends SIGKILL to the process, which must still be running."""
    self.process.kill()
    assert (code := self.exit_code()) == -signal.SIGKILL, f"it had ended with {code} before: {self.output()}"

  def errors(self) -> list[str]:
    """Returns the printed lines that begin with `error: `, also those after a progress bar."""
    return [line for line in self.output().replace("\r", "\n").splitlines() if line.startswith("error: ")]

  def output(self) -> str:
    """Returns the output on stderr."""
    return self.stderr.read_text()


def start(config, workdir: Path, *flags: str, fault: str | None = None, devices: int | None = None, **popen) -> Run:
  """Starts the command on an unresolved config; `fault` as for `inject.py`, `popen` as for `subprocess.Popen`.

  Without `devices`, it has one device and uses the compilation cache.
  """
  entry = ["-m", "experiments.pretrain"] if fault is None else [str(ROOT / "tests" / "faults" / "inject.py"), fault]
  command = [sys.executable, *entry, *flags_of(config), f"--workdir={workdir}", *flags]
  number = len(list(workdir.parent.glob(f"{workdir.name}.stderr.*")))
  outputs = [workdir.with_name(f"{workdir.name}.{name}.{number}") for name in ("stdout", "stderr")]
  several = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
  environment = os.environ | (ONE_DEVICE if devices is None else several)
  with outputs[0].open("w") as stdout, outputs[1].open("w") as stderr:
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, **popen)
    copier = subprocess.Popen(["cat"], stdin=process.stderr, stdout=stderr)  # a full disk must not truncate the output
  process.stderr.close()
  return Run(process, workdir, *outputs, copier)


def start_pair(config, workdir: Path, *flags: str, faults=(None, None), devices: int = 1) -> list[Run]:
  """Starts two processes of one run with `devices` devices and an optional fault each."""
  with socket.create_server(("127.0.0.1", 0)) as probe:
    port = probe.getsockname()[1]
  place = lambda process: [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={process}"]
  return [
    start(config, workdir, *flags, *place(process), fault=fault, devices=devices)
    for process, fault in enumerate(faults)
  ]


def finish(config, workdir: Path, *flags: str, **more) -> Run:
  """Runs the command to completion, which must be successful; `more` as for `start`."""
  fault_step = last_step(workdir)
  run = start(config, workdir, *flags, **more)
  assert_success([run], fault_step)
  return run


def finish_pair(config, workdir: Path, *flags: str, devices: int = 1) -> list[Run]:
  """Runs two processes of one run to completion, which must be successful."""
  fault_step = last_step(workdir)
  pair = start_pair(config, workdir, *flags, devices=devices)
  assert_success(pair, fault_step)
  return pair


def assert_success(runs: list[Run], fault_step: int):
  """Waits for the successful end of all processes of a run; prints the time until it passed the step of the fault."""
  began = time.monotonic()
  further = lambda: last_step(runs[0].workdir) > fault_step
  while not further() and runs[0].process.poll() is None and time.monotonic() < began + RUN_TIMEOUT:
    time.sleep(0.01)
  if fault_step and further():
    print(f"recovered in {time.monotonic() - began:.1f} s: passed step {fault_step}, the step of the fault")
  for run in runs:
    assert run.exit_code() == 0, run.output()


def last_step(workdir: Path) -> int:
  """Returns the last step in metrics.jsonl, 0 before the first."""
  rows = metrics.read(workdir / "metrics.jsonl")
  return rows[-1]["step"] if rows else 0


def saved_steps(workdir: Path) -> list[int]:
  """Returns the steps that have a finished checkpoint."""
  names = (path.name for path in (workdir / "checkpoints").iterdir())
  return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))


def metrics_rows(workdir: Path) -> list[dict]:
  """Returns the rows of metrics.jsonl without those that depend on time."""
  return [{k: v for k, v in row.items() if k not in metrics.TIMED} for row in metrics.read(workdir / "metrics.jsonl")]


def saved_arrays(workdir: Path) -> dict[str, np.ndarray]:
  """Returns every array of the newest checkpoint by its path in the state."""
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
  """Both runs have the same last checkpoint, to the bit, and the same rows of metrics.jsonl."""
  assert saved_steps(run)[-1] == saved_steps(whole)[-1]
  assert state_hash(run) == state_hash(whole)
  assert metrics_rows(run) == metrics_rows(whole)


def assert_same_numbers(run: Path, whole: Path):
  """Both runs have the same metrics to 1e-4, since other devices sum in another order; switches are exactly equal."""
  rows, others = metrics_rows(run), metrics_rows(whole)
  assert [row.keys() for row in rows] == [row.keys() for row in others]
  exact = {"step", "switched", "frozen_share", "coverage", "learning_rate", "skipped"}
  for row, expected in zip(rows, others, strict=True):
    assert {k: row[k] for k in exact & row.keys()} == {k: expected[k] for k in exact & row.keys()}
    ours, theirs = (np.array(list(numbers.values()), float) for numbers in (row, expected))  # None is NaN
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, err_msg=str(row["step"]))


def small_config(folder: Path, **changes):
  """The config of most cases: 40 steps, one device, a checkpoint every 5 steps, a row of metrics at every step."""
  return tiny_config(folder, **dict(steps=40, checkpoint_every=5, eval_every=20, log_every=1) | changes)
