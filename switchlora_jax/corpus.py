"""Where text comes from: the documentation of installed packages, or the user's own files.

Both give a `Corpus` of documents (strings) that can be iterated again and again.
"""

import ast
import glob
import inspect
import json
import os
import re
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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


class Corpus(NamedTuple):
  """Documents to train and to validate on; `valid` is None where the text names none."""

  train: Iterable[str]
  valid: Iterable[str] | None


# The documentation of installed packages.


def documentation(progress: bool = False) -> Corpus:
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
  return Corpus([document for document in train if document], list(valid.values()))


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


# The user's own files.


def text_files(path: str, eval_path: str) -> Corpus:
  """The files that the globs `path` and `eval_path` match, read anew each time they are iterated.

  A `.json` or `.jsonl` file holds a JSON object a line, whose `text` is a document; any other file
  is one document. A further `.gz` means that the file is gzipped. Nothing is opened yet.
  """
  train = _matches(path, "--config.data.path")
  if not eval_path:
    return Corpus(TextFiles(train), None)
  valid = _matches(eval_path, "--config.data.eval_path")
  if shared := sorted(set(train) & set(valid)):
    raise UserError(
      "validation text must be text that training does not see; --config.data.path and --config.data.eval_path "
      f"both match {shared[0]} ({len(shared)} such); narrow one of them"
    )
  return Corpus(TextFiles(train), TextFiles(valid))


@dataclass(frozen=True)
class TextFiles:
  """The documents of `files`, file by file; in memory are a document and a chunk of its file."""

  files: tuple[str, ...]

  def __iter__(self) -> Iterator[str]:
    for file in self.files:
      if file.removesuffix(".gz").endswith((".json", ".jsonl")):
        yield from (_text_field(line, file, number) for number, line in enumerate(_lines(file), 1) if line.strip())
      else:
        yield "".join(_lines(file))


def _matches(pattern: str, flag: str) -> tuple[str, ...]:
  if not pattern:
    raise UserError(f"--config.data.source=text needs files; {flag} is empty; pass e.g. {flag}='c4/*.json.gz'")
  found = glob.glob(os.path.expanduser(pattern), recursive=True)
  files = tuple(sorted(file for file in found if os.path.isfile(file)))
  if not files:
    raise UserError(
      f"{flag} (={pattern!r}) must match text, .json or .jsonl files; it matches no file; "
      f"check it with ls, and quote it: {flag}='c4/*.json.gz'"
    )
  return files


def _lines(file: str) -> Iterator[str]:
  """The lines of a file, with their line breaks."""
  import datasets  # here, because it takes a second and only this source wants it

  try:
    with tempfile.TemporaryDirectory() as scratch:  # for a lock file; streaming keeps no data
      # Not load_dataset, which reports each use over the network.
      rows = datasets.IterableDataset.from_text(glob.escape(file), keep_linebreaks=True, cache_dir=scratch)
    for batch in rows.iter(batch_size=1000):
      yield from batch["text"]
  except (OSError, ValueError, EOFError, zlib.error) as error:
    raise UserError(
      f"{file} must be UTF-8 text (gzipped if it ends in .gz); reading it failed with {type(error).__name__}: {error}; "
      "convert or rename it, or leave it out of the glob"
    ) from error


def _text_field(line: str, file: str, number: int) -> str:
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    found = f"no JSON ({error})"
  else:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
      return row["text"]
    found = f"the fields {sorted(row)}" if isinstance(row, dict) and "text" not in row else line.strip()[:60]
  raise UserError(
    f'{file}, line {number}: expected a JSON object with a `text` string, as {{"text": "…"}}; found {found}; '
    "write one such object a line, or name plain text .txt"
  )
