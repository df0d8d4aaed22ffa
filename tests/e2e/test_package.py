"""The package as it is installed, its metadata, and the environment that `make` keeps."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from paths import ROOT

from switchlora_jax.data import documentation

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, cwd, **environment):
  """The command's exit status and its output, stdout and stderr together; the package is not on the path."""
  clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MAKE"))}
  done = subprocess.run(
    list(map(str, command)),
    cwd=cwd,
    env=clean | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  return done.returncode, done.stdout


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
  """The wheel of this checkout, built without network."""
  pytest.importorskip("hatchling", reason="the build backend is installed by requirements-dev.txt")
  folder = tmp_path_factory.mktemp("wheel")
  status, output = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
  assert status == 0, output
  return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
  """A folder into which pip has installed the wheel alone: its dependencies are those of this environment."""
  folder = tmp_path_factory.mktemp("installed")
  options = ("--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--target", folder)
  status, output = run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=folder)
  assert status == 0, output
  return folder


def test_the_wheel_holds_the_library_its_data_and_nothing_else(wheel):
  files = set(zipfile.ZipFile(wheel).namelist())
  package = ROOT / "switchlora_jax"
  expected = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
  expected |= {str(path.relative_to(ROOT)) for path in (package / "planning" / "gpus").iterdir()}
  expected.add("switchlora_jax/py.typed")
  metadata = {name for name in files if ".dist-info/" in name}
  assert files - metadata == expected
  assert {"METADATA", "RECORD", "WHEEL", "LICENSE"} == {Path(name).name for name in metadata}
  assert any(name.endswith("gpus.toml") for name in files) and any(name.endswith("h100.textproto") for name in files)


@pytest.mark.slow
def test_the_doctest_of_the_layer_passes_from_the_wheel(installed, tmp_path):
  """Started elsewhere, with only the wheel on the path; configs and experiments are not there."""
  code = (
    "import doctest, importlib.util, switchlora_jax, switchlora_jax.lowrank.layers as layers\n"
    "assert not any(map(importlib.util.find_spec, ('configs', 'experiments', 'tests')))\n"
    "print(switchlora_jax.__file__, doctest.testmod(layers))"
  )
  status, output = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed), JAX_PLATFORMS="cpu")
  assert status == 0, output
  assert output.startswith(str(installed)) and re.search(r"failed=0, attempted=[1-9]", output)


# --- metadata --------------------------------------------------------------------------------------------------------


def requirements(lines) -> dict[str, Requirement]:
  """Requirements by canonical name."""
  parsed = [Requirement(line) for line in lines]
  return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def pins(file: str) -> dict[str, str]:
  """The versions that a requirements file pins itself, by canonical name."""
  lines = re.findall(r"^[\w-]+(?:\[\w+\])?==[\w.]+", (ROOT / file).read_text(), re.MULTILINE)
  return {name: next(iter(found.specifier)).version for name, found in requirements(lines).items()}


def test_the_pins_are_the_dependencies():
  assert pins("requirements.txt").keys() == requirements(PROJECT["dependencies"]).keys()


def test_the_default_text_is_installed_with_the_package():
  """data.source=docs, the default, refuses to run without any of them."""
  assert set(map(canonicalize_name, documentation.PACKAGES)) <= requirements(PROJECT["dependencies"]).keys()


@pytest.mark.parametrize("extra", ["gpu", "torch", "eval", "dev", "docs"])
def test_each_extra_has_its_file_of_pins(extra):
  assert pins(f"requirements-{extra}.txt").keys() == requirements(PROJECT["optional-dependencies"][extra]).keys()


def test_each_pin_is_in_the_range_of_the_package():
  groups = {"requirements.txt": PROJECT["dependencies"]}
  groups |= {f"requirements-{extra}.txt": lines for extra, lines in PROJECT["optional-dependencies"].items()}
  for file, lines in groups.items():
    versions = pins(file)
    outside = [str(line) for name, line in requirements(lines).items() if not line.specifier.contains(versions[name])]
    assert not outside, file


def test_the_licence_the_version_and_the_paper_are_stated_once():
  citation = (ROOT / "CITATION.cff").read_text()
  assert f"version: {PROJECT['version']}\n" in citation and f"license: {PROJECT['license']}\n" in citation
  assert "arxiv.org/abs/2406.06564" in citation
  assert "Apache License" in (ROOT / "LICENSE").read_text()
  assert re.search(r"^## \[?Unreleased", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


# --- make ------------------------------------------------------------------------------------------------------------

# A Python of a given version, which makes environments that hold itself, and whose pip writes down what it installs.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  "-c "*) exec {real} -c "import sys; sys.base_prefix, sys.version_info = '{prefix}', ({numbers}); $2" ;;
  "-m venv "*) mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "{folder}/{name}" "$3/bin/python" ;;
  "-m pip install"*) echo "{version} $*" >>{folder}/installed; exit $(cat {folder}/pip_status) ;;
  *) echo "{name} ran $*" ;;
esac
"""

# The only other commands on PATH: a machine's own Pythons would be found.
TOOLS = "make sh cat cksum cp cut expand grep head mkdir rm sed sort touch".split()


class Checkout:
  """A folder with the Makefile, its scripts and two requirements files, and Pythons that are shell scripts."""

  def __init__(self, folder: Path):
    self.root, self.bin = folder / "checkout", folder / "bin"
    shutil.copytree(ROOT / ".ci", self.root / ".ci")
    shutil.copy(ROOT / "Makefile", self.root)
    self.bin.mkdir()
    self.pin("jax==1.0")
    (self.root / "requirements-dev.txt").write_text("-r requirements.txt\npytest==1.0\n")
    self.pip_status(0)
    for tool in TOOLS:
      (self.bin / tool).symlink_to(shutil.which(tool))
    for name, version in {"python3": "3.11.7", "python3.10": "3.10.13", "python3.12": "3.12.1"}.items():
      self.python(name, version)
    self.python("python3.11", "3.11.7")

  def python(self, name: str, version: str):
    script = self.bin / name
    facts = dict(version=version, numbers=version.replace(".", ", "), prefix=self.bin.parent, real=sys.executable)
    script.write_text(FAKE_PYTHON.format(folder=self.bin, name=name, **facts))
    script.chmod(0o755)

  def pin(self, line: str):
    (self.root / "requirements.txt").write_text(line + "\n")

  def pip_status(self, status: int):
    (self.bin / "pip_status").write_text(str(status))

  def make(self, *words) -> tuple[int, str]:
    return run("make", *words, cwd=self.root, PATH=str(self.bin), HOME=str(self.bin))

  def installations(self) -> list[str]:
    """Since the last call, the version of Python and the requirements file of each installation."""
    log = self.bin / "installed"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [f"{line.split()[0]} {line.split()[-1]}" for line in lines]


@pytest.fixture
def checkout(tmp_path):
  return Checkout(tmp_path)


def test_make_installs_once_and_runs_the_command(checkout):
  status, output = checkout.make("pretrain")
  assert status == 0 and "python3 ran -m experiments.pretrain" in output
  assert checkout.installations() == ["3.11.7 requirements.txt"]
  status, output = checkout.make("pretrain")
  assert status == 0 and checkout.installations() == [] and "nstalling" not in output


def test_make_names_the_python_it_needs_and_leaves_no_environment(checkout):
  status, output = checkout.make("pretrain", "PYTHON=python3.10")
  assert status != 0 and not (checkout.root / ".venv").exists()
  assert "Python 3.11 or later is needed; python3.10 is Python 3.10.13; try: make PYTHON=python3" in output
  assert checkout.make("pretrain")[0] == 0
  status, output = checkout.make("pretrain", "PYTHON=python3.9")
  assert status != 0 and "python3.9 does not run" in output
  assert checkout.make("pretrain")[0] == 0, "the environment that was there still works"
  assert checkout.installations() == ["3.11.7 requirements.txt"]


def test_an_environment_of_an_old_python_is_made_again(checkout):
  """As earlier Makefiles left it after `make pretrain PYTHON=python3.10`."""
  (checkout.root / ".venv" / "bin").mkdir(parents=True)
  (checkout.root / ".venv" / "pyvenv.cfg").touch()
  (checkout.root / ".venv" / "run").touch()
  shutil.copy(checkout.bin / "python3.10", checkout.root / ".venv" / "bin" / "python")
  status, output = checkout.make("pretrain")
  assert status == 0 and ".venv has Python 3.10.13. It is made again with Python 3.11.7." in output
  assert "python3 ran" in output and not (checkout.root / ".venv" / "run").exists()


def test_changed_pins_are_installed_and_the_chosen_python_stays(checkout):
  assert checkout.make("pretrain", "PYTHON=python3.12")[0] == 0
  checkout.pin("jax==2.0")
  status, output = checkout.make("pretrain")
  assert status == 0 and "python3.12 ran" in output
  assert checkout.installations() == ["3.12.1 requirements.txt"] * 2


@pytest.mark.parametrize("other", ["3.10.13", "3.12.1"])
def test_the_chosen_python_stays_where_python3_is_another_version_of_the_same_prefix(checkout, other):
  assert checkout.make("pretrain", "PYTHON=python3.11")[0] == 0
  checkout.python("python3", other)
  checkout.pin("jax==2.0")
  status, output = checkout.make("pretrain")
  assert status == 0 and "python3.11 ran" in output and "made again" not in output
  assert checkout.installations() == ["3.11.7 requirements.txt"] * 2


def test_pins_that_another_command_has_replaced_are_installed_again(checkout):
  """As on two branches with different pins: `make test` on one, `make pretrain` on the other."""
  assert checkout.make("test")[0] == 0
  checkout.pin("jax==2.0")
  assert checkout.make("pretrain")[0] == 0
  checkout.pin("jax==1.0")
  assert checkout.make("test")[0] == 0
  assert [line.split()[1] for line in checkout.installations()] == [
    "requirements-dev.txt",
    "requirements.txt",
    "requirements-dev.txt",
  ]


def test_pins_that_are_still_installed_are_not_installed_again(checkout):
  (checkout.root / "requirements-docs.txt").write_text("-r requirements.txt\nmkdocs==1.0\n")
  checkout.make("docs")  # installs, and fails because the fake pip installs no mkdocs
  assert checkout.make("test")[0] == 0
  checkout.make("docs")
  assert checkout.installations() == ["3.11.7 requirements-docs.txt", "3.11.7 requirements-dev.txt"]


def test_the_packages_of_a_failed_installation_are_uncertain(checkout):
  """A full disk: pip may have replaced some packages."""
  assert checkout.make("pretrain")[0] == 0
  checkout.pip_status(1)
  assert checkout.make("test")[0] != 0
  checkout.pip_status(0)
  status, output = checkout.make("pretrain")
  assert status == 0 and "made again" not in output
  assert checkout.installations() == [f"3.11.7 requirements{which}.txt" for which in ("", "-dev", "")]


def test_an_environment_that_was_moved_or_copied_is_made_again(checkout):
  """Its commands begin with the path of the Python that they were installed for."""
  assert checkout.make("pretrain")[0] == 0
  copied = checkout.root.with_name("copy")
  shutil.copytree(checkout.root, copied)
  made, checkout.root = checkout.root, copied
  status, output = checkout.make("pretrain")
  assert status == 0 and f".venv was made as {made}/.venv, and has been moved or copied. It is made again." in output
  assert checkout.make("pretrain")[0] == 0
  checkout.root = made
  assert checkout.make("pretrain")[0] == 0
  assert checkout.installations() == ["3.11.7 requirements.txt"] * 2


def test_an_environment_that_several_checkouts_share_by_a_link_stays(checkout):
  """So does one that an earlier version made, which has not recorded its place."""
  assert checkout.make("pretrain")[0] == 0
  (checkout.root / ".venv" / "place").unlink()
  other = checkout.root.with_name("other")
  shutil.copytree(checkout.root, other, ignore=shutil.ignore_patterns(".venv"))
  (other / ".venv").symlink_to(checkout.root / ".venv")
  made, checkout.root = checkout.root, other
  assert checkout.make("pretrain")[0] == 0
  checkout.root = made
  assert checkout.make("pretrain")[0] == 0
  assert checkout.installations() == ["3.11.7 requirements.txt"] and (other / ".venv").is_symlink()


def test_what_tests_need_includes_what_a_run_needs(checkout):
  assert checkout.make("test")[0] == 0 and checkout.make("pretrain")[0] == 0
  assert checkout.installations() == ["3.11.7 requirements-dev.txt"]
  checkout.pin("jax==2.0")
  assert checkout.make("test")[0] == 0
  assert checkout.installations() == ["3.11.7 requirements-dev.txt"]


def test_an_interrupted_installation_is_made_again(checkout):
  checkout.pip_status(1)
  status, output = checkout.make("pretrain")
  assert status != 0 and "requirements.txt could not be installed" in output
  (checkout.root / ".venv" / "half_a_package").touch()
  checkout.pip_status(0)
  status, output = checkout.make("pretrain")
  assert status == 0 and ".venv is incomplete" in output
  assert not (checkout.root / ".venv" / "half_a_package").exists()


def test_a_failed_update_leaves_the_environment_and_is_tried_again(checkout):
  assert checkout.make("pretrain")[0] == 0
  checkout.pin("jax==2.0")
  checkout.pip_status(1)
  (checkout.root / ".venv" / "kept").touch()
  assert checkout.make("pretrain")[0] != 0
  checkout.pip_status(0)
  assert checkout.make("pretrain")[0] == 0 and (checkout.root / ".venv" / "kept").exists()
  assert len(checkout.installations()) == 3


@pytest.mark.parametrize("python", [None, "python3", "python3.12"])
def test_make_changes_nothing_that_is_no_environment(checkout, python):
  """With a Python of any version, it is a prefix of conda."""
  (checkout.root / ".venv" / "bin").mkdir(parents=True)
  (checkout.root / ".venv" / "thesis.tex").touch()
  if python:
    shutil.copy(checkout.bin / python, checkout.root / ".venv" / "bin" / "python")
  for words in ((), ("PYTHON=python3.11",)):
    status, output = checkout.make("pretrain", *words)
    assert status != 0 and "it has no pyvenv.cfg; move it away" in output
  assert (checkout.root / ".venv" / "thesis.tex").exists() and checkout.installations() == []


def test_the_newest_jax_is_skipped_with_a_sentence_where_there_is_no_python_for_it(checkout):
  (checkout.bin / "python3.12").unlink()
  status, output = checkout.make("newest")
  assert status == 0 and "newest: SKIPPED" in output and "no Python 3.12 or later" in output


def test_help_lists_every_command(checkout):
  targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
  output = checkout.make("help")[1]
  assert targets and all(f"make {target} " in output for target in targets)


def test_ci_runs_targets_that_exist():
  named = re.findall(r"^step \d+ (\w+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
  assert {"lint", "test", "docs", "slow", "newest", "faults"} == set(named)
  assert set(named) <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_pre_commit_runs_the_checks_of_make_lint():
  lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
  hooks = re.findall(r"entry: \.venv/bin/(.+)", (ROOT / ".pre-commit-config.yaml").read_text())
  tool = lambda command: command.split(" --")[0].removesuffix(" .")
  assert {tool(line) for line in re.findall(r"\$\(VENV\)/(.+)", lint)} == {tool(hook) for hook in hooks}
