"""English text that comes with the packages: the prose of their documentation."""

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

from tqdm import tqdm

from switchlora_jax.errors import UserError

# Pinned in requirements.txt, so that the text changes only when a pin does.
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
SHINGLE = 8  # words that two texts must share in a row to count as copied
VALID_SHARE = 16  # one module in so many is for validation
FULL_LINE = 60  # columns; a line this wide was wrapped, so the next one continues it

_HEADING = re.compile(r"^.*\n *[-=~^]{3,} *$", re.MULTILINE)
_TEST_FILE = re.compile(r"(^|[/_])(tests?|testing|conftest)([/_.]|$)")


class Documentation(NamedTuple):
  """Documents to train and to validate on."""

  train: list[str]
  valid: list[str]


def documentation(progress: bool = False) -> Documentation:
  """The English prose in the docstrings of `PACKAGES`: a document a module, blank lines between paragraphs.

  Left out are doctests, code, tables, formulas, headings and what is shorter than eight words; no
  paragraph occurs twice. A sixteenth of the modules, by a checksum of their paths, is for
  validation. Training then loses every paragraph that shares eight words in a row with validation,
  so it contains no validation paragraph, and none that differs by a word or two. Nothing is taken
  from validation for what training says.
  """
  modules, seen = {}, set()
  for path, file in tqdm(_source_files(), desc="read documentation", unit="file", disable=not progress):
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
  """The installed version of each of `PACKAGES`; a UserError where one is missing."""
  try:
    return {package: metadata.version(package) for package in PACKAGES}
  except metadata.PackageNotFoundError as error:
    raise UserError(
      f"--config.data.source=docs reads the documentation of {', '.join(PACKAGES)}; {error.name} is not installed; "
      "install requirements.txt, or train on your own files with --config.data.source=text"
    ) from None


def overlap(train: Iterable[str], valid: Iterable[str], n: int = SHINGLE) -> float:
  """The share of validation's word n-grams that occur in training; case and punctuation do not count."""
  counts = Counter(shingle for document in valid for shingle in _shingles(document, n))
  copied = {shingle for document in train for shingle in _shingles(document, n) if shingle in counts}
  return sum(counts[shingle] for shingle in copied) / max(1, counts.total())


def _shingles(text: str, n: int) -> Iterator[tuple[str, ...]]:
  words = re.findall(r"\w+", text.lower())
  return zip(*(words[start:] for start in range(n)), strict=False)


def _is_validation(path: str) -> bool:
  return zlib.crc32(path.encode()) % VALID_SHARE == 0


def _source_files() -> list[tuple[str, os.PathLike]]:
  """(path inside the installation, file) of each module of each package but its tests, in the order of the paths."""
  files = {}
  for package in package_versions():
    distribution = metadata.distribution(package)
    paths = [path for path in distribution.files or () if path.suffix == ".py" and not _TEST_FILE.search(str(path))]
    files.update((str(path), distribution.locate_file(path)) for path in paths)
  return sorted(files.items())


def _paragraphs_of(file: os.PathLike) -> Iterator[str]:
  with open(file, "rb") as source, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's escape sequences
    tree = ast.parse(source.read())
  for docstring in _docstrings(tree.body):
    yield from filter(_is_prose, _paragraphs(inspect.cleandoc(docstring)))


def _docstrings(statements: list[ast.stmt]) -> Iterator[str]:
  """Every string that stands alone as a statement, in order: of modules, classes, functions and attributes."""
  for statement in statements:
    match statement:
      case ast.Expr(value=ast.Constant(value=str(text))):
        yield text
    for field in ("body", "orelse", "handlers", "finalbody"):
      yield from _docstrings(getattr(statement, field, ()))


def _paragraphs(docstring: str) -> Iterator[str]:
  """The paragraphs, each unwrapped to one line; each item of a list and each indented block is one too."""
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
  """Whether it reads as English: at least eight words, mostly letters, a sentence's end."""
  letters = sum(character.isalpha() or character == " " for character in paragraph)
  long_enough = len(re.findall(r"\w+", paragraph)) >= SHINGLE
  return long_enough and letters >= 0.8 * len(paragraph) and paragraph[-1] in ".:?!)" and ">>>" not in paragraph
