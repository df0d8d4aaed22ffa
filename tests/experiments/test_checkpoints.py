"""The command that lists checkpoints, also of a run that is training."""

import os
import shutil
import subprocess
import sys

import pytest
from grids import imported
from paths import ROOT

from switchlora_jax.errors import UserError
from switchlora_jax.runs import manifest


@pytest.fixture
def run(tmp_path):
  """The directory of a run that has saved steps 5, 10 and 15."""
  for step in (5, 10, 15):
    folder = tmp_path / "checkpoints" / str(step)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "data").write_bytes(bytes(2**20))
    manifest.write(folder, step, {})
  (tmp_path / "config.json").write_text("{}")
  return tmp_path


def listed(run, capsys) -> tuple[list[str], int]:
  """(lines of the table without its head, exit code)."""
  code = 0
  with imported("checkpoints", f"--run={run}") as checkpoints:
    try:
      checkpoints.main()
    except SystemExit as end:
      code = end.code
  head, *lines = capsys.readouterr().out.splitlines()
  assert head.split() == ["step", "MiB", "saved", "health"]
  return lines, code


def test_good_checkpoints_have_size_and_time(run, capsys):
  lines, code = listed(run, capsys)
  assert code == 0 and [line.split()[0] for line in lines] == ["5", "10", "15"]
  assert all(line.split()[1] == "1.00" and line.endswith("+00:00  good") for line in lines)


def test_checkpoints_that_cannot_be_restored_are_listed(run, capsys):
  saves = run / "checkpoints"
  (saves / "10" / "state" / "data").write_bytes(bytes(2**20 - 1) + b"x")
  (saves / "20").mkdir()
  (saves / "25.orbax-checkpoint-tmp").mkdir()
  (run / "damaged-5-0").mkdir()
  lines, code = listed(run, capsys)
  assert code == 1
  said = {line.split()[0]: line for line in lines if line}
  assert said["5"].endswith("  good") and said["15"].endswith("  good")
  assert said["10"].endswith("  state/data is not what was written")
  assert "the save did not finish" in said["20"]
  assert "incomplete: a save in progress, or left by a killed run" in said["25.orbax-checkpoint-tmp"]
  assert "moved aside" in said["../damaged-5-0"]
  assert lines[-1].startswith("2 cannot be restored;")


def test_a_checkpoint_moved_aside_is_not_a_failure(run, capsys):
  (run / "damaged-5-0").mkdir()
  assert listed(run, capsys)[1] == 0


def test_a_step_that_the_run_deletes_meanwhile_is_not_a_failure(run, capsys, monkeypatch):
  verify = manifest.verify

  def removed_first(folder):
    if folder.name == "5":
      shutil.rmtree(folder)
    return verify(folder)

  monkeypatch.setattr(manifest, "verify", removed_first)
  lines, code = listed(run, capsys)
  assert code == 0 and [line.split()[0] for line in lines] == ["10", "15"]


@pytest.mark.parametrize(
  "prepare, said",
  [
    (lambda run: shutil.rmtree(run), "there is no such directory; give the --workdir"),
    (lambda run: (run / "config.json").unlink(), "they are not there"),
    (lambda run: shutil.rmtree(run / "checkpoints"), "they are not there"),
    (lambda run: [shutil.rmtree(step) for step in (run / "checkpoints").iterdir()], "has saved no checkpoint yet"),
  ],
)
def test_a_directory_without_checkpoints_is_an_error(run, capsys, prepare, said):
  prepare(run)
  with pytest.raises(UserError, match=said):
    listed(run, capsys)


def test_a_run_must_be_named():
  with imported("checkpoints") as checkpoints, pytest.raises(UserError, match="--run is missing"):
    checkpoints.main()


def test_the_command_needs_no_device(run):
  """It works where JAX finds none."""
  (run / "checkpoints" / "20").mkdir()
  command = [sys.executable, "-m", "experiments.checkpoints", f"--run={run}"]
  environment = os.environ | {"JAX_PLATFORMS": "none"}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 1 and "Traceback" not in done.stderr and "the save did not finish" in done.stdout
