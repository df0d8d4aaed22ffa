"""Embedded English text: the prose in the docstrings of the installed packages."""

import ast
import inspect
import os
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import NamedTuple

from switchlora_jax.data.corpus import Corpus
from switchlora_jax.errors import UserError
from switchlora_jax.progress import progress_bar

# All pinned in requirements.txt: the text changes only with a pin.
PACKAGES = (
  "absl-py",
  "chex",
  "datasets",
  "flax",
  "jax",
  "matplotlib",
  "ml-collections",
  "numpy",
  "optax",
  "orbax-checkpoint",
  "pandas",
  "scipy",
  "tensorboardX",
  "tqdm",
)
SHINGLE = 8  # consecutive words that count as a copy if two texts share them
VALID_SHARE = 16  # one of this number of modules is used for validation
FULL_LINE = 60  # columns; a line at least this wide is taken to be wrapped

_HEADING = re.compile(r"^.*\n *[-=~^]{3,} *$", re.MULTILINE)
_TEST_FILE = re.compile(r"(^|[/_])(tests?|testing|conftest)([/_.]|$)")


class Documentation(NamedTuple):
  """Training and validation documents."""

  train: list[str]
  valid: list[str]


def read_documentation(progress: bool = False) -> Documentation:
  """Extracts the English prose from the docstrings of `PACKAGES`, one document per module.

  Paragraphs are separated by blank lines. Doctests, code, tables, formulas, headings and paragraphs of fewer than eight
  words are left out. Each paragraph occurs once. One module in sixteen, selected by a checksum of its path, is used for
  validation. Training paragraphs that share eight consecutive words with validation are removed; validation is not
  filtered by training.
  """
  modules, seen = {}, set()
  for path, file in progress_bar(_source_files(), desc="read documentation", unit="file", shown=progress):
    fresh = [text for text in dict.fromkeys(_paragraphs_of(file)) if text not in seen]
    seen.update(fresh)
    modules[path] = fresh
  valid = {path: "\n\n".join(texts) for path, texts in modules.items() if _is_validation(path) and texts}
  known = {shingle for document in valid.values() for shingle in _shingles(document, SHINGLE)}
  train = (
    "\n\n".join(text for text in texts if known.isdisjoint(_shingles(text, SHINGLE)))
    for path, texts in modules.items()
    if not _is_validation(path)
  )
  return Documentation([document for document in train if document], list(valid.values()))


def package_versions() -> dict[str, str]:
  """The installed version of each of `PACKAGES`.

  Raises:
    UserError: one is not installed.
  """
  try:
    return {package: metadata.version(package) for package in PACKAGES}
  except metadata.PackageNotFoundError as error:
    raise UserError(
      f"--config.data.source=docs reads the documentation of {', '.join(PACKAGES)}; {error.name} is not installed; "
      "install requirements.txt, or train on your own files with --config.data.source=text"
    ) from None


def origin() -> list:
  """[package, version] of each package, to detect that the text has changed."""
  return sorted(package_versions().items())


def read_corpus(progress: bool = False) -> Corpus:
  """The documentation as a corpus, with the share of its validation text that occurs in training as a note."""
  text = read_documentation(progress)
  return Corpus([text.train], [text.valid], {"overlap": ngram_overlap(*text)})


def ngram_overlap(train: Iterable[str], valid: Iterable[str], n: int = SHINGLE) -> float:
  """Fraction of the word n-grams of validation that occur in training. Case and punctuation are ignored."""
  counts = Counter(shingle for document in valid for shingle in _shingles(document, n))
  copied = {shingle for document in train for shingle in _shingles(document, n) if shingle in counts}
  return sum(counts[shingle] for shingle in copied) / max(1, counts.total())


def _shingles(text: str, n: int) -> Iterator[tuple[str, ...]]:
  words = re.findall(r"\w+", text.lower())
  return zip(*(words[start:] for start in range(n)), strict=False)


def _is_validation(path: str) -> bool:
  return zlib.crc32(path.encode()) % VALID_SHARE == 0


def _source_files() -> list[tuple[str, os.PathLike]]:
  """(path inside the installation, file) of every module of the packages except tests, sorted by path."""
  files = {}
  for package in package_versions():
    distribution = metadata.distribution(package)
    paths = [path for path in distribution.files or () if path.suffix == ".py" and not _TEST_FILE.search(str(path))]
    files.update((str(path), distribution.locate_file(path)) for path in paths)
  return sorted(files.items())


def _paragraphs_of(file: os.PathLike) -> Iterator[str]:
  with open(file, "rb") as source, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # invalid escape sequences in the packages
    tree = ast.parse(source.read())
  for docstring in _docstrings(tree.body):
    yield from filter(_is_prose, _paragraphs(inspect.cleandoc(docstring)))


def _docstrings(statements: list[ast.stmt]) -> Iterator[str]:
  """Every string that is a statement, in source order: docstrings of modules, classes, functions and attributes."""
  for statement in statements:
    match statement:
      case ast.Expr(value=ast.Constant(value=str(text))):
        yield text
    for field in ("body", "orelse", "handlers", "finalbody"):
      yield from _docstrings(getattr(statement, field, ()))


def _paragraphs(docstring: str) -> Iterator[str]:
  """Splits a docstring into paragraphs, list items and indented blocks, each unwrapped to one line."""
  words, indent, full = [], 0, False
  for line in [*_HEADING.sub("", docstring).splitlines(), ""]:
    text = line.strip()
    depth, item = len(line) - len(line.lstrip()), text.startswith(("- ", "* "))
    if words and (not text or item or depth < indent or (depth > indent and not full)):
      yield " ".join(words)
      words = []
    if text:
      words += text[2:].split() if item else text.split()
      indent, full = depth, len(line.rstrip()) >= FULL_LINE


def _is_prose(paragraph: str) -> bool:
  """Whether a paragraph is English prose: at least eight words, mostly letters, final punctuation, no doctest."""
  letters = sum(character.isalpha() or character == " " for character in paragraph)
  long_enough = len(re.findall(r"\w+", paragraph)) >= SHINGLE
  return long_enough and letters >= 0.8 * len(paragraph) and paragraph[-1] in ".:?!)" and ">>>" not in paragraph
