import bz2
import errno
import gc
import gzip
import io
import json
import lzma
import os

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from switchlora_jax.data import readers
from switchlora_jax.data.readers import BadRow, RowOptions
from switchlora_jax.errors import UserError

SKIP = RowOptions(bad_rows="skip")


def compress_lz4(content: bytes) -> bytes:
  packed = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(packed, "lz4") as stream:
    stream.write(content)
  return packed.getvalue().to_pybytes()


COMPRESSORS = {
  "": bytes,
  ".gz": lambda content: gzip.compress(content, mtime=0),
  ".bz2": bz2.compress,
  ".xz": lzma.compress,
  ".zst": zstandard.compress,
  ".lz4": compress_lz4,
}


def json_lines(documents: list[str], field: str = "text") -> bytes:
  line = lambda text: json.dumps({"n": 1, field: text}, ensure_ascii=len(text) % 2 == 0) + "\n"
  return "".join(map(line, documents)).encode()


def parquet(columns: dict, **options) -> bytes:
  """The bytes of a Parquet file."""
  written = pyarrow.BufferOutputStream()
  pyarrow.parquet.write_table(pyarrow.table(columns), written, **options)
  return written.getvalue().to_pybytes()


def parquet_groups(documents: list[str]) -> bytes:
  """A Parquet file with a row group per document, and one without rows."""
  written, schema = pyarrow.BufferOutputStream(), pyarrow.schema([("n", pyarrow.int8()), ("text", pyarrow.string())])
  with pyarrow.parquet.ParquetWriter(written, schema) as writer:
    writer.write_table(schema.empty_table(), row_group_size=1)
    for text in documents:
      writer.write_table(pyarrow.table({"n": [0], "text": [text]}, schema=schema))
      writer.write_table(schema.empty_table())
  return written.getvalue().to_pybytes()


# name: (file name, the contents of a file with the given documents)
FORMATS = {
  "json": ("a.jsonl", json_lines),
  "json, odd breaks": ("a.json", lambda documents: b"\n\r" + json_lines(documents).replace(b"\n", b"\r\r\n")[:-3]),
  "text": ("a.txt", lambda documents: "".join(documents).encode()),
  "parquet": ("a.parquet", lambda documents: parquet({"text": pyarrow.array(documents, pyarrow.string())})),
  "parquet groups": ("a.parquet", parquet_groups),
}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
  """(file name, its content, options) -> its documents and `BadRow`s."""
  folder = tmp_path_factory.mktemp("files")

  def read(name: str, content: bytes, rows: RowOptions = readers.DEFAULT_ROWS) -> list:
    (folder / name).write_bytes(content)
    documents = readers.read_documents(str(folder / name), rows)
    return ["".join(readers.pieces_of(d)) if not isinstance(d, BadRow) else d for d in documents]

  return read


def expected(name: str, documents: list[str]) -> list[str]:
  """What is read of the documents: plain text is one document, with newlines as line breaks."""
  if name.endswith("txt"):
    documents = ["".join(documents).replace("\r\n", "\n").replace("\r", "\n")]
  return [text.removeprefix("\ufeff") for text in documents]


# Every format and every compression.


@settings(max_examples=12, deadline=None)
@given(documents=st.lists(st.text(max_size=30), max_size=6), copies=st.integers(1, 3), piece=st.integers(1, 40))
def test_any_documents_are_read_in_any_format_and_compression(read, documents, copies, piece):
  """In one frame or several, with and without a byte order mark."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(readers, "PIECE", piece)
    for name, write in FORMATS.values():
      if name.endswith("txt") and "\0" in "".join(documents):
        continue  # plain text with many NUL characters is refused as binary, which has a test of its own
      for suffix, compress in COMPRESSORS.items():
        frames = 1 if "parquet" in name else copies
        content = write(documents) + b"\n" * (name == "a.json")
        mark = b"\xef\xbb\xbf" * ("parquet" not in name)
        whole = read(f"{name}{suffix}", b"".join([compress(mark + content), *[compress(content)] * (frames - 1)]))
        assert whole == expected(name, documents * frames), (name, suffix)


DOCUMENTS = ["The tide é漢😀 rises.", "", "It\nfalls.", "x" * 60]


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("form", FORMATS)
def test_a_file_cut_at_any_place_is_refused_or_read_whole(read, form, suffix):
  """Of two frames, the place between them cannot be told from the end of a file. Plain text may end anywhere."""
  name, write = FORMATS[form]
  frames = [COMPRESSORS[suffix](write(DOCUMENTS))] * (1 if "parquet" in form else 2)
  content, whole = b"".join(frames), read(name + suffix, b"".join(frames))
  assert whole == expected(name, DOCUMENTS * len(frames))
  cuts = {*range(0, len(content), 1 + len(content) // 500), *range(len(content) - 30, len(content))}
  for cut in cuts - {len(frames[0]) if suffix else None}:
    try:
      found = read(name + suffix, content[:cut])
    except UserError as error:
      assert f"{name}{suffix}" in str(error)
    else:
      assert not suffix and "parquet" not in form, (cut, "a cut was not detected")
      if form == "text":
        assert whole[0].startswith(found[0])
      else:
        assert found == whole[: len(found)] and len(found) >= content[:cut].count(b"}")


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESSORS if suffix])
def test_a_damaged_second_frame_is_an_error(read, suffix):
  frame = COMPRESSORS[suffix](b"one\n")
  for damaged in (b"no frame at all", b"\xff" + frame[1:], frame[:-1]):
    with pytest.raises(UserError, match=rf"a\.txt\{suffix} must be UTF-8 text .*; copy it again if it may be cut"):
      read(f"a.txt{suffix}", frame + damaged)


def test_frames_may_be_padded_and_of_the_zstandard_kind_that_is_skipped(read):
  for suffix in (".gz", ".bz2", ".xz", ".zst"):
    frame = COMPRESSORS[suffix](b"one\n")
    assert read(f"a.txt{suffix}", frame + b"\0" * 5000 + frame + b"\0") == ["one\none\n"]
  skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
  assert read("a.txt.zst", skippable + zstandard.compress(b"one\n") + skippable) == ["one\n"]


def test_long_windows_of_zstandard_are_read(read):
  options = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
  stream = zstandard.ZstdCompressor(compression_params=options).compressobj()
  assert read("a.txt.zst", stream.compress(b"one\n") + stream.flush()) == ["one\n"]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_long_text_is_read_in_pieces(tmp_path, monkeypatch, suffix):
  monkeypatch.setattr(readers, "PIECE", 1000)
  (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESSORS[suffix](b"\xef\xbb\xbf" + "é line\r\n".encode() * 1000))
  (document,) = readers.read_documents(str(tmp_path / f"a.txt{suffix}"), RowOptions())
  for _ in range(2):
    pieces = list(document)
    assert "".join(pieces) == "é line\n" * 1000 and {len(piece) for piece in pieces} == {1000}


# Files that are no text.


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.txt", b"one\ncaf\xe9\n", r"a\.txt must be UTF-8 text .*; line 2 is not \('utf-8' codec .*\); convert it, or"),
    ("a.json.gz", b'{"text": "x"}', r"a\.json\.gz must be .*compressed as its suffix says\).*incorrect header"),
    ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:10] + b"\xff" * 20, r"a\.txt\.gz must be .*: Error -3"),
    ("a[1].gz", gzip.compress(b"x", mtime=0)[:-1], r"a\[1\]\.gz must be .*EOFError: the file ends before its"),
    ("a.tar.gz", gzip.compress(b"x", mtime=0), r"a\.tar\.gz must be .*; it is an archive; unpack it, or leave it out"),
    ("a.zip", b"PK\x03\x04", r"a\.zip must be .*; it is an archive"),
    ("a.txt", "hello".encode("utf-16"), r"a\.txt must be UTF-8 text .*; it is UTF-16; convert it"),
    ("a.txt", "hello".encode("utf-16-le"), r"a\.txt must be UTF-8 text .*; it has many NUL characters, as UTF-16 and"),
    ("a.parquet", b"PAR1", r"a\.parquet must be a Parquet file with a column `text` of strings; .*ArrowInvalid"),
    ("a.parquet", b"", r"a\.parquet must be a Parquet file"),
    ("a.parquet", parquet({"n": [1], "body": ["x"]}), r"found none among the columns \['n', 'body'\]; pass --config"),
    ("a.parquet", parquet({"n": [1]}), r"found none among the columns \['n'\]; convert it, or leave it out"),
    ("a.parquet", parquet({"text": [1], "b": ["x"]}), r"found `text` of type int64 .*; pass --config.data.field=b, or"),
  ],
)
def test_a_file_that_is_no_text_is_a_user_error_whatever_happens_to_bad_rows(read, name, content, message):
  for rows in (RowOptions(), SKIP):
    with pytest.raises(UserError, match=message) as caught:
      read(name, content, rows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", readers.COMPRESSED)
def test_a_read_that_failed_fails_again(suffix, read):
  """`datasets` reads again after a timeout. The file must not seem to end there."""

  class Flaky(io.BytesIO):
    reads = 0

    def read(self, size=-1):
      self.reads += 1
      if self.reads == 2:
        raise TimeoutError
      return super().read(size)

  text = os.urandom(100_000)
  packed = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
  packed[".lz4"] = lambda text: pyarrow.compress(text, "lz4", asbytes=True)
  file = readers.decompressed(Flaky(packed[suffix](text)), suffix)
  for _ in range(3):
    with pytest.raises(TimeoutError):
      file.read()


@pytest.mark.parametrize(
  ("error", "sentence"),
  [
    (
      OSError(errno.EMFILE, "Too many open files"),
      r"could not be read \(Too many open files\); the process may",
    ),
    (
      PermissionError(errno.EACCES, "Permission denied"),
      r"could not be read \(Permission denied\); check that it exists",
    ),
    (OSError(errno.EIO, "Input/output error"), r"could not be read \(Input/output error\); check the disk"),
    (OSError(errno.ENOSPC, "No space left on device"), r"could not be read \(No space left on device\); make room"),
  ],
)
def test_an_error_of_the_system_has_its_own_remedy(read, monkeypatch, error, sentence):
  def fails(path):
    raise error

  monkeypatch.setattr(readers, "open_decompressed", fails)
  with pytest.raises(UserError, match=sentence):
    read("a.txt", b"text")


# Rows.

MEND = "or name plain text .txt, or pass --config.data.bad_rows=skip to leave such rows out"
OBJECT = 'expected a JSON object with a `text` string, as {"text": "…"}'
BAD_LINES = {
  b'{"text": null}': 'found {"text": null}',
  b'{"text": 3}': 'found {"text": 3}',
  b'["x"]': 'found ["x"]',
  b"[": "found invalid JSON (Expecting value",
  b"[" * 100_000: "found invalid JSON (maximum recursion",
  b'{"text": "\xff"}': "found bytes that are not UTF-8 ('utf-8' codec",
  b"{}": "found the fields []",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20])
def test_a_line_without_text_is_named_and_may_be_skipped(read, line):
  content = json_lines(["one"]) + b"\r\n" + line + b"\n" + json_lines(["two"])
  with pytest.raises(UserError) as caught:
    read("a.jsonl", content)
  assert f"a.jsonl, line 3: {OBJECT}; {BAD_LINES[line]}" in str(caught.value) and str(caught.value).endswith(MEND)
  one, bad, two = read("a.jsonl", content, SKIP)
  assert (one, two) == ("one", "two") and str(bad) == str(caught.value)


def test_a_null_or_invalid_cell_is_named_and_may_be_skipped(read):
  cells = [*[b"x"] * 40, None, b"\xff", b"y"]
  for kind in (pyarrow.binary(), pyarrow.large_binary()):
    content = parquet({"n": list(range(43)), "text": pyarrow.array(cells, kind)})
    with pytest.raises(UserError, match=r"a\.parquet, row 41: expected a string in .* `text`; found null; mend"):
      read("a.parquet", content)
    found = read("a.parquet", content, SKIP)
    assert found[:40] == ["x"] * 40 and found[42] == "y"
    assert "row 42" in str(found[41]) and "not UTF-8" in str(found[41])
  assert len(read("a.parquet", parquet({"text": pyarrow.nulls(3)}), SKIP)) == 3


def test_a_number_of_any_length_may_stand_beside_the_text(read):
  assert read("a.jsonl", b'{"n": ' + b"1" * 5000 + b', "text": "one"}\n') == ["one"]


@pytest.mark.parametrize("rows", [RowOptions(), SKIP])
def test_lone_surrogates_become_replacement_characters(read, rows):
  content = b'{"text": "half \\ud83d, other \\udc00, whole \\ud83d\\ude00"}\n'
  assert read("a.jsonl", content, rows) == ["half \ufffd, other \ufffd, whole 😀"]


def test_byte_order_marks_are_dropped(read):
  mark = "\ufeff"
  assert read("a.txt", f"{mark}one {mark}two".encode()) == [f"one {mark}two"]
  assert read("a.jsonl", (mark + json.dumps({"text": "one"}) + "\n").encode() * 2) == ["one", "one"]
  assert read("a.jsonl", json_lines([f"{mark}one"])) == read("a.parquet", parquet({"text": [f"{mark}one"]})) == ["one"]


def test_another_field_can_be_named(read):
  rows = RowOptions(field="content")
  content = json_lines(["one"], "content")
  assert read("a.jsonl", content, rows) == read("a.parquet", parquet({"n": [0], "content": ["one"]}), rows) == ["one"]
  message = r"line 1: .*found the fields \['content', 'n'\]; pass --config\.data\.field=content, or write one"
  with pytest.raises(UserError, match=message):
    read("a.jsonl", content)
  with pytest.raises(UserError, match=r"found the fields .*; write one such .*, or name plain text \.txt$"):
    read("a.jsonl", content, RowOptions(flags=""))


# Other columns of a Parquet file.

STORED = {
  "dictionary": pyarrow.array(["one", "two", "one"]).dictionary_encode(),
  "large": pyarrow.array(["one", "two", "one"], pyarrow.large_string()),
  "view": pyarrow.array(["one", "two", "one"], pyarrow.string_view()),
}
OTHERS = {
  "map": pyarrow.array([[("k", "v")]] * 3, pyarrow.map_(pyarrow.string(), pyarrow.string())),
  "struct": pyarrow.array([{"text": 1}] * 3),
  "null": pyarrow.nulls(3),
  "decimal": pyarrow.array([1, 2, 3], pyarrow.decimal256(40, 2)),
  "interval": pyarrow.array([1, 2, 3], pyarrow.duration("ns")),
  "text.dotted": pyarrow.array(["a", "b", "c"]),
}


@pytest.mark.parametrize("kind", STORED)
def test_only_the_column_of_the_text_is_read(read, kind):
  schema = pyarrow.schema([(name, column.type) for name, column in (OTHERS | {"text": STORED[kind]}).items()])
  schema = schema.with_metadata({b"huggingface": b"no JSON", b"pandas": b"{"})
  table = pyarrow.table([*OTHERS.values(), STORED[kind]], schema=schema)
  written = pyarrow.BufferOutputStream()
  pyarrow.parquet.write_table(table, written)
  assert read("a.parquet", written.getvalue().to_pybytes()) == ["one", "two", "one"]


def test_a_parquet_file_without_rows_needs_no_column(read):
  assert read("a.parquet", parquet({})) == read("a.parquet", parquet({"n": pyarrow.array([], pyarrow.int8())})) == []


# Robustness.


def test_files_are_closed(read, tmp_path):
  gc.collect()  # files of other tests
  before = len(os.listdir("/proc/self/fd"))
  for name, write in FORMATS.values():
    for suffix, compress in COMPRESSORS.items():
      content = compress(write(DOCUMENTS))
      read(name + suffix, content)
      next(readers.read_documents(str(write_file(tmp_path / f"{name}{suffix}", content)), RowOptions()))
  assert len(os.listdir("/proc/self/fd")) == before


def write_file(path, content):
  path.write_bytes(content)
  return path
