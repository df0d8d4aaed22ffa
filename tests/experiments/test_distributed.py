"""Two processes with four simulated devices each train the same run as one process, and stop together."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small_model
from paths import ROOT
from tiny import QUICK, flags_of, tiny_config

from experiments.common import distributed
from experiments.common.distributed import FIRST_PORT, Placement, from_flags, from_slurm
from switchlora_jax.config import resolve
from switchlora_jax.data import dataset, loader
from switchlora_jax.errors import HUNG, STOPPED, UserError
from switchlora_jax.runs import manifest
from switchlora_jax.runs.array_checksums import array_checksums
from switchlora_jax.runs.checkpoint import Checkpoints
from switchlora_jax.training import metrics, trainer
from switchlora_jax.training.phases import build_phase
from switchlora_jax.training.report import PROMPT_ROWS

pytestmark = pytest.mark.two_linear_layers

COUNT, DEVICES = 2, 4

# The command, which records the packed rows that it reads and the files that it writes: `python -c … FILE --flags`.
# Its model, too, has two linear layers per block.
WATCHED = """
import atexit, json, runpy, sys
import numpy as np
sys.path.append("tests/helpers")
from small_model import TwoLinearBlock
from switchlora_jax.data.shards import PackedSequences
from switchlora_jax.models.llama import LLaMA
LLaMA.block_class = TwoLinearBlock
file, seen, wrote, read = sys.argv.pop(1), [], [], PackedSequences.__getitem__
def watched(self, key):
  if isinstance(key, np.ndarray):
    seen.append((len(self), key.tolist()))
  return read(self, key)
def audit(event, details):
  if event == "open" and isinstance(details[1], str) and set(details[1]) & set("wax+"):
    wrote.append(str(details[0]))
PackedSequences.__getitem__ = watched
sys.addaudithook(audit)
atexit.register(lambda: open(file, "w").write(json.dumps([seen, wrote])))
runpy.run_module("experiments.pretrain", run_name="__main__", alter_sys=True)
"""

# --- placement of a process ------------------------------------------------------------------------------------------


def test_flags_define_a_placement():
  assert from_flags(None, None, None) is None
  assert from_flags("node1:61440", 4, 3) == Placement("node1:61440", 4, 3)
  assert from_flags("[fe80::1]:1", 1, 0) == Placement("[fe80::1]:1", 1, 0)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (("node1:61440", None, None), r"found no --num_processes and no --process_id; give all of them or none"),
    ((None, 2, 0), r"found no --coordinator; give all"),
    (("node1", 2, 0), r"--coordinator \(='node1'\) must be HOST:PORT"),
    (("node1:0", 2, 0), r"must be HOST:PORT"),
    (("node1:70000", 2, 0), r"must be HOST:PORT"),
    (("fe80::1:61440", 2, 0), r"must be HOST:PORT"),
    (("node1:61440", 0, 0), r"--num_processes \(=0\) must be at least 1"),
    (("node1:61440", 2, 2), r"--process_id \(=2\) must be one of 0 to --num_processes - 1 \(=1\)"),
    (("node1:61440", 2, -1), r"--process_id \(=-1\)"),
  ],
)
def test_invalid_flags_are_errors(given, message):
  with pytest.raises(UserError, match=message):
    from_flags(*given)


def slurm(nodes="node7", tasks=2, task=1, job=5):
  values = {"STEP_NODELIST": nodes, "STEP_NUM_TASKS": tasks, "PROCID": task, "JOB_ID": job}
  return {f"SLURM_{key}": str(value) for key, value in values.items()}


@pytest.mark.parametrize(
  ("nodes", "first"),
  [
    ("node7", "node7"),
    ("node007,gpu1", "node007"),
    ("node[007-012]", "node007"),
    ("node[007,009-012],gpu1", "node007"),
    ("rack[1-2]-gpu[3,5]", "rack1-gpu3"),
  ],
)
def test_process_0_listens_on_the_first_node_of_a_slurm_step(nodes, first):
  assert from_slurm(slurm(nodes, tasks=6, task=4, job=4096 * 3 + 9)) == Placement(f"{first}:{FIRST_PORT + 9}", 6, 4)


@pytest.mark.parametrize(
  ("name", "value"), [("PROCID", None), ("JOB_ID", "x"), ("STEP_NUM_TASKS", "2x"), ("STEP_NODELIST", None)]
)
def test_incomplete_variables_of_slurm_are_errors(name, value):
  said = slurm() | {f"SLURM_{name}": value}
  with pytest.raises(
    UserError, match=r"define \S+ tasks, but not the number or node of this one .*; start the tasks by srun, or pass"
  ):
    from_slurm({key: text for key, text in said.items() if text is not None})


def test_a_single_task_of_slurm_has_no_placement():
  """A batch script is no step; `srun` of one task is one, and so is every command that it starts in turn."""
  assert from_slurm({}) is None
  assert from_slurm(slurm(tasks=1, task=0)) is None
  assert from_slurm({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None


# --- the end of a process -------------------------------------------------------------------------------------------


def ends(monkeypatch, process: int, count: int, end) -> tuple[list[int], list[float]]:
  """Return the exit codes with which `end()` ends a process, and for how many seconds it waited before."""
  codes, waits = [], []
  monkeypatch.setattr(distributed.processes, "Store", lambda: SimpleNamespace(process=process, count=count))
  monkeypatch.setattr(distributed, "os", SimpleNamespace(_exit=codes.append))
  monkeypatch.setattr(distributed, "time", SimpleNamespace(sleep=waits.append))
  end()
  return codes, waits


@pytest.mark.parametrize(("process", "waits"), [(0, [distributed.FAREWELL]), (1, [])])
def test_process_0_ends_last(monkeypatch, process, waits):
  """Before, it answers the others, each of which ends by its own message."""
  assert ends(monkeypatch, process, 2, lambda: distributed.exit_process(SystemExit(2))) == ([2], waits)
  for code in (HUNG, STOPPED):
    assert ends(monkeypatch, process, 2, lambda code=code: distributed.end_process("why", code)) == ([code], waits)


def test_ctrl_c_once_more_does_not_wait(monkeypatch, capsys):
  assert ends(monkeypatch, 0, 2, lambda: distributed.end_process("stopped at once", 130)) == ([130], [])
  assert capsys.readouterr().err == "\nstopped at once\n"


def test_an_unexpected_error_is_printed_with_its_traceback(monkeypatch, capsys):
  assert ends(monkeypatch, 1, 2, lambda: distributed.exit_process(ValueError("why"))) == ([1], [])
  assert capsys.readouterr().err.endswith("ValueError: why\n")


def test_a_single_process_ends_as_python_does(monkeypatch, capsys):
  assert ends(monkeypatch, 0, 1, lambda: distributed.exit_process(ValueError("why"))) == ([], [])
  assert capsys.readouterr().err == ""


def test_a_process_ends_even_if_nothing_can_be_printed(monkeypatch):
  with open("/dev/null") as unwritable:
    monkeypatch.setattr(sys, "stderr", unwritable)
    assert ends(monkeypatch, 0, 1, lambda: distributed.end_process("why", HUNG)) == ([HUNG], [])


# --- real processes -------------------------------------------------------------------------------------------------


def free_port():
  """Return a free port in the range that follows from SLURM's job numbers."""
  for port in range(FIRST_PORT + os.getpid() % 4000, 2**16):
    try:
      with socket.create_server(("", port)):
        return port
    except OSError:
      continue
  raise AssertionError("no port is free")


def start(folder, flags, *, by_slurm=False, first=(), second=()):
  """Return [(exit code, stdout, stderr)] of two processes of one run, with flags `first` and `second` of their own."""
  port, running = free_port(), []
  shared = os.environ | QUICK | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES)}
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  for process, own in enumerate((first, second)):
    place = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={COUNT}", f"--process_id={process}"]
    environment = shared | (slurm("localhost", COUNT, process, port - FIRST_PORT) if by_slurm else {})
    command = [sys.executable, "-c", WATCHED, str(folder / f"watched-{process}.json"), *flags, *own]
    command += [] if by_slurm else place
    running.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
  try:
    ended = [process.communicate(timeout=900) for process in running]
  finally:
    for process in running:
      process.kill()
  return [(process.returncode, *output) for process, output in zip(running, ended, strict=True)]


ALL_SPLIT = ["--config.sharding.fsdp=8", "--config.sharding.frozen=sharded"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The same run on 1 × 8, 1 × 1 and 2 × 4 processes × devices; and continued on 2 × 4 from step 4 of the first.

  The last one finds a damaged checkpoint of step 8, and its arrays are split over all 8 devices.
  """
  folder = tmp_path_factory.mktemp("runs")
  raw, eight, one = tiny_config(folder, switch__decay_to=0.9), folder / "eight", folder / "one"
  config, flags = resolve(raw, devices=8), flags_of(raw)
  trainer.train(config, eight)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer, "make_mesh", lambda **_: small_model.mesh(1))
    trainer.train(config, one)
  apart = start(folder, [*flags, f"--workdir={folder / 'apart'}"])
  watched = [json.loads((folder / f"watched-{process}.json").read_text()) for process in range(COUNT)]
  continued = folder / "continued"
  shutil.copytree(eight, continued)
  shutil.rmtree(continued / "checkpoints" / "12")
  damage(continued / "checkpoints" / "8")
  again = start(folder, [*flags, *ALL_SPLIT, f"--workdir={continued}"], by_slurm=True)
  return SimpleNamespace(
    folder=folder, config=config, eight=eight, one=one, apart=folder / "apart", continued=continued,
    started=apart, started_again=again, watched=watched,
  )  # fmt: skip


def damage(checkpoint):
  for file in checkpoint.rglob("d/*"):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def rows_of(workdir):
  return metrics.read(workdir / "metrics.jsonl")


def state_of(workdir, config, devices=8):
  """Return the state in the newest checkpoint of a run, on a number of devices of this process."""
  phase = build_phase(config, small_model.mesh(devices))
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    return checkpoints.restore(lambda _: phase.abstract)


def numbers(rows, name):
  return [row[name] for row in rows if name in row]


def test_both_processes_succeed(runs):
  for code, _, error in (*runs.started, *runs.started_again):
    assert code == 0, error


@pytest.mark.parametrize("name", ["eight", "one", "apart", "continued"])
def test_each_step_is_logged_once(runs, name):
  rows = rows_of(getattr(runs, name))
  assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
  assert [row["step"] for row in rows if "val_loss" in row] == [4, 8, 12]


@pytest.mark.parametrize("name", ["one", "apart", "continued"])
def test_the_run_does_not_depend_on_the_placement_of_its_devices(runs, name):
  """Up to the order in which gradients are summed; switching does not depend on it at all."""
  rows, expected = rows_of(getattr(runs, name)), rows_of(runs.eight)
  for key in ("loss", "val_loss", "grad_norm", "learnt_rank", "moved_norm"):
    np.testing.assert_allclose(numbers(rows, key), numbers(expected, key), rtol=1e-5, err_msg=key)
  for key in ("switched", "frozen_share", "coverage", "learning_rate", "skipped"):
    assert numbers(rows, key) == numbers(expected, key), key
  assert sum(numbers(rows, "switched")) > 10
  ours, theirs = (state_of(path, runs.config) for path in (getattr(runs, name), runs.eight))
  for (path, x), y in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
    if x.dtype == np.int32:  # cursors, freeze timers, counts, steps
      np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


def test_the_tolerance_tells_two_seeds_apart(runs):
  """The losses of other batches are not within the tolerance above."""
  rows = numbers(rows_of(runs.apart), "loss")
  assert not np.allclose(rows[1:], np.roll(rows, 1)[1:], rtol=1e-3)


@pytest.mark.parametrize("devices", [8, 1])
def test_a_checkpoint_of_two_processes_is_restored_on_one(runs, devices):
  state = state_of(runs.apart, runs.config, devices)
  assert int(state.step) == 12 and array_checksums(state) == manifest.read(runs.apart / "checkpoints" / "12").arrays
  assert state.params["embed"]["embedding"].sharding.device_set == set(jax.devices()[:devices])


def test_two_processes_pass_over_a_damaged_checkpoint_together(runs):
  """… and go on from the one before it, which one process had saved."""
  assert "checkpoint of step 8 is damaged" in runs.started_again[0][2]
  assert "damaged" not in runs.started_again[1][2]
  assert (runs.continued / "damaged-8-0").is_dir()
  steps = sorted(int(path.name) for path in (runs.continued / "checkpoints").iterdir())
  assert steps == [4, 8, 12]


def test_each_process_reads_its_own_rows_and_no_others(runs):
  folder, config = runs.folder, runs.config
  data = dataset.open_dataset(config, progress=False)
  for process, (read, _) in enumerate(runs.watched):
    share = slice(process * 8 // COUNT, (process + 1) * 8 // COUNT)
    train = [pick for length, picks in read if length == len(data.train) for pick in picks]
    numbers = [loader.shuffled_batch(data.train, seed=0, step=step, batch_size=8).indices for step in range(12)]
    assert train == np.concatenate([picks[share] for picks in numbers]).tolist()
    picks_of_valid = [picks for length, picks in read if length == len(data.valid)]
    picks_of_valid.remove(list(range(min(len(data.valid), PROMPT_ROWS))))  # searched for the start of the sample
    valid = {pick for picks in picks_of_valid for pick in picks}
    count = min(len(data.valid), config.eval_tokens // 16)
    assert valid == {pick % count for start in range(0, count, 8) for pick in range(start, start + 8)[share]}
  assert len(list((folder / "cache").glob("text-*"))) == 1, "text was prepared once"
  assert not list((folder / "cache").rglob("*-cache")), "several processes store no compiled programs"


def test_process_0_prints(runs):
  (_, said, _), (_, other, shown) = runs.started
  assert re.search(r"^process 0 of 2 on \S+: 4 × cpu$", said, re.M)
  for pattern in ("data: text, fingerprint", "step 4: validation perplexity", "sample: '.*' → '", "saved in: "):
    assert re.search(pattern, said), pattern
  # Gloo prints the number of peers from several threads: a part of its message may be on a line of its own.
  lines = [line for line in other.splitlines() if "peer ranks" not in line and not re.fullmatch(r"\s*\d*\s*", line)]
  assert len(lines) == 1 and re.fullmatch(r"process 1 of 2 on \S+: 4 × cpu", lines[0])
  assert shown == "", "no progress bar"


def test_process_0_writes(runs):
  """… all files but checkpoints, of which each process writes its share, and the lock of each process."""
  inside = [[path for path in wrote if path.startswith(f"{runs.apart}/")] for _, wrote in runs.watched]
  outside = [{path for path in paths if f"{runs.apart}/checkpoints" not in path} for paths in inside]
  assert {Path(path).name for path in outside[1]} == {".lock.1"}
  assert {Path(path).name for path in outside[0]} >= {"metrics.jsonl", "config.json.partial", "loss.png"}
  assert {path.name for path in runs.apart.iterdir()} == {
    ".lock", ".lock.1", "checkpoints", "config.json", "loss.png", "loss.svg", "metrics.jsonl", "tensorboard",
    "tokenizer.model"
  }  # fmt: skip


@pytest.mark.slow
def test_another_config_on_one_process_stops_both(runs):
  ended = start(
    runs.folder, [f"--workdir={runs.folder / 'none'}"], first=["--config.seed=1"], second=["--config.rank=8"]
  )
  for code, _, error in ended:
    assert code == 2, error
    assert "error: process 1 was not started like process 0: rank is 8 there and 32 on process 0; seed is 0" in error
    assert "Traceback" not in error
  assert not (runs.folder / "none").exists()


@pytest.mark.slow
def test_a_mistake_found_by_process_0_alone_stops_both(runs):
  """The other one waits for the directory that process 0 cannot create."""
  (runs.folder / "file").touch()
  ended = start(runs.folder, [f"--workdir={runs.folder / 'file' / 'run'}"])
  for code, _, error in ended:
    assert code == 2 and re.search(r"^error: process 0: --workdir=\S+ cannot be written", error, re.M), error
    assert "Traceback" not in error


def test_an_unreachable_coordinator_is_an_error():
  place = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--process_id=1", "--coordinator_timeout=1"]
  command = [sys.executable, "-m", "experiments.pretrain", "--workdir=none", *place]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert re.search(
    r"^error: process 1 could not reach process 0 at .* within 1 s \(--coordinator_timeout\)", done.stderr
  )
