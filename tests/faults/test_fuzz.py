"""Case 18. Hundreds of malformed configs and flags: each ends with exit code 2 and one sentence, never a traceback."""

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
NEVER = ("", "four", "1e", "0y10", "[1]", "{}", "ü", "1\n2", "1,5", "inf inf", "--3")
HOST = "eval_every eval_tokens checkpoint_every keep_checkpoints log_every max_skipped data.epochs".split()
HOST.append("spike.max_rollbacks")
COMMANDS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if "cli.run(main" in path.read_text())
HUGE = str(10**30)

# What may follow `from ml_collections import ConfigDict; from configs import base`, and a part of the sentence.
FILES = {
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
  "no keys": ("get_config = ConfigDict", "the config has no accumulation, batch_size"),
  "zero division": ("1 / 0", "line 3: ZeroDivisionError: division by zero"),
  "recursion": ("def get_config():\n  return get_config()", "line 4: RecursionError"),
  "assertion": ("def get_config():\n  assert False, 'why'", "line 4: AssertionError: why"),
}
# What may happen to base.get_config() in such a file, and a part of the sentence.
CHANGES = {
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
  "--config.switch={}": "the config has no switch.decay_point",
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
  """As from `forks`."""
  with forks(tmp_path_factory.mktemp("fuzz")) as run:
    yield run


def assert_a_sentence(ended, *command: str, saying: str = ""):
  """It ended at once, with one line that begins with `error: `."""
  *others, last = ended.stderr.splitlines() or [""]
  assert ended.code == 2, (command, ended)
  assert last.startswith("error: ") and saying in last and not ended.stdout, (command, ended)
  assert "Traceback" not in ended.stderr and not [line for line in others if "error:" in line], (command, ended)


@pytest.mark.parametrize("key", NUMBERS)
def test_no_key_takes_what_is_no_such_number(run, key):
  for value in NEVER:
    flag = f"--config.{key}={value}"
    assert_a_sentence(run("pretrain", "--dry_run", flag), flag)


def test_no_key_takes_a_number_beyond_reason(run):
  """As to how it is used: what is not used by the method, or only counted on the host, may be any number."""
  for key in NUMBERS:
    integer = isinstance(KEYS[key], int) and not isinstance(KEYS[key], bool)
    for value in (
      "nan",
      "-inf",
      *([HUGE, f"-{HUGE}"] if integer and key not in HOST else []),
      *(["9" * 5000] if integer else []),
    ):
      flag = f"--config.{key}={value}"
      assert_a_sentence(run("pretrain", "--dry_run", flag), flag)


@pytest.mark.parametrize("name", FILES)
def test_a_config_file_may_hold_anything(run, tmp_path, name):
  text, sentence = FILES[name]
  path = tmp_path / "mine.py"
  path.write_text(f"from ml_collections import ConfigDict\nfrom configs import base\n{text}\n")
  assert_a_sentence(run("pretrain", f"--config={path}", "--dry_run"), text, saying=sentence)


@pytest.mark.parametrize("name", CHANGES)
def test_a_config_may_be_anything(run, tmp_path, name):
  change, sentence = CHANGES[name]
  path = tmp_path / "mine.py"
  path.write_text(f"from configs import base\n\ndef get_config():\n  c = base.get_config()\n  {change}\n  return c\n")
  for command in ("pretrain", "plan"):
    assert_a_sentence(run(command, f"--config={path}"), change, saying=sentence)


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_may_be_anything(run, flag):
  assert_a_sentence(run("pretrain", "--dry_run", flag), flag, saying=FLAGS[flag])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_no_nonsense(run, command):
  """Unknown flags, words without a flag, and text where its own flags want a number."""
  source = (ROOT / "experiments" / f"{command}.py").read_text()
  numbers = re.findall(r'DEFINE_(?:multi_)?(?:integer|float|bool)\(\s*"(\w+)"', source)
  for argument in (
    "--no_such_flag=1",
    "junk",
    "--",
    *(f"--{name}={value}" for name in numbers for value in ("x", "1e")),
  ):
    assert_a_sentence(run(command, argument, "junk"), command, argument)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
  key=st.sampled_from(sorted(KEYS)) | st.text("abc._[]{}=-'\" \n", max_size=12),
  value=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
  | st.integers().map(str),
)
def test_any_key_may_be_set_to_any_text(run, key, value):
  """Which is refused, or else is something that can be described."""
  flag = f"--config.{key}={value}"
  ended = run("pretrain", "--dry_run", flag)
  assert ended.code == 0 or assert_a_sentence(ended, flag) is None
  assert "Traceback" not in ended.stderr, (flag, ended)


HOSTS = (
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
  coordinator=st.sampled_from(HOSTS) | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
  processes=st.integers(-1, 3) | st.sampled_from(["", "x", HUGE]),
  process=st.integers(-1, 3) | st.sampled_from(["", "x", HUGE]),
)
def test_processes_may_be_placed_anywhere(run, coordinator, processes, process):
  """Nobody else comes: it is a sentence, or there is only one process."""
  flags = f"--coordinator={coordinator}", f"--num_processes={processes}", f"--process_id={process}"
  ended = run("pretrain", "--dry_run", "--coordinator_timeout=1", *flags)
  assert (ended.code == 0 and (processes, process) == (1, 0)) or assert_a_sentence(ended, *flags) is None
