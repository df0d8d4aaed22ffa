"""The batch script, with stand-ins for the commands of SLURM."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from paths import ROOT

SCRIPT = ROOT / "experiments" / "slurm" / "pretrain.sbatch"


def submit(folder: Path, srun: str, state: str = "RUNNING") -> subprocess.Popen:
  """Start the script in a folder with a virtual environment, with lines of shell as `srun`."""
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
def test_a_run_is_requeued_only_if_it_was_stopped(tmp_path, code):
  process = submit(tmp_path, f"exit {code}")
  said, _ = process.communicate(timeout=30)
  assert process.returncode == code
  assert said == ("scontrol requeue 17\n" if code == 75 else "")


def test_a_cancelled_job_is_not_requeued(tmp_path):
  process = submit(tmp_path, "exit 75", state="COMPLETING")
  said, _ = process.communicate(timeout=30)
  assert process.returncode == 75 and said == "stopped, and not requeued: the job is COMPLETING\n"


def test_a_job_of_unknown_state_is_requeued(tmp_path):
  process = submit(tmp_path, "exit 75", state="; false")
  said, _ = process.communicate(timeout=30)
  assert process.returncode == 75 and said.strip() == "scontrol requeue 17"


def test_arguments_reach_the_command_unchanged(tmp_path):
  said, _ = submit(tmp_path, 'for word in "$@"; do echo "$word"; done').communicate(timeout=30)
  assert said.splitlines()[-4:] == ["python", "-m", "experiments.pretrain", "--workdir=runs/a b"]


def test_the_script_survives_sigterm(tmp_path):
  """SLURM may send the signal to the script as well."""
  process = submit(tmp_path, f"touch {tmp_path}/begun; sleep 3; exit 75")
  while not (tmp_path / "begun").exists():
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  said, _ = process.communicate(timeout=30)
  assert process.returncode == 75 and said == "scontrol requeue 17\n"
