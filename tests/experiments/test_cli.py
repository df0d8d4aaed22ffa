"""How a command ends when it fails. What flags and config files may hold: tests/faults/test_fuzz.py."""

import jax
import pytest

from experiments.common import cli
from switchlora_jax.errors import UserError

SENTENCES = {
  "a mistake": (UserError("rank (=0) must be at least 1"), "error: rank (=0) must be at least 1"),
  "a line break in what was given": (UserError("--run=a\nb is no run"), "error: --run=a b is no run"),
  "no such file": (
    FileNotFoundError(2, "No such file or directory", "runs/x"),
    "error: 'runs/x' could not be used: No such file or directory; check the path, its permissions and the free space",
  ),
  "a connection": (
    ConnectionError("reset"),
    "error: a file or a connection could not be used: reset; check the path, its permissions and the free space",
  ),
  "no memory": (
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."),
    "error: a device has not enough memory: RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.; see what fits with "
    "experiments.plan",
  ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_what_the_user_can_mend_is_a_sentence(capsys, name):
  error, sentence = SENTENCES[name]

  def main():
    raise error

  with pytest.raises(SystemExit) as ended:
    cli._guarded(main)
  assert ended.value.code == 2 and capsys.readouterr().err == f"{sentence}\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), jax.errors.JaxRuntimeError("INTERNAL: another")])
def test_what_is_our_mistake_is_not(error):
  def main():
    raise error

  with pytest.raises(type(error)):
    cli._guarded(main)


@pytest.mark.parametrize(
  ("continues", "said"),
  [(True, "stopped; the same command continues from what was saved, if anything was yet"), (False, "interrupted")],
)
def test_ctrl_c_promises_what_the_command_keeps(capsys, continues, said):
  def main():
    raise KeyboardInterrupt

  with pytest.raises(SystemExit) as ended:
    cli._guarded(main, continues)
  assert ended.value.code == 130 and capsys.readouterr().err == f"\n{said}\n"


def test_json_must_be_a_file_that_can_be_written(tmp_path):
  cli.check_json(None)
  cli.check_json(str(tmp_path / "out.json"))
  for path in (tmp_path, tmp_path / "nowhere" / "out.json"):
    with pytest.raises(UserError, match=r"--json \(='.*'\) must be a file in a directory that can be written"):
      cli.check_json(str(path))
