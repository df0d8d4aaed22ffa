"""README, docs and docstrings name only flags, config keys, files and modules that exist; the cheap commands run."""

import ast
import re
import shlex

import pytest
from forks import forks
from paths import ROOT

from configs import base

PAGES = [path for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))] if path.name != "CHANGELOG.md"]
MODULES = [
  path
  for folder in ("configs", "experiments", "switchlora_jax")
  for path in sorted((ROOT / folder).rglob("*.py"))
  if "notebooks" not in path.parts
]
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:python -m experiments\.([\w.]*\w)|experiments/slurm/(pretrain)\.sbatch)((?:[ \t][^\n]*)?)")
DEFINED = re.compile(r'DEFINE_\w+\(\s*"(\w+)"')
FOREIGN = {
  "gpus-per-task",
  "kill-on-bad-exit",
  "wait",
  "requeue",
  "signal",
  "nodes",
  "faults",
  "local-dir",
  "rotate",
  "tasks",
}


def code_of(path) -> list[str]:
  """The code in a page, blocks first, or the docstrings of a module."""
  text = path.read_text()
  if path.suffix == ".py":
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, nodes)]
  return FENCE.findall(text) + [span.replace("\n", " ") for span in INLINE.findall(FENCE.sub("", text))]


def commands_in(code: str) -> list[tuple[str, ...]]:
  """(name in experiments/, argument, …) of each command in a piece of code.

  Shell variables are dropped, or 0 within a word; what follows a comment, `&&`, a pipe or a redirection is left out.
  """
  found = []
  for name, script, rest in COMMAND.findall(re.sub(r"\\\n\s*", " ", code)):
    rest = re.sub(r"\s[#].*|\s*(&&|\||;|&|\)|\d?>)(?=\s|$).*", "", rest).rstrip(' .,:;)"')
    rest = re.sub(r"(?<=\s)(\$\w+|…|\.\.\.)(?=\s|$)", "", rest)
    found.append((name or script, *shlex.split(re.sub(r"\$\w+", "0", rest))))
  return found


def all_commands() -> dict[tuple[str, ...], str]:
  """Each command of the pages and docstrings, and where it first appears."""
  found = {}
  for path in PAGES + MODULES:
    for code in code_of(path):
      for command in commands_in(code):
        found.setdefault(command, str(path.relative_to(ROOT)))
  return found


COMMANDS = all_commands()


@pytest.fixture(scope="module")
def run():
  """(name in experiments/, argument, …) -> its exit code, stdout and stderr, run in the root of the repository."""
  with forks(ROOT) as server:
    yield server


def test_commands_are_found():
  assert len(COMMANDS) > 40
  assert commands_in("cd x && python -m experiments.ranks --out=../r $runs \\\n  --run='a b'  # both") == [
    ("ranks", "--out=../r", "--run=a b")
  ]
  assert commands_in("for i in 0 1; do .venv/bin/python -m experiments.pretrain --process_id=$i > $i.log 2>&1 &") == [
    ("pretrain", "--process_id=0")
  ]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_printed_command_has_flags_and_keys_that_exist(run, command):
  ended = run(*command, "--only_check_args")
  assert ended.code == 0, f"{COMMANDS[command]}: {' '.join(command)}\n{ended.stderr}"


@pytest.mark.parametrize(
  "command", [("pretrain", "--config.rnak=4"), ("pretrain", "--wrokdir=x"), ("plan", "--topology=8", "extra")]
)
def test_an_unknown_flag_or_key_is_found(run, command):
  assert run(*command, "--only_check_args").code == 2


def test_inline_flags_and_config_keys_exist():
  known = {name for path in (ROOT / "experiments").rglob("*.py") for name in DEFINED.findall(path.read_text())}
  keys = dict(flatten(base.get_config()))
  wrong = []
  for page in PAGES:
    for code in INLINE.findall(FENCE.sub("", page.read_text())):
      for flag in re.findall(r"(?<!\S)--([a-z][\w.-]*)", code):
        name, _, key = flag.partition(".")
        good = key in ("", "KEY", *keys) if name == "config" else name in known | FOREIGN
        wrong += [] if good else [f"{page.name}: --{flag}"]
      section, _, key = code.partition("=")[0].partition(".")
      if section in keys and isinstance(keys[section], type(base.get_config())) and re.fullmatch(r"[\w.]+", key):
        wrong += [] if f"{section}.{key}" in keys else [f"{page.name}: {code}"]
  assert not wrong


def flatten(config, prefix=""):
  """Each key of a config with its value, sections included: `switch` and `switch.interval`."""
  for key, value in config.items():
    yield prefix + key, value
    if isinstance(value, type(config)):
      yield from flatten(value, f"{prefix}{key}.")


def test_local_links_lead_to_files():
  broken = []
  for page in PAGES:
    for target in LINK.findall(FENCE.sub("", page.read_text())):
      path = target.partition("#")[0]
      if path and "://" not in target and not (page.parent / path).exists():
        broken.append(f"{page.relative_to(ROOT)}: {target}")
  assert not broken


def test_pages_that_docstrings_name_exist():
  missing = [
    f"{path.relative_to(ROOT)}: {page}"
    for path in MODULES
    for page in re.findall(r"\bdocs/[\w/]+\.md", path.read_text())
    if not (ROOT / page).is_file()
  ]
  assert not missing


def test_files_modules_and_targets_that_pages_name_exist():
  targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
  missing = []
  for page in PAGES:
    for code in code_of(page):
      words = re.findall(r"[\w./*-]+", code.replace("::", " ").replace("NAME", "*"))
      paths = [w.rstrip(".") for w in words if re.match(r"(configs|experiments|switchlora_jax|tests|docs)/.", w)]
      paths += [word for word in words if re.fullmatch(r"requirements[\w-]*\.txt", word)]
      missing += [f"{page.name}: {path}" for path in paths if not list(ROOT.glob(path))]
      dotted = [word.rstrip(".") for word in words if re.match(r"(switchlora_jax|experiments)\.\w", word)]
      missing += [f"{page.name}: {name}" for name in dotted if not defined(name)]
      missing += [
        f"{page.name}: make {t}" for t in re.findall(r"^make ([a-z]+)", code, re.MULTILINE) if t not in targets
      ]
  assert not missing


def defined(name: str) -> bool:
  """Whether a dotted name is a module of the repository, or a name in one."""
  parts = name.split(".")
  for count in range(len(parts), 0, -1):
    path = ROOT.joinpath(*parts[:count])
    for file in (path.with_suffix(".py"), path / "__init__.py"):
      if file.is_file() or (path.is_dir() and count == len(parts)):
        return count == len(parts) or bool(re.search(rf"\b{parts[count]}\b", file.read_text()))
  return False


def labels(page: str, expected: str) -> list[str]:
  """The labels of the lines of the printed output on a page that contains `expected`."""
  blocks = re.findall(r"^```text\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
  (output,) = [block for block in blocks if expected in block]
  return [label.strip() for label in re.findall(r"^ *([a-z][^:{}\d]*?)(?:[:,]| {2,})", output, re.MULTILINE)]


def source() -> str:
  """The code of the library and its commands."""
  return "".join(path.read_text() for path in MODULES)


def test_the_output_on_the_home_page_is_that_of_the_code(run):
  printed = run("pretrain", "--dry_run").stdout + source()
  found = labels("README.md", "validation perplexity")
  assert len(found) >= 9
  assert not [label for label in found if label not in printed]


@pytest.mark.slow
def test_the_output_of_the_planner_is_that_of_the_code(run):
  ended = run("plan", "--config=configs/llama_tiny.py", "--topology=1x1x2", "--methods=full")
  assert ended.code == 0, ended.stderr
  found = labels("docs/plan.md", "all-reduce")
  assert len(found) >= 14
  assert not [label for label in found if label not in ended.stdout + source()]


def test_the_example_of_your_own_model_learns():
  (example,) = [code for code in FENCE.findall((ROOT / "docs" / "extend.md").read_text()) if "SwitchLoRADense" in code]
  names = {}
  exec(compile(example, "docs/extend.md", "exec"), names)
  assert names["losses"][-1] < names["losses"][0] / 4
  assert int(names["state"][2]["up"]["cursor"]) > 8  # more vectors were switched than the layer has slots


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_help_lists_the_flags_of_a_command(run, path):
  ended = run(path.stem, "--help")
  shared = {"define_quiet(": ["quiet"], "define_sweep_flags(": ["quiet", "seeds", "processes", "workdir"]}
  names = [name for call, names in shared.items() if call in path.read_text() for name in names]
  names += DEFINED.findall(path.read_text())
  assert all(f"\n  --{name}:" in ended.stdout.replace("--[no]", "--") for name in names)


@pytest.mark.parametrize(
  "command, printed",
  [
    ("pretrain --config=configs/llama_1b.py --dry_run", "trainable parameters: 609.7M (609,720,320)"),
    ("pretrain --dry_run", "trainable parameters: 0.8M (837,760)"),
    ("reproduce --item=table4", "609.7M"),
  ],
)
def test_a_cheap_command_prints_what_the_pages_say(run, command, printed):
  ended = run(*command.split())
  assert ended.code == 0, ended.stderr
  assert printed in ended.stdout


def test_the_commands_that_reproduce_prints_are_commands(run):
  text = "--set=data.path=c4/train*", "--set=data.eval_path=c4/valid*", "--set=data.tokenizer=t5.model"
  ended = run("reproduce", "--item=table3", "--scale=paper", "--dry_run", *text)
  printed = commands_in(ended.stdout)
  assert len(printed) >= 3
  assert {run(*command, "--only_check_args").code for command in printed} == {0}
