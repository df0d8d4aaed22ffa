"""What docs/security.md promises: no pickle, no file elsewhere, no network, pinned requirements, known licences."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from paths import ROOT
from tiny import flags_of, tiny_config

MODULES = [path for folder in ("switchlora_jax", "experiments", "configs") for path in (ROOT / folder).rglob("*.py")]
PINS = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
NOT_IMPORTED = {"pandas", "chex", "protobuf"}  # two are read as training text, generated modules import the third

# --- no pickle, nothing that runs what it reads ----------------------------------------------------------------------

PICKLING = {"pickle", "dill", "shelve", "marshal", "cloudpickle", "joblib", "torch"}
RUNNING = {"eval", "exec", "compile", "__import__"}


def offences(source: str) -> list[str]:
  """What in a module could run what a file says."""
  found = [name for name in imported(source) if name in PICKLING]
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Call):
      named = {
        word.arg for word in node.keywords if not (isinstance(word.value, ast.Constant) and not word.value.value)
      }
      found += sorted(named & {"allow_pickle", "trust_remote_code", "shell"})
      found += [node.func.id] if isinstance(node.func, ast.Name) and node.func.id in RUNNING else []
  return found


def imported(source: str) -> set[str]:
  """The packages that a module imports."""
  names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
  return {
    name.split(".")[0]
    for node in names
    for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
  }


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_what_it_reads(path):
  assert not offences(path.read_text())


@pytest.mark.parametrize(
  "line",
  [
    "import pickle",
    "from dill import load",
    "np.load(f, allow_pickle=True)",
    "eval(x)",
    "subprocess.run(x, shell=True)",
  ],
)
def test_what_would_is_found(line):
  assert offences(line)
  assert not offences(line.replace("True", "False")) or "True" not in line


# --- a run as its system calls have it -------------------------------------------------------------------------------

# The command, which notes what it writes, whom it asks over a network, what it unpickles: `python -c … FILE --flags`.
AUDITED = """
import atexit, json, os, runpy, sys
file, seen = sys.argv.pop(1), {"wrote": [], "network": [], "unpickled": []}
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
def audit(event, details):  # a name in a directory that is open, as rmtree has it, is known by that directory
  if event == "open" and isinstance(details[0], (str, bytes)) and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
    seen["wrote"].append(os.path.abspath(os.fsdecode(details[0])))
  elif event in CHANGES and isinstance(details[0], (str, bytes)) and (os.path.isabs(details[0]) or details[-1] == -1):
    seen["wrote"].append(os.path.abspath(os.fsdecode(details[0])))
  elif event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto", "urllib.Request"):
    seen["network"].append(repr(details))
  elif event == "pickle.find_class":
    seen["unpickled"].append(repr(details))
sys.addaudithook(audit)
atexit.register(lambda: open(file, "w").write(json.dumps(seen)))
runpy.run_module("experiments.pretrain", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
  """(folder of a run of the command, started in its `elsewhere`, with its `home`; what it did by Python's audit)."""
  folder = tmp_path_factory.mktemp("audited")
  for name in ("elsewhere", "home", "tmp", "given"):
    (folder / name).mkdir()
  config = tiny_config(folder / "given", data__cache_dir=str(folder / "cache"), steps=4, batch_size=8)
  places = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(ROOT)}
  kept = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "HF_", "MPL"))}
  environment = kept | places | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONDONTWRITEBYTECODE": "1"}
  command = [sys.executable, "-c", AUDITED, str(folder / "seen.json"), *flags_of(config), f"--workdir={folder / 'run'}"]
  done = subprocess.run(command, cwd=folder / "elsewhere", env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return folder, json.loads((folder / "seen.json").read_text())


def test_a_run_writes_in_its_own_directories(audited):
  """Its --workdir and the cache that the config names; besides, what it removes again, and matplotlib's own cache."""
  folder, seen = audited
  own = tuple(
    str(folder / name) for name in ("run", "cache", "tmp", "home/.cache/matplotlib", "home/.config/matplotlib")
  )
  parents = {str(folder / "home" / name) for name in (".cache", ".config")}
  assert any(path.startswith(own[0]) for path in seen["wrote"]), "nothing was seen"
  strange = [path for path in seen["wrote"] if not path.startswith((*own, "/dev/", "/proc/")) and path not in parents]
  assert strange == [str(folder / "seen.json")]


def test_nor_does_what_python_does_not_see(audited):
  """What is left where the run was started, in its home and among temporary files, whoever wrote it."""
  folder, _ = audited
  left = lambda name: [path for path in (folder / name).rglob("*") if path.is_file() and "matplotlib" not in path.parts]
  assert not left("elsewhere") and not left("tmp") and not left("home")
  assert [path.name for path in left("given")] == ["text.txt"]


def test_a_run_asks_nobody_over_a_network(audited):
  assert audited[1]["network"] == []


def test_a_run_unpickles_nothing(audited):
  assert audited[1]["unpickled"] == []


# --- what is installed ----------------------------------------------------------------------------------------------


def test_every_import_is_pinned_and_every_pin_is_imported():
  ours = {"switchlora_jax", "experiments", "configs"} | set(sys.stdlib_module_names)
  packages = metadata.packages_distributions()
  used = {
    canonicalize_name(name) for path in MODULES for top in imported(path.read_text()) - ours for name in packages[top]
  }
  pins = {canonicalize_name(name) for name in PINS}
  assert used - pins <= {"jaxlib"}, "whose version follows from that of jax"
  assert pins - used == NOT_IMPORTED


@pytest.mark.parametrize("file", sorted(ROOT.glob("requirements*.txt")), ids=lambda path: path.name)
def test_every_requirement_has_one_version(file):
  lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
  assert all(re.fullmatch(r"-r requirements[\w-]*\.txt|[\w-]+(\[\w+\])?==[\w.]+|", line) for line in lines)


def needed(names) -> dict[str, metadata.Distribution]:
  """The distributions that some names bring, directly and in turn, as they are installed here."""
  found, left = {}, [(name, "") for name in names]
  while left:
    name, extra = left.pop()
    if (name := canonicalize_name(name), extra) in found:
      continue
    found[name, extra] = metadata.distribution(name)
    for requirement in map(Requirement, found[name, extra].requires or []):
      if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
        left += [(requirement.name, wanted) for wanted in ("", *requirement.extras)]
  return {name: distribution for (name, _), distribution in found.items()}


def test_the_licence_of_everything_pinned_is_listed_and_nothing_installed_is_copyleft():
  """What pip brings in turn changes with the day; a package that is new there must not break the tests by its name."""
  rows = re.findall(r"^\| ([\w-]+) \| ([\w.]+) \| (.+?) \|", (ROOT / "docs" / "licences.md").read_text(), re.MULTILINE)
  listed, installed = {name: (version, licence) for name, version, licence in rows}, needed(PINS)
  pinned = [canonicalize_name(name) for name in PINS]
  assert {name: listed[name][0] for name in pinned} == {name: installed[name].version for name in pinned}
  assert [name for name, (_, licence) in listed.items() if re.search(r"GPL|MPL|EPL", licence)] == ["tqdm"]
  for name, distribution in installed.items():
    declared = [distribution.metadata.get("License-Expression") or ""]
    declared += [text for text in distribution.metadata.get_all("Classifier") or [] if text.startswith("License")]
    assert not re.search(r"GPL|GNU", " ".join(declared)), name
