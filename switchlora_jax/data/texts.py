"""Texts beside the one that a run trains on: added to its training, for validation, or for an evaluation.

A text is named by `docs`, the documentation of the installed packages; by a folder filled by
`experiments.prepare_data`; or by a glob of files or `hub:NAME`, which are packed into the cache.
"""

import os
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

from switchlora_jax.data import corpus, documentation, folders, preparation, shards
from switchlora_jax.data.folders import PackedText
from switchlora_jax.data.readers import RowOptions
from switchlora_jax.data.tokenizer import tokenizer_sha256
from switchlora_jax.errors import UserError

DOCS = "docs"
MIXTURE, EVAL_ALSO = "--config.data.mixture", "--config.data.eval_also"


class Named(NamedTuple):
  """A text as it is named by a setting.

  Attributes:
    place: `docs`, a folder, a glob, or `hub:NAME`.
    flag: the setting, for messages, in the form in which the place follows after `=`.
    label: its name in metrics and summaries.
    share: of the rows of a run; None for a validation text.
  """

  place: str
  flag: str
  label: str
  share: Fraction | None = None

  @property
  def folder(self) -> Path | None:
    """The folder that `place` names, if it is one."""
    path = Path(os.path.expanduser(self.place))
    return path if self.place != DOCS and path.is_dir() else None


class Form(NamedTuple):
  """How a run packs its texts, and where.

  Attributes:
    tokenizer: the tokenizer; None if it will be trained.
    seq_len, packing, cache_dir: as in the config.
    rows: which rows of files are documents.
  """

  tokenizer: Path | None
  seq_len: int
  packing: str
  cache_dir: str
  rows: RowOptions


def parse_mixture(setting: str) -> list[Named]:
  """The texts of `data.mixture`: `SHARE=TEXT`, separated by semicolons.

  Raises:
    UserError: an entry has no valid share, or the shares leave no rows for the text of the run.
  """
  found = []
  for left, place in _entries(setting, MIXTURE, "SHARE=TEXT, as in 0.1=old/*.txt"):
    share = Fraction(left) if re.fullmatch(r"0?\.\d{1,4}", left, re.ASCII) else Fraction(0)
    if not share:
      raise UserError(
        f"{MIXTURE} (={setting!r}): the share of {place!r} must be a number between 0 and 1 with at most four "
        f"decimals; found {left!r}; write e.g. 0.1={place}"
      )
    if place in {text.place for text in found}:
      raise UserError(f"{MIXTURE} (={setting!r}) must have different texts; found {place!r} twice; add up its shares")
    found.append(Named(place, f"{MIXTURE}={left}", place, share))
  if (total := sum(text.share for text in found)) >= 1:
    raise UserError(
      f"{MIXTURE} (={setting!r}): the shares must add up to less than 1, the rest is of the text in data.source and "
      f"data.path; found {float(total):g}; lower them"
    )
  return found


def parse_eval_also(setting: str) -> list[Named]:
  """The texts of `data.eval_also`: `NAME=TEXT`, separated by semicolons.

  Raises:
    UserError: an entry has no name, or one that metrics cannot have, or a name is given twice.
  """
  found = []
  for name, place in _entries(setting, EVAL_ALSO, "NAME=TEXT, as in old=held_out/*.txt"):
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
      raise UserError(
        f"{EVAL_ALSO} (={setting!r}): names must consist of letters, digits, '_', '-' and '.'; found {name!r}; "
        "choose another name"
      )
    if name in {text.label for text in found}:
      raise UserError(f"{EVAL_ALSO} (={setting!r}) must have different names; found {name!r} twice; rename one")
    found.append(Named(place, f"{EVAL_ALSO}={name}", name))
  return found


def _entries(setting: str, flag: str, form: str) -> list[tuple[str, str]]:
  """The two sides of each entry of a setting."""
  entries = []
  for entry in filter(None, map(str.strip, setting.split(";"))):
    left, equals, place = (part.strip() for part in entry.partition("="))
    if not (left and equals and place):
      raise UserError(f"{flag} (={setting!r}) must list entries {form}, separated by semicolons; found {entry!r}")
    entries.append((left, place))
  return entries


def check(text: Named, form: Form) -> None:
  """Checks a text before any expensive work.

  Raises:
    UserError: a glob matches no file, or a folder is not prepared for the run.
  """
  if text.folder:
    _check_folder(text, text.folder, form)
  elif text.place == DOCS:
    try:
      documentation.origin()
    except UserError as error:
      raise UserError(f"{text.flag} (={text.place!r}): {error}") from error
  else:
    _parts(text, "valid" if text.share is None else "train", form)


def local_files(text: Named) -> Sequence[str]:
  """The files of a text that is a glob; none for others."""
  if text.place == DOCS or text.folder or text.place.startswith(corpus.HUB):
    return ()
  return corpus.matching_files(text.place, text.flag)


def check_separate(training: Sequence[str], validation: Sequence[str]) -> None:
  """Raises `UserError` if a file is among those of training and of validation."""
  if shared := corpus.shared_files(training, validation):
    raise UserError(
      f"training and validation must not share files; {shared[0]} is in both (shared files: {len(shared)}); narrow the "
      "globs of data.path and data.mixture, or of data.eval_path and data.eval_also"
    )


def open_text(text: Named, split: str, form: Form, progress: bool) -> PackedText:
  """The sequences of a text, packed first if necessary.

  Args:
    split: `train` or `valid`: which sequences of `docs`, of a prepared folder or of a hub dataset. Of files it is all.
    form: with a tokenizer.

  Raises:
    UserError: as `check`; or the text cannot be read, or is shorter than one sequence.
  """
  if text.folder:
    _check_folder(text, text.folder, form)
  folder = text.folder or _fill_cache(text, split, form, progress)
  manifest = shards.read_manifest(folder)
  shards.verify_checksums(folder, manifest, progress)
  fingerprint = shards.fingerprint(manifest)
  if text.folder or text.place == DOCS:
    data = folders.open_folder(folder, manifest, text.place)
    rows = data.train if split == "train" else data.valid
    opened = PackedText(text.label, rows, data.bytes_per_token, fingerprint, data.summary[split])
  else:
    found = manifest["train"]
    rows, sizes = shards.open_sequences(folder, found), folders.printed_sizes(found)
    opened = PackedText(text.label, rows, folders.bytes_per_token(found), fingerprint, sizes)
  check_not_empty(text, len(opened.rows), form)
  return opened


def check_not_empty(text: Named, rows: int, form: Form) -> None:
  """Raises `UserError` if a text has no row."""
  if not rows:
    raise UserError(
      f"{text.flag} (={text.place!r}) must hold at least one row of {form.seq_len} tokens; add text, or lower seq_len"
    )


def _fill_cache(text: Named, split: str, form: Form, progress: bool) -> Path:
  """The folder of the cache with a text that is not prepared."""
  request = preparation.Request([], str(form.tokenizer), form.seq_len, packing=form.packing)
  if text.place == DOCS:  # the folder of a run with data.source=docs and this tokenizer
    name, read = DOCS, partial(documentation.read_corpus, progress)
    request = request._replace(text=[DOCS, documentation.origin()])
  else:
    parts = _parts(text, split, form)
    name, read = ("mixture" if split == "train" else "evaluate"), partial(corpus.Corpus, parts, None)
    origin = [part.origin() for part in parts]
    request = request._replace(text=origin, field=form.rows.field, bad_rows=form.rows.bad_rows)
  try:
    return folders.cached_folder(form.cache_dir, name, request, read, progress)
  except UserError as error:
    raise UserError(f"{text.flag} (={text.place!r}): {error}") from error


def _parts(text: Named, split: str, form: Form) -> Sequence:
  """The files of a glob, or the shards of a split of a hub dataset."""
  if not text.place.startswith(corpus.HUB):
    return tuple(corpus.LocalFile(file, form.rows) for file in local_files(text))
  found = corpus.open_corpus(text.place, "", form.rows)
  parts = found.train if split == "train" else found.valid
  if parts is None:
    raise UserError(
      f"{text.flag} (={text.place!r}) must have a split `validation`; choose another dataset, or pass files"
    )
  return parts


def _check_folder(text: Named, folder: Path, form: Form):
  """Raises `UserError` unless a folder is prepared, with the tokenizer, the length and the packing of the run."""
  found, manifest = f"{text.flag} (={text.place!r})", shards.read_manifest(folder)
  if manifest is None:
    raise UserError(
      f"{found} must be a glob of files or a folder written by experiments.prepare_data; this folder has no "
      f"{shards.MANIFEST}; give its files, as in {text.flag}='{folder}/*', or complete its preparation"
    )
  if form.tokenizer and manifest["tokenizer"] != tokenizer_sha256(form.tokenizer):
    raise UserError(
      f"{found} must be prepared with the tokenizer of the run, but has another; "
      f"prepare the text with --tokenizer={form.tokenizer}, or give its files"
    )
  if (length := manifest["request"]["seq_len"]) != form.seq_len:
    raise UserError(
      f"{found} must have rows of {form.seq_len} tokens like the run; it has rows of {length}; "
      f"prepare the text with --seq_len={form.seq_len}, or give its files"
    )
  if (made := shards.packing_of(manifest)) != form.packing:
    raise UserError(
      f"{found} must have rows made by the packing of the run (={form.packing!r}); its rows were made by {made!r}; "
      f"prepare the text with --packing={form.packing}, or give its files"
    )
