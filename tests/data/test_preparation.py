import errno
import fcntl
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from paths import ROOT
from tiny import packing_in, rows_of, sentences, write_lines

from switchlora_jax.data import corpus, preparation, shards, tokenizer
from switchlora_jax.data.preparation import Request
from switchlora_jax.errors import UserError
from switchlora_jax.runs import files
from switchlora_jax.runs.files import file_sha256, read_checksummed_json, write_checksummed_json

LENGTH, GROUP, SHARD = 8, 120, 256
LONG = "".join(sentences(500, 520)).replace("\n", " ")  # longer than a group, without a line's end
TRAIN = [*sentences(0, 15), "", LONG, *sentences(15, 30), "", ""]
VALID = sentences(50, 60)

# The preparation of `text` below in a process of its own: `python -c … JSON`, which may be told to do something first.
PROCESS = f"""
import itertools, json, os, resource, signal, sys, time
from pathlib import Path
from switchlora_jax.data import corpus, packing, preparation
from switchlora_jax.errors import UserError
packing.GROUP, packing.SHARD = {GROUP}, {SHARD}
folder, train, valid, model = map(Path, json.loads(sys.argv[1]))

def prepare(folder=folder, wait=False):
  request = preparation.Request("text", str(model), {LENGTH})
  read = lambda: corpus.open_corpus(str(train / "*"), str(valid / "*"), ("--path", "--eval_path"))
  try:
    preparation.fill_folder(folder, request, read, wait=wait, progress=False)
  except UserError as error:
    print("error:", error, flush=True)

def slowly(found):
  for item in found:
    time.sleep(0.01)
    yield item
"""
SLOWLY = """
chunks = packing.read_chunks
packing.read_chunks = lambda *args: slowly(chunks(*args))
print("started", flush=True)
prepare()
"""


class Text:
  """Files to prepare, a tokenizer, and folders of rows made from them."""

  def __init__(self, folder):
    self.folder, self.train, self.valid, self.model = folder, folder / "train", folder / "valid", folder / "own.model"

  def read(self):
    return corpus.open_corpus(f"{self.train}/*", f"{self.valid}/*", ("--path", "--eval_path"))

  def prepare(self, name, wait=False, read=None, **changes):
    """The folder of that name, filled in this process, and its manifest."""
    request = Request("text", str(self.model), LENGTH)._replace(**changes)
    with packing_in(GROUP, SHARD):
      manifest = preparation.fill_folder(self.folder / name, request, read or self.read, wait=wait, progress=False)
    return self.folder / name, manifest

  def process(self, name, what):
    """A process that does `what`, which may call `prepare()` to fill the folder of that name."""
    paths = json.dumps([str(path) for path in (self.folder / name, self.train, self.valid, self.model)])
    return subprocess.Popen(
      [sys.executable, "-W", "ignore", "-c", PROCESS + what, paths], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )

  def rows(self, name, split):
    """All rows of a split of a folder, once its files were verified."""
    manifest = shards.read_manifest(self.folder / name)
    shards.verify_checksums(self.folder / name, manifest, progress=False)
    return np.asarray(shards.open_sequences(self.folder / name, manifest[split]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Files of several kinds; their rows in the folder `whole`, made in one go."""
  text = Text(tmp_path_factory.mktemp("text"))
  write_lines(text.train / "a.jsonl", TRAIN[:20])
  text.train.joinpath("b.json.gz").write_bytes(
    gzip.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in TRAIN[20:-1]))
  )
  text.train.joinpath("c.txt").touch()
  write_lines(text.valid / "v.jsonl", VALID)
  tokenizer.train_tokenizer(sentences(0, 100), 320, text.model)
  text.prepare("whole")
  return text


@pytest.fixture
def text(made, tmp_path):
  """A copy of it that a test may change."""
  shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
  return Text(tmp_path)


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def kinds(folder):
  return {path.name.split("-")[0] for path in folder.iterdir()}


# In one go.


def test_rows_are_the_documents_one_after_another(made):
  """… with no piece but whole documents; how long ones are cut is the matter of packing."""
  request, model = Request("text", str(made.model), LENGTH), tokenizer.load_tokenizer(made.model)
  manifest = preparation.fill_folder(made.folder / "uncut", request, made.read, wait=False, progress=False)
  for name, documents in (("train", TRAIN), ("valid", VALID)):
    np.testing.assert_array_equal(made.rows("uncut", name), rows_of(model, documents, LENGTH))
    whole, sizes = [text for text in documents if text], manifest[name]
    assert sizes["documents"] == len(whole) and sizes["characters"] == sum(map(len, whole)) == sizes["bytes"]
    assert sizes["tokens"] == sum(len(model.encode(text)) + 1 for text in whole)
    assert sizes["rows"] == sizes["tokens"] // LENGTH


def test_a_finished_folder_holds_a_manifest_shards_and_the_tokenizer(made):
  folder = made.folder / "whole"
  assert kinds(folder) == {".lock", "manifest.json", "tokenizer.model", "train", "valid"}
  manifest = shards.read_manifest(folder)
  assert manifest["request"] == {
    "text": "text",
    "tokenizer": file_sha256(made.model),
    "seq_len": LENGTH,
    "take": None,
  }
  assert len(manifest["train"]["shards"]) > 5 < len(list(folder.glob("train-*.npy")))
  assert all(shard[1] == SHARD // LENGTH for shard in manifest["train"]["shards"][:-1])
  assert (folder / "tokenizer.model").read_bytes() == made.model.read_bytes()


def test_a_finished_folder_is_not_read_again(made):
  folder, manifest = made.folder / "whole", shards.read_manifest(made.folder / "whole")
  before = contents(folder)
  assert made.prepare("whole", read=lambda: pytest.fail("was read"))[1] == manifest and contents(folder) == before


def test_a_finished_folder_may_lie_where_nothing_can_be_written(made, monkeypatch):
  def refused(*_):
    raise OSError(errno.EROFS, "Read-only file system")

  monkeypatch.setattr(preparation, "_folder_lock", refused)
  monkeypatch.setattr(Path, "mkdir", refused)
  assert made.prepare("whole")[1] == shards.read_manifest(made.folder / "whole")


@pytest.mark.parametrize("take", [1, 17, 1000])
def test_no_more_documents_than_asked_for_are_taken(made, take):
  _, manifest = made.prepare(f"take-{take}", take=take)
  whole = [text for text in TRAIN if text]
  assert manifest["train"]["characters"] == sum(map(len, whole[:take]))
  assert manifest["train"]["documents"] == min(take, len(whole)) and manifest["valid"]["documents"] == len(VALID)


def test_a_tokenizer_is_trained_where_none_is_given(made, tmp_path):
  folder, manifest = made.prepare("trained", tokenizer="train:300")
  tokenizer.train_tokenizer(TRAIN, 300, tmp_path / "same.model")
  assert (folder / "tokenizer.model").read_bytes() == (tmp_path / "same.model").read_bytes()
  assert manifest["request"]["tokenizer"] == "train:300" and manifest["tokenizer"] == file_sha256(
    tmp_path / "same.model"
  )


def test_a_tokenizer_is_trained_once(text, monkeypatch):
  (text.valid / "v.jsonl").write_text("no JSON")
  with pytest.raises(UserError, match="line 1"):
    text.prepare("trained once", tokenizer="train:300")
  write_lines(text.valid / "v.jsonl", VALID)
  monkeypatch.setattr(tokenizer, "train_tokenizer", lambda *_: pytest.fail("trained again"))
  text.prepare("trained once", tokenizer="train:300")


def test_without_validation_text_there_is_none(made):
  read = lambda: corpus.Corpus(made.read().train, None, {"said": "so"})
  folder, manifest = made.prepare("alone", read=read)
  assert manifest["valid"] is None and manifest["notes"] == {"said": "so"} and not list(folder.glob("valid*"))


@pytest.mark.parametrize(("pieces", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.int32)])
def test_rows_are_as_small_as_the_vocabulary_allows(made, monkeypatch, pieces, dtype):
  model = tokenizer.load_tokenizer(made.model)
  monkeypatch.setattr(type(model), "get_piece_size", lambda self: pieces)
  made.prepare(f"pieces-{pieces}")
  assert made.rows(f"pieces-{pieces}", "train").dtype == made.rows(f"pieces-{pieces}", "valid").dtype == dtype


# Killed.


def test_killed_three_times_at_random_it_ends_with_the_same_bytes(made):
  for _ in range(3):
    process = made.process("killed", SLOWLY)
    assert process.stdout.readline() == "started\n"
    time.sleep(random.uniform(0, 0.5))
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (made.folder / "killed" / "manifest.json").exists()
  made.prepare("killed")
  assert contents(made.folder / "killed") == contents(made.folder / "whole")


EACH = """
def dies(call, left):
  return lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL) if next(left) == 0 else call(*args, **options)

for moment in itertools.count():
  where = folder.with_name(f"killed-{moment}")
  if not (child := os.fork()):
    left = itertools.count(moment, -1)
    for name in ("fsync", "replace", "unlink"):
      setattr(os, name, dies(getattr(os, name), left))
    prepare(where)
    os._exit(0)
  status = os.waitpid(child, 0)[1]
  print(os.WIFSIGNALED(status), (where / "manifest.json").exists(), flush=True)
  if status == 0:
    break
  prepare(where)
"""


def test_killed_before_any_file_is_written_named_or_removed_it_ends_with_the_same_bytes(text):
  """Of which one is between a shard and the progress, and one between the manifest and the end of the progress."""
  write_lines(text.train / "a.jsonl", TRAIN[:9])
  (text.train / "b.json.gz").unlink()
  shutil.rmtree(text.folder / "whole")
  expected = contents(text.prepare("whole")[0])
  said = text.process("killed", EACH).communicate()[0].splitlines()
  # With the manifest, its directory is synced, and then the progress is removed.
  assert len(said) > 20 and said[-3:] == ["True True", "True True", "False True"] and set(said[:-3]) == {"True False"}
  for moment in range(len(said)):
    assert contents(text.folder / f"killed-{moment}") == expected, moment


# Mistakes in the text, which are mended.

PACKED = gzip.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in sentences(60, 80)), mtime=0)


@pytest.mark.parametrize(
  ("name", "bad", "good", "message"),
  [
    ("d.jsonl.gz", PACKED[:-9], PACKED, r"d\.jsonl\.gz must be UTF-8 text .*EOFError"),
    ("d.txt", b"A wave\xff", b"A wave.", r"d\.txt must be UTF-8 text .*UnicodeDecodeError"),
    ("d.jsonl", b'{"text": "A"}\n{"txt": "A"}', b'{"text": "A"}\n{"text": "B"}', r"d\.jsonl, line 2: .*\['txt'\]"),
  ],
)
def test_text_that_cannot_be_read_leaves_nothing_that_looks_finished(text, name, bad, good, message):
  (text.train / name).write_bytes(bad)
  for _ in range(2):
    with pytest.raises(UserError, match=message):
      text.prepare("mended", take=45)
    assert kinds(text.folder / "mended") == {".lock", "progress.json", "tokenizer.model", "train"}
  (text.train / name).write_bytes(good)
  text.prepare("mended", take=45)
  assert contents(text.folder / "mended") == contents(text.prepare("at once", take=45)[0])


@pytest.mark.parametrize("side", ["train", "valid"])
def test_empty_documents_alone_leave_nothing_that_looks_finished(text, side):
  kept = contents(getattr(text, side))
  for name in kept:
    (getattr(text, side) / name).unlink()
  write_lines(getattr(text, side) / "a.jsonl", ["", ""])
  with pytest.raises(
    UserError, match=rf"{side} must hold at least one row of 8 tokens; it has 0 tokens in 0 non-empty"
  ):
    text.prepare("mended")
  assert "manifest.json" not in kinds(text.folder / "mended")
  for name, content in kept.items():
    (getattr(text, side) / name).write_bytes(content)
  assert contents(text.prepare("mended")[0]) == contents(text.folder / "whole")


MEMORY = """
packing.GROUP, packing.SHARD = 100_000, 1 << 20
prepare(folder.with_name("short"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(train / "a.jsonl").write_text(json.dumps({"text": "a wave " * 700_000}))
prepare()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_document_of_megabytes_is_not_encoded_at_once(text):
  """4.9 MB, no newline: 47 MB more than before were measured, and 299 MB where it is encoded at once."""
  kilobytes = text.process("long", MEMORY).communicate()[0]
  assert int(kilobytes) < 120_000, kilobytes


# Mistakes with the folder.


def begun(text):
  """A folder with the first shards, not finished."""
  (text.train / "d.jsonl").write_text("no JSON")
  with pytest.raises(UserError, match="line 1"):
    text.prepare("begun")
  (text.train / "d.jsonl").unlink()
  return "begun"


@pytest.mark.parametrize("stage", ["begun", "whole"])
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"seq_len": 9}, r"\(seq_len was 8 and is 9\)"),
    ({"take": 3}, r"\(take was None and is 3\)"),
    ({"text": ["other"]}, r"\(text was 'text' and is \['other'\]\)"),
    ({"tokenizer": "train:320"}, r"\(tokenizer was '[0-9a-f]{64}' and is 'train:320'\)"),
  ],
)
def test_a_folder_for_other_rows_is_a_sentence(text, stage, changes, message):
  name = begun(text) if stage == "begun" else stage
  before = contents(text.folder / name)
  with pytest.raises(UserError, match=rf"{name} was started for other rows {message}; choose a new directory, or"):
    text.prepare(name, **changes)
  assert contents(text.folder / name) == before


OTHER_VERSIONS = [
  ((preparation, "FORMAT_VERSION", 7), r"format 1 and SentencePiece [\d.]+ and would be continued with format 7 and"),
  ((preparation.sentencepiece, "__version__", "9.9"), r"and would be continued with format 1 and SentencePiece 9\.9"),
]


@pytest.mark.parametrize(("change", "message"), OTHER_VERSIONS)
def test_a_folder_is_not_continued_with_versions_that_may_give_other_rows(text, monkeypatch, change, message):
  folder = text.folder / begun(text)
  before = contents(folder)
  with monkeypatch.context() as patch:
    patch.setattr(*change)
    with pytest.raises(
      UserError, match=rf"was started with .*{message}.*; install the versions .*, or delete {folder}"
    ):
      text.prepare("begun")
    assert contents(folder) == before
    assert text.prepare("whole")[1] == shards.read_manifest(text.folder / "whole"), "a finished one is whole"
  text.prepare("begun")
  assert contents(folder) == contents(text.folder / "whole")


def test_a_folder_without_recorded_versions_is_continued(text, monkeypatch):
  """As earlier versions left it; it may hold days of work."""
  path = text.folder / begun(text) / "progress.json"
  saved = read_checksummed_json(path)
  del saved["format"], saved["sentencepiece"]
  write_checksummed_json(path, saved)
  monkeypatch.setattr(preparation.sentencepiece, "__version__", "9.9")
  text.prepare("begun")
  assert contents(path.parent) == contents(text.folder / "whole")


@pytest.fixture
def lock_fails(monkeypatch):
  """Sets the error number with which locking a folder fails. `datasets` has locks of its own, elsewhere."""

  def set_code(code):
    def flock(*_):
      raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "fcntl", SimpleNamespace(flock=flock, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB))

  return set_code


@pytest.mark.parametrize(("code", "wait"), [(errno.ENOLCK, False), (errno.ENOTSUP, True), (errno.ENOSYS, True)])
def test_without_file_locks_a_folder_is_filled_with_a_warning(made, tmp_path, lock_fails, caplog, code, wait):
  lock_fails(code)
  folder, _ = made.prepare(tmp_path, wait=wait)
  warning = f"{folder} cannot be locked ({os.strerror(code)}); make sure that no other process fills it"
  assert [record.message for record in caplog.records] == [warning]
  assert contents(folder) == contents(made.folder / "whole")


def test_a_lock_that_fails_for_another_reason_is_an_error(made, tmp_path, lock_fails):
  lock_fails(errno.EIO)
  with pytest.raises(UserError, match=r"must be a writable directory .*Input/output error"):
    made.prepare(tmp_path)


def test_another_tokenizer_of_the_same_name_is_a_sentence(text):
  tokenizer.train_tokenizer(sentences(0, 100), 300, text.model)
  with pytest.raises(UserError, match=r"started for other rows \(tokenizer was '\w{64}' and is '\w{64}'\)"):
    text.prepare("whole")


@pytest.mark.parametrize(("stage", "file"), [("begun", "progress.json"), ("whole", "manifest.json")])
def test_a_damaged_file_is_a_sentence(text, stage, file):
  path = text.folder / (begun(text) if stage == "begun" else stage) / file
  path.write_text(path.read_text().replace('"rows": ', '"rows": 1', 1))
  with pytest.raises(
    UserError, match=rf"{file} is not the JSON that was written .*; delete {path.parent}, and prepare"
  ):
    text.prepare(stage)


def test_one_process_at_a_time_fills_a_folder(made):
  other = made.process("busy", SLOWLY)
  assert other.stdout.readline() == "started\n"
  while not (made.folder / "busy" / "progress.json").exists():
    time.sleep(0.01)
  with pytest.raises(
    UserError, match=r"another process is filling \S+busy; wait until it has finished, or choose another"
  ):
    made.prepare("busy")
  made.prepare("busy", wait=True, read=lambda: pytest.fail("was read"))
  assert other.wait() == 0 and contents(made.folder / "busy") == contents(made.folder / "whole")


FULL = """
for limit in LIMITS:
  where = folder.with_name(f"full-{limit}")
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
  prepare(where)
  print((where / "manifest.json").exists(), flush=True)
  resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
  prepare(where)
"""


def test_a_full_disk_is_a_sentence_and_the_same_command_finishes(made):
  """The limit is on the size of a file: none fits, all but the manifest do, and some of both."""
  whole = contents(made.folder / "whole")
  last = len(whole["manifest.json"])
  limits = [100, (100 + last) // 2, last - 1]
  said = made.process("full", FULL.replace("LIMITS", repr(limits))).communicate()[0].splitlines()
  for limit, (error, finished) in zip(limits, zip(said[::2], said[1::2], strict=True), strict=True):
    assert finished == "False" and "File too large; make room, and the same command continues where it stopped" in error
    assert error.startswith(f"error: {made.folder / f'full-{limit}'} must be a writable directory")
    assert contents(made.folder / f"full-{limit}") == whole


def test_a_folder_that_cannot_be_written_is_a_sentence(text):
  (text.folder / "file").touch()
  for name in ("file", "file/folder"):
    with pytest.raises(UserError, match=r"must be a writable directory.*; make room, .* choose another"):
      text.prepare(name)
  drop = "folder.parent.mkdir(mode=0o500)\nos.geteuid() or os.seteuid(65534)\nprepare()"  # root may write anywhere
  said = text.process("closed/folder", drop).communicate()[0]
  assert "must be a writable directory" in said and "Permission denied" in said
