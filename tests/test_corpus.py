import gzip
import hashlib
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from switchlora_jax import corpus
from switchlora_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DIGEST = """
import hashlib
from switchlora_jax import corpus
print(hashlib.sha256(repr(corpus.documentation()).encode()).hexdigest())
"""
WAVE = "A wave is a disturbance that travels through a medium without carrying it."
TIDE = "The tide rises and falls twice a day because of the moon and of the sun."
ROCK = "A rock is a natural mass of minerals and is known by what it is made of."


@pytest.fixture(scope="module")
def docs():
  return corpus.documentation()


def install(site: Path, modules: dict[str, str]):
  """A package "sea" in `site`, as pip would leave it."""
  for path, source in modules.items():
    (site / path).parent.mkdir(parents=True, exist_ok=True)
    (site / path).write_text(source)
  (site / "sea-1.0.dist-info").mkdir()
  (site / "sea-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sea\nVersion: 1.0\n")
  (site / "sea-1.0.dist-info" / "RECORD").write_text("".join(f"{path},,\n" for path in modules))


@pytest.fixture
def sea(tmp_path, monkeypatch):
  """Documentation of a made-up package whose modules `valid_…` are for validation."""

  def read(modules, where="site"):
    install(tmp_path / where, modules)
    with monkeypatch.context() as patch:
      patch.syspath_prepend(str(tmp_path / where))
      patch.setattr(corpus, "PACKAGES", ("sea",))
      patch.setattr(corpus, "_is_validation", lambda path: "valid" in path)
      return corpus.documentation()

  return read


def doc(*paragraphs):
  return '"""' + "\n\n".join(paragraphs) + '"""\n'


# Documentation.


def test_every_package_is_pinned():
  pins = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
  assert set(corpus.PACKAGES) <= set(pins)


def test_documentation_is_large_and_its_validation_is_new(docs):
  train, valid = ["\n\n".join(documents) for documents in docs]
  assert len(train) > 5e6 and 3e5 < len(valid) < 1e6
  assert len(train.split("\n\n")) == len(set(train.split("\n\n")))
  assert set(train.split("\n\n")).isdisjoint(valid.split("\n\n"))
  assert corpus.overlap(docs.train, docs.valid) < 0.01


def test_documentation_does_not_depend_on_the_hash_seed(docs):
  other = subprocess.run(
    [sys.executable, "-c", DIGEST], cwd=ROOT, env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
  )
  assert other.stdout.strip() == hashlib.sha256(repr(docs).encode()).hexdigest()


def test_documentation_does_not_depend_on_where_it_is_installed(sea):
  modules = {"sea/b.py": doc(WAVE), "sea/a.py": doc(TIDE), "sea/valid.py": doc(ROCK)}
  assert sea(modules, "here") == sea(modules, "there/deeper") == ([TIDE, WAVE], [ROCK])


def test_docstrings_of_everything_but_tests(sea):
  nested = f"try:\n  class Wave:\n    '''{WAVE}'''\nexcept ValueError:\n  def tide():\n    '''{TIDE}'''\n"
  untidy = f"x = '{ROCK} But not in a docstring.'\ny = '\\d'\n"
  tests = dict.fromkeys(("sea/tests/a.py", "sea/test_a.py", "sea/a_test.py", "sea/conftest.py"), doc(ROCK))
  assert sea({"sea/a.py": untidy + nested, **tests}).train == [f"{WAVE}\n\n{TIDE}"]


def test_a_paragraph_is_taken_once(sea):
  assert sea({"sea/a.py": doc(WAVE, WAVE), "sea/b.py": doc(TIDE, WAVE)}).train == [WAVE, TIDE]


def test_training_loses_what_shares_eight_words_with_validation(sea):
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
  assert corpus.overlap(["a b c d"], ["B, c! x", "a b"], n=2) == 2 / 3
  assert corpus.overlap(["a b c d"], ["b c d e f", "b c d"], n=3) == 2 / 4
  assert corpus.overlap(["a b"], ["c d"], n=2) == 0 == corpus.overlap(["a"], [], n=2)


def test_a_missing_package_is_a_sentence(monkeypatch):
  monkeypatch.setattr(corpus, "PACKAGES", ("numpy", "no-such-sea"))
  with pytest.raises(UserError, match=r"no-such-sea is not installed; install requirements\.txt"):
    corpus.documentation()


# The user's own files.


def lines(*texts):
  return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()


@pytest.fixture
def files(tmp_path):
  """Three documents of each kind of file, in folders of a folder."""
  (tmp_path / "deep" / "er").mkdir(parents=True)
  (tmp_path / "a[1].txt").write_bytes("é one\r\n\n two".encode())
  (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"three\n"))
  (tmp_path / "deep" / "c.json").write_bytes(b"\n" + lines("four\nfive", "six"))
  (tmp_path / "deep" / "er" / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "seven"}\n{"url": [], "text": ""}'))
  return tmp_path


def test_all_kinds_of_files_in_one_glob_are_read_again_and_again(files):
  text = corpus.text_files(f"{files}/**", "")
  assert list(text.train) == ["é one\n\n two", "three\n", "four\nfive", "six", "seven", ""] == list(text.train)
  assert text.valid is None


def test_files_are_read_without_network_or_cache(files, monkeypatch):
  import datasets

  tried = []
  monkeypatch.setattr(socket.socket, "connect", lambda *address: tried.append(address))
  monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: tried.append(address))
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", files / "cache")
  assert len(list(corpus.text_files(f"{files}/deep/**", "").train)) == 4
  assert not tried and not (files / "cache").exists()


def test_files_are_read_as_they_are_wanted(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(lines("fine") + b"not json\n")
  documents = iter(corpus.text_files(f"{tmp_path}/*", "").train)
  assert next(documents) == "fine"
  with pytest.raises(UserError):
    next(documents)


def test_validation_files_are_other_files(files):
  text = corpus.text_files(f"{files}/*.txt", f"{files}/*.gz")
  assert [list(part) for part in text] == [["é one\n\n two"], ["three\n"]]
  with pytest.raises(UserError, match=r"both match .*a\[1\]\.txt \(1 such\); narrow one"):
    corpus.text_files(f"{files}/*", f"{files}/*.txt")


@pytest.mark.parametrize(
  ("path", "eval_path", "message"),
  [
    ("", "", r"--config\.data\.path is empty; pass e\.g\. --config\.data\.path='c4/\*\.json\.gz'"),
    ("none/*.txt", "", r"--config\.data\.path \(='none/\*\.txt'\) must match .* it matches no file"),
    (str(Path(__file__)), "none", r"--config\.data\.eval_path \(='none'\) must match"),
    (str(ROOT), "", "matches no file"),
  ],
)
def test_globs_that_match_nothing_are_sentences(path, eval_path, message):
  with pytest.raises(UserError, match=message):
    corpus.text_files(path, eval_path)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.jsonl", lines("x") + b'{"txt": "y"}\n', r"a\.jsonl, line 2: expected .*`text`.*; found the fields \['txt'\]"),
    ("a.jsonl", b'{"text": 3}\n', r'line 1: .*found \{"text": 3\}; write one such object a line'),
    ("a.json", b'[\n{"text": "x"}]', r"a\.json, line 1: .*found no JSON"),
    ("a.json", b'["x"]', r'found \["x"\]'),
    ("a.txt", b"caf\xe9", r"a\.txt must be UTF-8 text .*UnicodeDecodeError.*; convert or"),
    ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl must be UTF-8 text"),
    ("a.json.gz", b'{"text": "x"}', r"a\.json\.gz must be .*gzipped if it ends in \.gz.*BadGzipFile"),
    ("a.txt.gz", gzip.compress(bytes(range(97, 123)) * 999, mtime=0)[:-9], r"a\.txt\.gz must be .*EOFError"),
    ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:10] + b"\xff" * 20, r"a\.txt\.gz must be .*: Error -3"),
    ("a[1].gz", gzip.compress(b"x", mtime=0), r"a\[1\]\.gz must be .*; convert or rename it"),
  ],
)
def test_files_that_cannot_be_read_are_sentences(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    list(corpus.text_files(f"{tmp_path}/*", "").train)
