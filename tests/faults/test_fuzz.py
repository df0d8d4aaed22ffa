"""Case 18. Hundreds of malformed configs and flags: each ends with exit code 2 and one line, never a traceback."""

import re

import pytest
from forks import forks
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

from configs import base
from switchlora_jax.runs.directory import flatten

KEYS = flatten(base.get_config())
NUMBERS = [key for key, value in KEYS.items() if not isinstance(value, str) and "dtype" not in key]
NOT_NUMBERS = ("", "four", "1e", "0y10", "[1]", "{}", "ü", "1\n2", "1,5", "inf inf", "--3")
HOST_KEYS = "eval_every eval_tokens checkpoint_every keep_checkpoints log_every max_skipped data.epochs".split()
HOST_KEYS.append("spike.max_rollbacks")
COMMANDS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if "cli.run(main" in path.read_text())
HUGE = str(10**30)

# name: (the code of a config file after its imports, part of the error message)
CONFIG_FILES = {
  "empty": ("", "must define get_config()"),
  "syntax": ("def get_config(:", "invalid syntax"),
  "zeros": ("x = 1\0", "null bytes"),
  "nothing": ("def get_config():\n  pass", "must be a ConfigDict; found None"),
  "number": ("get_config = lambda: 3", "must be a ConfigDict; found 3"),
  "dict": ("get_config = lambda: {'rank': 3}", "must be a ConfigDict; found {'rank': 3}"),
  "no function": ("get_config = 3", "'int' object is not callable"),
  "arguments": ("get_config = lambda a, b: a", "missing 2 required positional arguments"),
  "no module": (
    "import no_such_module",
    "line 3: ModuleNotFoundError: No module named 'no_such_module'; fix that line",
  ),
  "no keys": ("get_config = ConfigDict", "the config has no accumulation, apollo"),
  "zero division": ("1 / 0", "line 3: ZeroDivisionError: division by zero"),
  "recursion": ("def get_config():\n  return get_config()", "line 4: RecursionError"),
  "assertion": ("def get_config():\n  assert False, 'why'", "line 4: AssertionError: why"),
}
# name: (change of base.get_config() in a config file, part of the error message)
CONFIG_CHANGES = {
  "unknown key": ("c.rnk = 3", 'line 5: AttributeError: \'Key "rnk" does not exist'),
  "wrong type": ("c.rank = 'four'", "line 5: TypeError: Could not override field 'rank'"),
  "no number": ("c.rank = None", "rank (=None) must be of type int"),
  "boolean": ("c.rank = True", "rank (=True) must be of type int"),
  "no section": ("c.model = None", "the config's model must be a ConfigDict; found None"),
  "one key less": ("c.unlock(); del c.model.num_heads", "the config has no model.num_heads"),
  "one key more": ("c.unlock(); c.model.depth = 3", "unknown config key: model.depth"),
  "itself": ("c.unlock(); c.me = c", "unknown config key: me"),
}
FLAGS = {
  "--config=": "Path to config file is an empty string",
  "--config=nowhere.py": "No such file or directory: 'nowhere.py'",
  "--config=.": "Is a directory",
  "--config=/dev/null": "must define get_config()",
  f"--config={'x' * 5000}.py": "File name too long",
  "--config.switch={}": "the config has no switch.candidates, switch.decay, switch.decay_point",
  "--config.rank[0]=3": "does not support integer indexing",
  "--config.model=3": "is not a dict",
  "--config.model.hidden_size=2147483647": "must divide model.hidden_size (=2147483647); try",
  "--config.method=loar\nlaro": "must be one of full, lora, switchlora, relora, galore",
  "--dry_run=maybe": "boolean",
  "--flagfile=nowhere": "nowhere",
  "--num_processes=2": "must be given together; found no --coordinator",
  "--=": "expected only --flags, found --=",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The function that `forks` yields."""
  with forks(tmp_path_factory.mktemp("fuzz")) as run:
    yield run


def assert_user_error(result, *command: str, message: str = ""):
  """The command exited with code 2 after one error, `error: …` in its last line, and no traceback."""
  *others, last = result.stderr.splitlines() or [""]
  assert result.code == 2, (command, result)
  assert last.startswith("error: ") and message in last and not result.stdout, (command, result)
  assert "Traceback" not in result.stderr and not [line for line in others if "error:" in line], (command, result)


@pytest.mark.parametrize("key", NUMBERS)
def test_a_value_that_is_not_a_number_is_a_user_error(run, key):
  for value in NOT_NUMBERS:
    flag = f"--config.{key}={value}"
    assert_user_error(run("pretrain", "--dry_run", flag), flag)


def test_an_unreasonable_number_is_a_user_error(run):
  """`HOST_KEYS` are only counted on the host; huge integers are valid for them."""
  for key in NUMBERS:
    integer = isinstance(KEYS[key], int) and not isinstance(KEYS[key], bool)
    for value in (
      "nan",
      "-inf",
      *([HUGE, f"-{HUGE}"] if integer and key not in HOST_KEYS else []),
      *(["9" * 5000] if integer else []),
    ):
      flag = f"--config.{key}={value}"
      assert_user_error(run("pretrain", "--dry_run", flag), flag)


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_an_invalid_config_file_is_a_user_error(run, tmp_path, name):
  text, message = CONFIG_FILES[name]
  path = tmp_path / "mine.py"
  path.write_text(f"from ml_collections import ConfigDict\nfrom configs import base\n{text}\n")
  assert_user_error(run("pretrain", f"--config={path}", "--dry_run"), text, message=message)


@pytest.mark.parametrize("name", CONFIG_CHANGES)
def test_an_invalid_config_is_a_user_error(run, tmp_path, name):
  change, message = CONFIG_CHANGES[name]
  path = tmp_path / "mine.py"
  path.write_text(f"from configs import base\n\ndef get_config():\n  c = base.get_config()\n  {change}\n  return c\n")
  for command in ("pretrain", "plan"):
    assert_user_error(run(command, f"--config={path}"), change, message=message)


@pytest.mark.parametrize("flag", FLAGS)
def test_an_invalid_flag_is_a_user_error(run, flag):
  assert_user_error(run("pretrain", "--dry_run", flag), flag, message=FLAGS[flag])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_rejects_invalid_arguments(run, command):
  """Unknown flags, words without a flag, and text for numeric flags."""
  source = (ROOT / "experiments" / f"{command}.py").read_text()
  numbers = re.findall(r'DEFINE_(?:multi_)?(?:integer|float|bool)\(\s*"(\w+)"', source)
  for argument in (
    "--no_such_flag=1",
    "junk",
    "--",
    *(f"--{name}={value}" for name in numbers for value in ("x", "1e")),
  ):
    assert_user_error(run(command, argument, "junk"), command, argument)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
  key=st.sampled_from(sorted(KEYS)) | st.text("abc._[]{}=-'\" \n", max_size=12),
  value=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
  | st.integers().map(str),
)
def test_any_text_for_any_key_is_valid_or_a_user_error(run, key, value):
  flag = f"--config.{key}={value}"
  result = run("pretrain", "--dry_run", flag)
  assert result.code == 0 or assert_user_error(result, flag) is None
  assert "Traceback" not in result.stderr, (flag, result)


COORDINATORS = (
  "",
  ":",
  "localhost",
  "localhost:x",
  "localhost:0",
  "localhost:99999",
  "127.0.0.1:1",
  "[::1]:1",
  "[:1",
  "a..b:1",
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
  coordinator=st.sampled_from(COORDINATORS)
  | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
  processes=st.integers(-1, 3) | st.sampled_from(["", "x", HUGE]),
  process=st.integers(-1, 3) | st.sampled_from(["", "x", HUGE]),
)
def test_any_process_placement_is_valid_or_a_user_error(run, coordinator, processes, process):
  """No other process connects, so that only a run of one process is valid."""
  flags = f"--coordinator={coordinator}", f"--num_processes={processes}", f"--process_id={process}"
  result = run("pretrain", "--dry_run", "--coordinator_timeout=1", *flags)
  assert (result.code == 0 and (processes, process) == (1, 0)) or assert_user_error(result, *flags) is None
