import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from switchlora_jax.data import documentation
from switchlora_jax.errors import UserError

DIGEST = """
import hashlib
from switchlora_jax.data import documentation
documentation.PACKAGES = ("flax",)
print(hashlib.sha256(repr(documentation.read_documentation()).encode()).hexdigest())
"""
WAVE = "A wave is a disturbance that travels through a medium without carrying it."
TIDE = "The tide rises and falls twice a day because of the moon and of the sun."
ROCK = "A rock is a natural mass of minerals and is known by what it is made of."


@pytest.fixture(scope="module")
def docs():
  return documentation.read_documentation()


def install(site: Path, modules: dict[str, str]):
  """Installs a package "sea" in `site`, as pip does."""
  for path, source in modules.items():
    (site / path).parent.mkdir(parents=True, exist_ok=True)
    (site / path).write_text(source)
  (site / "sea-1.0.dist-info").mkdir()
  (site / "sea-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sea\nVersion: 1.0\n")
  (site / "sea-1.0.dist-info" / "RECORD").write_text("".join(f"{path},,\n" for path in modules))


@pytest.fixture
def sea(tmp_path, monkeypatch):
  """Reads the documentation of a made-up package. Modules with "valid" in their path are for validation."""

  def read(modules, where="site"):
    install(tmp_path / where, modules)
    with monkeypatch.context() as patch:
      patch.syspath_prepend(str(tmp_path / where))
      patch.setattr(documentation, "PACKAGES", ("sea",))
      patch.setattr(documentation, "_is_validation", lambda path: "valid" in path)
      return documentation.read_documentation()

  return read


def doc(*paragraphs):
  return '"""' + "\n\n".join(paragraphs) + '"""\n'


def test_every_package_is_pinned():
  pins = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
  assert set(documentation.PACKAGES) <= set(pins)


@pytest.mark.slow
def test_documentation_is_large_and_validation_does_not_overlap_with_training(docs):
  train, valid = ["\n\n".join(documents) for documents in docs]
  assert len(train) > 5e6 and 3e5 < len(valid) < 1e6
  assert len(train.split("\n\n")) == len(set(train.split("\n\n")))
  assert set(train.split("\n\n")).isdisjoint(valid.split("\n\n"))
  assert documentation.ngram_overlap(docs.train, docs.valid) < 0.01


def test_documentation_does_not_depend_on_the_hash_seed(monkeypatch):
  monkeypatch.setattr(documentation, "PACKAGES", ("flax",))
  here = hashlib.sha256(repr(documentation.read_documentation()).encode()).hexdigest()
  other = subprocess.run(
    [sys.executable, "-c", DIGEST], cwd=ROOT, env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
  )
  assert other.stdout.strip() == here


def test_documentation_does_not_depend_on_the_installation_path(sea):
  modules = {"sea/b.py": doc(WAVE), "sea/a.py": doc(TIDE), "sea/valid.py": doc(ROCK)}
  assert sea(modules, "here") == sea(modules, "there/deeper") == ([TIDE, WAVE], [ROCK])


def test_docstrings_are_read_from_all_modules_except_tests(sea):
  nested = f"try:\n  class Wave:\n    '''{WAVE}'''\nexcept ValueError:\n  def tide():\n    '''{TIDE}'''\n"
  untidy = f"x = '{ROCK} But not in a docstring.'\ny = '\\d'\n"
  tests = dict.fromkeys(("sea/tests/a.py", "sea/test_a.py", "sea/a_test.py", "sea/conftest.py"), doc(ROCK))
  assert sea({"sea/a.py": untidy + nested, **tests}).train == [f"{WAVE}\n\n{TIDE}"]


def test_a_repeated_paragraph_is_kept_once(sea):
  assert sea({"sea/a.py": doc(WAVE, WAVE), "sea/b.py": doc(TIDE, WAVE)}).train == [WAVE, TIDE]


def test_training_paragraphs_that_share_eight_words_with_validation_are_removed(sea):
  eight, seven = " ".join(ROCK.split()[:8]) + " and so on.", " ".join(ROCK.split()[:7]) + " and so on."
  text = sea({"sea/a.py": doc(eight, seven), "sea/valid.py": doc(WAVE, ROCK)})
  assert text == ([seven], [f"{WAVE}\n\n{ROCK}"])


def test_paragraphs_are_unwrapped_and_only_prose_is_kept(sea):
  half = len(WAVE) // 2 + WAVE[len(WAVE) // 2 :].index(" ")
  numpydoc = f"Parameters\n----------\nheight : float, optional\n    {WAVE[:half]}\n    {WAVE[half + 1 :]}\nlow : int"
  items = f"- {TIDE}\n- {ROCK}"
  code = ">>> the_waves and the_tides and the_rocks and that is all of it."
  formula = ".. math:: f(x) = \\int_0^{2 \\pi} g(x, y) h(y) dy + \\sum_k a_k x^k / k!"
  notes = f"Notes\n-----\n{WAVE.upper()}"
  prose = [WAVE, TIDE, ROCK, WAVE.upper()]
  assert sea({"sea/a.py": "r" + doc(numpydoc, items, notes, code, formula)}).train == ["\n\n".join(prose)]


def test_a_hanging_indent_continues_its_line(sea):
  argument = f"Args:\n  height: {WAVE}\n    {TIDE}\n"
  assert sea({"sea/a.py": doc(ROCK, argument)}).train == [f"{ROCK}\n\nheight: {WAVE} {TIDE}"]


def test_overlap_counts_ngrams():
  assert documentation.ngram_overlap(["a b c d"], ["B, c! x", "a b"], n=2) == 2 / 3
  assert documentation.ngram_overlap(["a b c d"], ["b c d e f", "b c d"], n=3) == 2 / 4
  assert documentation.ngram_overlap(["a b"], ["c d"], n=2) == 0 == documentation.ngram_overlap(["a"], [], n=2)


def test_a_missing_package_is_a_user_error(monkeypatch):
  monkeypatch.setattr(documentation, "PACKAGES", ("numpy", "no-such-sea"))
  with pytest.raises(UserError, match=r"no-such-sea is not installed; install requirements\.txt"):
    documentation.read_documentation()
