"""The batch script, with stand-ins for what SLURM gives it."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from paths import ROOT

SCRIPT = ROOT / "experiments" / "slurm" / "pretrain.sbatch"


def submit(folder: Path, srun: str, state: str = "RUNNING") -> subprocess.Popen:
  """The script, started in a folder with a virtual environment, with `srun` being these lines of shell."""
  (folder / ".venv" / "bin").mkdir(parents=True)
  (folder / ".venv" / "bin" / "activate").touch()
  stand_ins = {"srun": srun, "scontrol": 'echo "scontrol $@"', "squeue": f'[ "$3" = --jobs=17 ] && echo {state}'}
  for name, lines in stand_ins.items():
    (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
    (folder / name).chmod(0o755)
  environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
  command = ["bash", str(SCRIPT), "--workdir=runs/a b"]
  return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("code", [0, 1, 2, 69, 75, 137])
def test_a_run_that_saved_when_it_was_told_to_stop_is_requeued_and_no_other(tmp_path, code):
  process = submit(tmp_path, f"exit {code}")
  said, _ = process.communicate(timeout=30)
  assert process.returncode == code
  assert said == ("scontrol requeue 17\n" if code == 75 else "")


def test_a_job_that_was_cancelled_stays_so(tmp_path):
  process = submit(tmp_path, "exit 75", state="COMPLETING")
  said, _ = process.communicate(timeout=30)
  assert process.returncode == 75 and said == "stopped, and not put back into the queue: the job is COMPLETING\n"


def test_where_the_state_of_the_job_is_not_known_it_is_requeued(tmp_path):
  process = submit(tmp_path, "exit 75", state="; false")
  said, _ = process.communicate(timeout=30)
  assert process.returncode == 75 and said.strip() == "scontrol requeue 17"


def test_the_command_gets_the_arguments_as_they_were_given(tmp_path):
  said, _ = submit(tmp_path, 'for word in "$@"; do echo "$word"; done').communicate(timeout=30)
  assert said.splitlines()[-4:] == ["python", "-m", "experiments.pretrain", "--workdir=runs/a b"]


def test_the_script_lives_to_see_the_end_of_a_run_that_was_told_to_stop(tmp_path):
  """SLURM may send the signal to the script as well."""
  process = submit(tmp_path, f"touch {tmp_path}/begun; sleep 3; exit 75")
  while not (tmp_path / "begun").exists():
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  said, _ = process.communicate(timeout=30)
  assert process.returncode == 75 and said == "scontrol requeue 17\n"
