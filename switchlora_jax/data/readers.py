"""Files → documents: JSON lines, Parquet and plain text, each possibly compressed.

A row is a line of JSON, or a row of a Parquet file. A file is read to its end, or reading it raises `UserError`: a file
that is cut or damaged never yields fewer documents without an error.
"""

import bz2
import codecs
import contextlib
import errno
import io
import json
import lzma
import os
import re
import resource
import shlex
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import zstandard

from switchlora_jax.errors import UserError, one_line

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")  # second suffixes of files that are decompressed
ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".rar")  # hold several files
FIELD = "text"  # default of `data.field`
BAD_ROWS = ("stop", "skip")  # values of `data.bad_rows`
READ_BATCH = 32  # Parquet rows per read
PIECE = 1 << 18  # characters of plain text per read
BLOCK = 1 << 11  # compressed bytes per read; ordinary text in them has some kilobytes, repeated text some megabytes
TEXT = "UTF-8 text (compressed as its suffix says)"
SURROGATE = re.compile("[\ud800-\udfff]")

Document = str | Iterable[str]  # a text, or the pieces of a long text, which can be read again


class RowOptions(NamedTuple):
  """How rows become documents.

  Attributes:
    field: JSON key or Parquet column that holds the document.
    bad_rows: whether a row without text is an error (`stop`) or yields a `BadRow` (`skip`).
    flags: prefix of the flags that set the other two, for error messages; "" if there are none.
  """

  field: str = FIELD
  bad_rows: str = BAD_ROWS[0]
  flags: str = "--config.data."

  def describe_field(self, names: Iterable[str]) -> str:
    """The remedy if the field is missing but one of `names` may be meant; else empty."""
    guess = next(iter(names), None)
    return f"pass {self.flags}field={shlex.quote(guess)}, or " if self.flags and guess else ""


DEFAULT_ROWS = RowOptions()


class BadRow(UserError):
  """A row without a text in the field. `bad_rows=stop` raises it; `bad_rows=skip` yields it in place of the document.

  Attributes:
    where: file and line or row.
    found: what is wrong with it.
  """

  def __init__(self, where: str, expected: str, found: str, remedy: str, rows: RowOptions):
    self.where, self.found = where, found
    skip = f", or pass {rows.flags}bad_rows=skip to leave such rows out" if rows.flags else ""
    super().__init__(f"{where}: expected {expected}; found {found}; {remedy}{skip}")


def read_documents(path: str, rows: RowOptions) -> Iterator[Document | BadRow]:
  """The documents of a file. Empty ones are included.

  Raises:
    UserError: the file cannot be read, or a row has no text and `rows.bad_rows` is `stop`.
  """
  suffix = file_format(path)
  if suffix in ARCHIVES:
    raise UserError(f"{path} must be text, JSON lines or Parquet; it is an archive; unpack it, or leave it out")
  reader = {".json": _json_lines, ".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}
  return raise_or_yield(reader.get(suffix, _plain_text)(path, rows), rows)


def raise_or_yield(documents: Iterator[Document | BadRow], rows: RowOptions) -> Iterator[Document | BadRow]:
  """Yields the documents unchanged; raises the first `BadRow`, if `rows.bad_rows` is `stop`."""
  for document in documents:
    if isinstance(document, BadRow) and rows.bad_rows == "stop":
      raise document
    yield document


def file_format(path: str) -> str:
  """The suffix that determines the file format, without that of a compression."""
  stem, suffix = os.path.splitext(path.lower())
  return os.path.splitext(stem)[1] if suffix in COMPRESSED else suffix


def pieces_of(document: Document) -> Iterable[str]:
  """The pieces of a document, in order."""
  return [document] if isinstance(document, str) else document


def clean_text(text: str) -> str:
  """Drops a leading byte order mark, and replaces lone surrogates, which cannot be tokenized, by U+FFFD."""
  text = text.removeprefix("\ufeff")
  try:
    text.encode()
  except UnicodeEncodeError:
    return SURROGATE.sub("\ufffd", text)
  return text


# Formats.


def _json_lines(path: str, rows: RowOptions) -> Iterator[str | BadRow]:
  number = 0
  with _errors_named(path, TEXT), open_decompressed(path) as file:
    for block in file:
      for line in block.splitlines():  # a block ends at a newline, a line also at a carriage return
        number, line = number + 1, line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
          yield _json_row(line, f"{path}, line {number}", rows)


def _json_row(line: bytes, where: str, rows: RowOptions) -> str | BadRow:
  """The document of a line of JSON."""
  remedy = "write one such object per line, or name plain text .txt"
  try:
    row = json.loads(line.decode(), parse_int=float)  # which accepts any number of digits
    if isinstance(row, dict) and isinstance(row.get(rows.field), str):
      return clean_text(row[rows.field])
    if isinstance(row, dict) and rows.field not in row:
      found = f"the fields {sorted(row)!s:.300}"
      remedy = rows.describe_field(_longest(row)) + remedy
    else:
      found = f"{line.decode(errors='replace').strip():.60}"
  except UnicodeDecodeError as error:
    found = f"bytes that are not UTF-8 ({error})"
  except (ValueError, RecursionError) as error:
    found = f"invalid JSON ({error})"
  example = json.dumps({rows.field: "…"}, ensure_ascii=False)
  return BadRow(where, f"a JSON object with a `{rows.field}` string, as {example}", found, remedy, rows)


def _longest(row: dict) -> list[str]:
  """The names of the fields that are strings, the longest string first."""
  return sorted((name for name in row if isinstance(row[name], str)), key=lambda name: -len(row[name]))


def _parquet(path: str, rows: RowOptions) -> Iterator[str | BadRow]:
  """Reads only the column of the documents: the types of the others do not matter."""
  import pyarrow  # local imports: they take 0.2 s, and the embedded text does not need them
  import pyarrow.parquet

  what = f"a Parquet file with a column `{rows.field}` of strings"
  with contextlib.ExitStack() as stack:
    stack.enter_context(_errors_named(path, what))
    file = stack.enter_context(open_decompressed(path))
    if not file.seekable():  # decompressed; the table of contents is at the end
      unpacked = stack.enter_context(tempfile.TemporaryFile())
      shutil.copyfileobj(file, unpacked)
      file = unpacked
    table = stack.enter_context(pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20))
    if not table.metadata.num_rows:
      return
    _check_column(path, what, table.schema_arrow, rows)
    number = 0
    for batch in table.iter_batches(READ_BATCH, columns=[rows.field], use_threads=False):
      column = batch.column(rows.field)
      if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
      for value in column.cast(pyarrow.large_binary()).to_pylist():
        number += 1
        yield _parquet_row(value, f"{path}, row {number}", rows)


def _check_column(path: str, what: str, schema: Any, rows: RowOptions):
  """Raises `UserError` unless a column has the name of the field, and its type is a string or only null."""
  import pyarrow.types as types

  strings = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
  is_text = lambda kind: any(test(kind.value_type if types.is_dictionary(kind) else kind) for test in strings)
  kinds = [column.type for column in schema if column.name == rows.field]
  if len(kinds) == 1 and (is_text(kinds[0]) or types.is_null(kinds[0])):
    return
  found = f"`{rows.field}` of type {kinds[0]}" if len(kinds) == 1 else f"{len(kinds)} such columns" if kinds else ""
  found = f"{found or 'none'} among the columns {schema.names}"
  remedy = rows.describe_field(column.name for column in schema if is_text(column.type) and column.name != rows.field)
  raise UserError(f"{path} must be {what}; found {found}; {remedy}convert it, or leave it out of the glob")


def _parquet_row(value: bytes | None, where: str, rows: RowOptions) -> str | BadRow:
  try:
    if value is not None:
      return clean_text(value.decode())
    found = "null"
  except UnicodeDecodeError as error:
    found = f"bytes that are not UTF-8 ({error})"
  return BadRow(where, f"a string in the column `{rows.field}`", found, "mend the row", rows)


def _plain_text(path: str, rows: RowOptions) -> Iterator[Document]:
  """The whole file is one document."""
  pieces = _text_pieces(path)
  first, second = next(pieces, ""), next(pieces, None)
  if first[:1000].count("\0") > len(first[:1000]) // 4:  # ASCII in UTF-16 is valid UTF-8
    raise UserError(f"{path} must be {TEXT}; it has many NUL characters, as UTF-16 and binary files do; convert it")
  yield first if second is None else LongText(path)


@dataclass(frozen=True)
class LongText:
  """The document of a plain-text file that is too long to be in memory at once."""

  path: str

  def __iter__(self) -> Iterator[str]:
    return _text_pieces(self.path)


def _text_pieces(path: str) -> Iterator[str]:
  """The content of a text file in pieces of `PIECE` characters. Line breaks become newlines."""
  with _errors_named(path, TEXT), io.TextIOWrapper(open_decompressed(path), encoding="utf-8-sig") as file:
    try:
      while piece := file.read(PIECE):
        yield piece
    except UnicodeDecodeError as error:
      raise UserError(
        f"{path} must be {TEXT}; {_invalid_line(path) or error}; convert it, or leave it out of the glob"
      ) from error


def _invalid_line(path: str) -> str | None:
  """The first line that is not UTF-8, and why."""
  with open_decompressed(path) as file:
    if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
      return "it is UTF-16"
  with open_decompressed(path) as file:
    for number, line in enumerate(file, 1):
      try:
        line.decode()
      except UnicodeDecodeError as error:
        return f"line {number} is not ({error})"
  return None


# Compression.


def open_decompressed(path: str) -> BinaryIO:
  """Opens a file for reading, decompressed as its suffix says."""
  suffix = os.path.splitext(path.lower())[1]
  file = open(path, "rb")  # noqa: SIM115, the caller closes it
  return decompressed(file, suffix) if suffix in COMPRESSED else file


def decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
  """The content of a compressed file, of all its frames. Reading raises an exception if the last frame is cut.

  bz2.BZ2File and lzma.LZMAFile ignore a second frame if it is damaged. The stream reader of zstandard ignores a second
  frame, and does not report that a frame is cut.

  Args:
    file: the compressed file.
    suffix: one of `COMPRESSED`.
  """
  if suffix == ".lz4":
    return io.BufferedReader(_Blocks(file, _lz4_blocks(file)))
  zstd = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # files of `zstd --long=31`
  new_frame = {
    ".gz": partial(zlib.decompressobj, zlib.MAX_WBITS | 16),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": zstd.decompressobj,
  }[suffix]
  return io.BufferedReader(_Blocks(file, _frame_blocks(file, new_frame)))


def _frame_blocks(file: BinaryIO, new_frame: Callable[[], Any]) -> Iterator[bytes]:
  """The content of all frames. `new_frame` makes a decompressor of one frame."""
  frame = new_frame()
  while data := file.read(BLOCK):
    while data:
      if frame.eof:
        if not (data := data.lstrip(b"\0")):  # padding
          break
        frame = new_frame()
      yield frame.decompress(data)
      data = frame.unused_data if frame.eof else b""
  if not frame.eof:
    raise EOFError("the file ends before its compressed data do")


def _lz4_blocks(file: BinaryIO) -> Iterator[bytes]:
  """The content of all frames, decompressed by Arrow, which Parquet needs as well."""
  import pyarrow

  with pyarrow.CompressedInputStream(file, "lz4") as stream:
    while data := stream.read(1 << 16):
      yield data
    if not file.tell():
      raise EOFError("the file is empty")


class _Blocks(io.RawIOBase):
  """A binary file whose content is an iterable of bytes, read from another file.

  An exception of the iterable is raised again by every later read: a generator ends with its first exception, and a
  caller that tries again, as `datasets` does after a timeout, would take that for the end of the file.
  """

  def __init__(self, file: BinaryIO, blocks: Iterator[bytes]):
    self._file, self._blocks, self._left, self._failure = file, blocks, memoryview(b""), None

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._left:
      if self._failure:
        raise self._failure
      try:
        block = next(self._blocks, None)
      except Exception as error:
        self._failure = error
        raise
      if block is None:
        return 0
      self._left = memoryview(block)
    size = min(len(buffer), len(self._left))
    buffer[:size], self._left = self._left[:size], self._left[size:]
    return size

  def close(self):
    self._file.close()
    super().close()


# Errors.


@contextlib.contextmanager
def _errors_named(path: str, what: str) -> Iterator[None]:
  """Turns the errors of libraries into a `UserError` that names the file. Each format raises its own.

  Args:
    path: the file that is read in the context.
    what: the expected content.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if isinstance(error, OSError) and error.errno:  # of the system; that of bz2 for damaged data has no number
      raise UserError(f"{path} could not be read ({error.strerror}); {_remedy(error.errno)}") from error
    raise UserError(
      f"{path} must be {what}; reading it failed with {one_line(error)}; "
      "copy it again if it may be cut, convert or rename it, or leave it out of the glob"
    ) from error


def _remedy(number: int) -> str:
  """What to do about an error of the system."""
  match number:
    case errno.EMFILE | errno.ENFILE:
      return f"the process may open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,} files; raise it with ulimit -n"
    case errno.ENOSPC:
      return f"make room, also in {tempfile.gettempdir()}, where a compressed Parquet file is unpacked"
    case errno.ENOENT | errno.EACCES | errno.EPERM:
      return "check that it exists and that you may read it, or leave it out of the glob"
    case _:
      return "check the disk or the network drive"
