"""Exit codes and error sentences of commands. Invalid flags and config files: tests/faults/test_fuzz.py."""

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
    "error: a device is out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.; experiments.plan "
    "shows which settings fit",
  ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_errors_that_a_user_can_fix_are_one_sentence(capsys, name):
  error, sentence = SENTENCES[name]

  def main():
    raise error

  with pytest.raises(SystemExit) as ended:
    cli._exit_on_errors(main)
  assert ended.value.code == 2 and capsys.readouterr().err == f"{sentence}\n"


@pytest.mark.parametrize(
  "error", [ValueError("a bug"), AssertionError(), jax.errors.JaxRuntimeError("INTERNAL: another")]
)
def test_bugs_keep_their_traceback(error):
  def main():
    raise error

  with pytest.raises(type(error)):
    cli._exit_on_errors(main)


def test_a_platform_without_devices_is_one_sentence(capsys, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  with pytest.raises(SystemExit) as ended:
    cli._exit_on_errors(lambda: jax.devices("cuda"))
  sentence = capsys.readouterr().err
  assert ended.value.code == 2 and sentence.startswith("error: JAX must find a device of JAX_PLATFORMS (='cuda'); ")
  assert sentence.count("\n") == 1 and "install requirements-gpu.txt" in sentence


@pytest.mark.parametrize(
  ("continues", "said"),
  [(True, "stopped; the same command continues from the last saved state, if any"), (False, "interrupted")],
)
def test_ctrl_c_mentions_continuation_only_if_the_command_continues(capsys, continues, said):
  def main():
    raise KeyboardInterrupt

  with pytest.raises(SystemExit) as ended:
    cli._exit_on_errors(main, continues)
  assert ended.value.code == 130 and capsys.readouterr().err == f"\n{said}\n"


def test_json_must_be_a_writable_file(tmp_path):
  cli.check_json(None)
  cli.check_json(str(tmp_path / "out.json"))
  for path in (tmp_path, tmp_path / "nowhere" / "out.json"):
    with pytest.raises(UserError, match=r"--json \(='.*'\) must be a file in a writable directory"):
      cli.check_json(str(path))
