"""The cache of compiled programs: what a second start reuses, and what is removed."""

import os
import subprocess
import sys

import jax
import pytest
import zstandard
from paths import ROOT

from experiments.common import children, compiled_programs

PROGRAM = """
import jax, jax.numpy as jnp
from experiments.common import cli, compiled_programs

compiled_programs.SECONDS = 0
seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))

def main():
  jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4)))
  print(seen.count("/jax/compilation_cache/cache_hits"), seen.count("/jax/compilation_cache/cache_misses"))

cli.run(main)
"""
INHERITED = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "JAX_PERS"))}


def start(folder, *flags):
  """(hits, misses) of a small program whose working directory is `folder`, and what it wrote on stderr."""
  environment = INHERITED | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", PROGRAM, *flags]
  done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return tuple(map(int, done.stdout.split())), done.stderr


def test_a_second_start_compiles_nothing(tmp_path):
  (hits, misses), _ = start(tmp_path)
  entries = list((tmp_path / "cache" / "compiled").glob("*-cores/*-cache"))
  assert hits == 0 and misses == len(entries) > 0
  entries[0].write_bytes(entries[0].read_bytes()[:-9])  # as a process leaves it that is killed while it writes
  (hits, again), errors = start(tmp_path)
  assert again == 1 and hits == misses - 1 and errors == ""
  assert start(tmp_path) == ((misses, 0), "")


def test_the_flag_names_another_folder_or_none(tmp_path):
  ((_, misses), _), (found, _) = (
    start(tmp_path, "--compilation_cache=here"),
    start(tmp_path, "--compilation_cache=none"),
  )
  assert misses == len(list((tmp_path / "here").glob("*-cores/*-cache"))) and found == (0, 0)
  assert not (tmp_path / "cache").exists()


@pytest.fixture
def settings(monkeypatch):
  """JAX's settings, restored afterwards, and the flag with the value that the function is called with."""
  names = [
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_enable_xla_caches",
    "jax_persistent_cache_min_compile_time_secs",
  ]
  before = {name: getattr(jax.config, name) for name in names}

  def use(flag, folder=None, environment=None):
    monkeypatch.setattr(compiled_programs.flags, "FLAGS", type("Flags", (), {"compilation_cache": flag}))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if environment:
      monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", environment)
    jax.config.update("jax_compilation_cache_dir", folder)

  yield use
  for name, value in before.items():
    jax.config.update(name, value)


def test_a_folder_that_cannot_be_used_is_a_warning(settings, tmp_path, caplog):
  (tmp_path / "cache").write_text("a file")
  settings(None)
  compiled_programs.enable(str(tmp_path / "cache"))
  assert jax.config.jax_compilation_cache_dir is None
  assert "no compiled programs are stored in" in caplog.text and "see --compilation_cache" in caplog.text


def test_a_setting_of_jax_comes_before_the_default(settings, tmp_path):
  settings(None, folder=str(tmp_path / "of_jax"))
  compiled_programs.enable(str(tmp_path / "cache"))
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "of_jax") and not (tmp_path / "cache").exists()
  settings(str(tmp_path / "given"), folder=str(tmp_path / "of_jax"))
  compiled_programs.enable(str(tmp_path / "cache"))
  assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / "given"))


def test_programs_for_another_number_of_cores_are_apart(settings, tmp_path, monkeypatch):
  folders = set()
  for cores in ({0}, {0, 1}):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: cores, raising=False)
    settings(str(tmp_path))
    compiled_programs.enable("unused")
    folders.add(jax.config.jax_compilation_cache_dir)
  assert folders == {str(tmp_path / "1-cores"), str(tmp_path / "2-cores")}


def test_a_check_that_is_interrupted_is_repeated(tmp_path, monkeypatch):
  (tmp_path / "a-cache").write_bytes(b"a part")

  def interrupted(file):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(compiled_programs, "_is_whole", interrupted)
    compiled_programs._remove_parts(tmp_path)
  os.utime(tmp_path / "a-cache", (1000, 1000))
  compiled_programs._remove_parts(tmp_path)
  assert not list(tmp_path.glob("*-cache"))


@pytest.mark.parametrize(("flag", "variable", "stored"), [(None, None, False), ("here", None, True), (None, "x", True)])
def test_several_processes_store_programs_only_where_asked(settings, flag, variable, stored):
  settings(flag, environment=variable)
  compiled_programs.only_if_asked()
  assert jax.config.jax_enable_compilation_cache == stored


def test_children_store_nothing_either_if_the_flag_is_none(settings, tmp_path):
  settings("none", folder=str(tmp_path))
  assert "JAX_ENABLE_COMPILATION_CACHE" not in children.environment()
  compiled_programs.enable("unused")
  assert children.environment()["JAX_ENABLE_COMPILATION_CACHE"] == "false"


def test_the_entries_written_first_are_removed_beyond_the_limit(settings, tmp_path, monkeypatch):
  entry, folder = zstandard.compress(b"a program"), tmp_path / f"{compiled_programs._cores()}-cores"
  folder.mkdir()
  for age in range(4):
    path = folder / f"{age}-cache"
    path.write_bytes(entry)
    os.utime(path, (1000 - age, 1000 - age))
  monkeypatch.setattr(compiled_programs, "LIMIT", 2 * len(entry))
  settings(str(tmp_path))
  compiled_programs.enable("unused")
  assert sorted(path.name for path in folder.glob("*-cache")) == ["0-cache", "1-cache"]


def test_entries_are_read_once(tmp_path, monkeypatch):
  (tmp_path / "a-cache").write_bytes(zstandard.compress(b"a program"))
  compiled_programs._remove_parts(tmp_path)
  os.utime(tmp_path / "a-cache", (1000, 1000))
  monkeypatch.setattr(compiled_programs, "_is_whole", lambda file: pytest.fail("read again"))
  compiled_programs._remove_parts(tmp_path)
