import errno
import fcntl
import gzip
import itertools
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

from switchlora_jax.data import corpus, packing, preparation, shards, tokenizer
from switchlora_jax.data.preparation import Request
from switchlora_jax.errors import UserError
from switchlora_jax.runs import files
from switchlora_jax.runs.files import file_sha256, read_checksummed_json, write_checksummed_json

LENGTH, GROUP, SHARD = 8, 120, 256
ROWS = corpus.RowOptions(flags="--")
LONG = "".join(sentences(500, 520)).replace("\n", " ")  # longer than a group, without a newline
TRAIN = [*sentences(0, 15), "", LONG, *sentences(15, 30), "", ""]
VALID = sentences(50, 60)

# Beginning of the code of a subprocess that prepares a `Text`: `python -c CODE JSON`, with JSON as in `Text.process`.
PROCESS = f"""
import itertools, json, os, resource, signal, sys, time
from pathlib import Path
from switchlora_jax.data import corpus, packing, preparation
from switchlora_jax.errors import UserError
packing.GROUP, packing.SHARD = {GROUP}, {SHARD}
folder, train, valid, model = map(Path, json.loads(sys.argv[1]))

def prepare(folder=folder, wait=False):
  request = preparation.Request("text", str(model), {LENGTH})
  read = lambda: corpus.open_corpus(str(train / "*"), str(valid / "*"), corpus.RowOptions(flags="--"))
  try:
    preparation.fill_folder(folder, request, read, wait=wait, progress=False)
  except UserError as error:
    print("error:", error, flush=True)

def slowly(found):
  for item in found:
    time.sleep(0.02)
    yield item
"""
SLOWLY = """
chunks = packing.read_chunks
packing.read_chunks = lambda *args: slowly(chunks(*args))
print("started", flush=True)
prepare()
"""


class Text:
  """Text files, a tokenizer, and the folders prepared from them."""

  def __init__(self, folder):
    self.folder, self.train, self.valid, self.model = folder, folder / "train", folder / "valid", folder / "own.model"

  def read(self):
    return corpus.open_corpus(f"{self.train}/*", f"{self.valid}/*", ROWS)

  def prepare(self, name, wait=False, read=None, **changes):
    """Fills the folder `name` in this process; returns it and its manifest."""
    request = Request("text", str(self.model), LENGTH)._replace(**changes)
    with packing_in(GROUP, SHARD):
      manifest = preparation.fill_folder(self.folder / name, request, read or self.read, wait=wait, progress=False)
    return self.folder / name, manifest

  def process(self, name, code):
    """Starts a subprocess that runs `code`, in which `prepare()` fills the folder `name`."""
    paths = json.dumps([str(path) for path in (self.folder / name, self.train, self.valid, self.model)])
    return subprocess.Popen(
      [sys.executable, "-W", "ignore", "-c", PROCESS + code, paths], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )

  def read_split(self, name, split):
    """Returns all sequences of a split of a folder, after verifying its checksums."""
    manifest = shards.read_manifest(self.folder / name)
    shards.verify_checksums(self.folder / name, manifest, progress=False)
    return np.asarray(shards.open_sequences(self.folder / name, manifest[split]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Text files of several formats, prepared without interruption in the folder `whole`."""
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
  """A copy of `made` that a test may change."""
  shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
  return Text(tmp_path)


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def name_prefixes(folder):
  return {path.name.split("-")[0] for path in folder.iterdir()}


# Without interruption.


def test_sequences_are_the_concatenated_documents(made):
  """The default group size cuts none of these documents."""
  request, model = Request("text", str(made.model), LENGTH), tokenizer.load_tokenizer(made.model)
  manifest = preparation.fill_folder(made.folder / "uncut", request, made.read, wait=False, progress=False)
  for name, documents in (("train", TRAIN), ("valid", VALID)):
    np.testing.assert_array_equal(made.read_split("uncut", name), rows_of(model, documents, LENGTH))
    whole, sizes = [text for text in documents if text], manifest[name]
    assert sizes["documents"] == len(whole) and sizes["characters"] == sum(map(len, whole)) == sizes["bytes"]
    assert sizes["tokens"] == sum(len(model.encode([text])[0]) + 1 for text in whole)
    assert sizes["rows"] == sizes["tokens"] // LENGTH


def test_a_finished_folder_holds_a_manifest_shards_and_the_tokenizer(made):
  folder = made.folder / "whole"
  assert name_prefixes(folder) == {".lock", "manifest.json", "tokenizer.model", "train", "valid"}
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


def test_a_finished_folder_may_be_read_only(made, monkeypatch):
  def refused(*_):
    raise OSError(errno.EROFS, "Read-only file system")

  monkeypatch.setattr(preparation, "_folder_lock", refused)
  monkeypatch.setattr(Path, "mkdir", refused)
  assert made.prepare("whole")[1] == shards.read_manifest(made.folder / "whole")


@pytest.mark.parametrize("take", [1, 17, 1000])
def test_take_limits_the_number_of_training_documents(made, take):
  _, manifest = made.prepare(f"take-{take}", take=take)
  whole = [text for text in TRAIN if text]
  assert manifest["train"]["characters"] == sum(map(len, whole[:take]))
  assert manifest["train"]["documents"] == min(take, len(whole)) and manifest["valid"]["documents"] == len(VALID)


def test_a_tokenizer_is_trained_if_none_is_given(made, tmp_path):
  folder, manifest = made.prepare("trained", tokenizer="train:300")
  tokenizer.train_tokenizer(TRAIN, 300, tmp_path / "same.model")
  assert (folder / "tokenizer.model").read_bytes() == (tmp_path / "same.model").read_bytes()
  assert manifest["request"]["tokenizer"] == "train:300" and manifest["tokenizer"] == file_sha256(
    tmp_path / "same.model"
  )


def test_a_trained_tokenizer_is_reused_after_an_error(text, monkeypatch):
  (text.valid / "v.jsonl").write_text("no JSON")
  with pytest.raises(UserError, match="line 1"):
    text.prepare("trained once", tokenizer="train:300")
  write_lines(text.valid / "v.jsonl", VALID)
  monkeypatch.setattr(tokenizer, "train_tokenizer", lambda *_: pytest.fail("trained again"))
  text.prepare("trained once", tokenizer="train:300")


def test_validation_text_is_optional(made):
  read = lambda: corpus.Corpus(made.read().train, None, {"said": "so"})
  folder, manifest = made.prepare("alone", read=read)
  assert manifest["valid"] is None and manifest["notes"] == {"said": "so"} and not list(folder.glob("valid*"))


@pytest.mark.parametrize(("pieces", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.int32)])
def test_the_dtype_is_the_smallest_that_fits_the_vocabulary(made, monkeypatch, pieces, dtype):
  model = tokenizer.load_tokenizer(made.model)
  model.size = pieces
  monkeypatch.setattr(tokenizer, "load_tokenizer", lambda path: model)
  made.prepare(f"pieces-{pieces}")
  assert (
    made.read_split(f"pieces-{pieces}", "train").dtype == made.read_split(f"pieces-{pieces}", "valid").dtype == dtype
  )


# Rows without text.

BAD = b'{"text": null}\n{"txt": "A"}\n[\n'


def test_skipped_rows_are_counted_alike_after_any_interruption(text, monkeypatch):
  """At the start, between documents, at the end of a file, and in a file of their own."""
  lines = (text.train / "a.jsonl").read_bytes().splitlines(keepends=True)
  (text.train / "a.jsonl").write_bytes(b"".join([BAD, *lines[:7], BAD, *lines[7:], BAD]))
  (text.train / "z.jsonl").write_bytes(BAD)
  (text.valid / "v.jsonl").write_bytes((text.valid / "v.jsonl").read_bytes() + BAD)
  skip = ROWS._replace(bad_rows="skip")
  read = lambda: corpus.open_corpus(f"{text.train}/*", f"{text.valid}/*", skip)
  folder, manifest = text.prepare("skipped", read=read, bad_rows="skip")
  assert [manifest[name]["bad_rows"] for name in ("train", "valid")] == [12, 3]
  whole = shards.read_manifest(text.folder / "whole")
  assert shards.fingerprint(manifest) == shards.fingerprint(whole)
  write = packing.write_shard

  def interrupt(*_):
    raise KeyboardInterrupt

  for moment in range(1, len(whole["train"]["shards"]) + 1, 3):  # after so many shards
    left = itertools.count(moment, -1)
    with monkeypatch.context() as patch:
      patch.setattr(packing, "write_shard", lambda *given, left=left: (write if next(left) else interrupt)(*given))
      with pytest.raises(KeyboardInterrupt):
        text.prepare(f"interrupted-{moment}", read=read, bad_rows="skip")
    text.prepare(f"interrupted-{moment}", read=read, bad_rows="skip")
    assert contents(text.folder / f"interrupted-{moment}") == contents(folder)


def test_a_stopped_preparation_continues_when_bad_rows_are_skipped(text):
  (text.train / "d.jsonl").write_bytes(BAD)
  with pytest.raises(UserError, match="line 1"):
    text.prepare("stopped")
  skip = ROWS._replace(bad_rows="skip")
  read = lambda: corpus.open_corpus(f"{text.train}/*", f"{text.valid}/*", skip)
  _, manifest = text.prepare("stopped", read=read, bad_rows="skip")
  assert manifest["train"]["bad_rows"] == 3
  with pytest.raises(UserError, match=r"was filled with bad_rows=skip, which .* \(found 3\); set bad_rows to skip"):
    text.prepare("stopped")
  assert text.prepare("whole", bad_rows="skip")[1] == shards.read_manifest(text.folder / "whole")


# Killed.


@pytest.mark.slow
def test_preparation_killed_at_random_times_ends_with_the_same_bytes(made):
  for _ in range(3):
    process = made.process("killed", SLOWLY)
    assert process.stdout.readline() == "started\n"
    time.sleep(random.uniform(0, 0.5))
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (made.folder / "killed" / "manifest.json").exists()
  made.prepare("killed")
  assert contents(made.folder / "killed") == contents(made.folder / "whole")


KILL_AT_EACH_FILE_OPERATION = """
def killing(call, left):
  return lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL) if next(left) == 0 else call(*args, **options)

for moment in itertools.count():
  where = folder.with_name(f"killed-{moment}")
  if not (child := os.fork()):
    left = itertools.count(moment, -1)
    for name in ("fsync", "replace", "unlink"):
      setattr(os, name, killing(getattr(os, name), left))
    prepare(where)
    os._exit(0)
  status = os.waitpid(child, 0)[1]
  print(os.WIFSIGNALED(status), (where / "manifest.json").exists(), flush=True)
  if status == 0:
    break
  prepare(where)
"""


def test_preparation_killed_before_any_fsync_replace_or_unlink_ends_with_the_same_bytes(text):
  """Includes kills between a shard and its progress file, and between the manifest and the removal of that file."""
  write_lines(text.train / "a.jsonl", TRAIN[:9])
  (text.train / "b.json.gz").unlink()
  shutil.rmtree(text.folder / "whole")
  expected = contents(text.prepare("whole")[0])
  output = text.process("killed", KILL_AT_EACH_FILE_OPERATION).communicate()[0].splitlines()
  # After the manifest is renamed, its directory is synced and the progress file is removed.
  assert (
    len(output) > 20 and output[-3:] == ["True True", "True True", "False True"] and set(output[:-3]) == {"True False"}
  )
  for moment in range(len(output)):
    assert contents(text.folder / f"killed-{moment}") == expected, moment


# Errors in the text, which are then fixed.

PACKED = gzip.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in sentences(60, 80)), mtime=0)


@pytest.mark.parametrize(
  ("name", "bad", "good", "message"),
  [
    ("d.jsonl.gz", PACKED[: len(PACKED) // 2], PACKED, r"d\.jsonl\.gz must be UTF-8 text .*EOFError"),
    ("d.txt", b"A wave\xff", b"A wave.", r"d\.txt must be UTF-8 text .*; line 1 is not"),
    ("d.jsonl", b'{"text": "A"}\n{"txt": "A"}', b'{"text": "A"}\n{"text": "B"}', r"d\.jsonl, line 2: .*\['txt'\]"),
  ],
)
def test_unreadable_text_leaves_an_unfinished_folder(text, name, bad, good, message):
  (text.train / name).write_bytes(bad)
  for _ in range(2):
    with pytest.raises(UserError, match=message):
      text.prepare("fixed", take=45)
    assert name_prefixes(text.folder / "fixed") == {".lock", "progress.json", "tokenizer.model", "train"}
  (text.train / name).write_bytes(good)
  text.prepare("fixed", take=45)
  assert contents(text.folder / "fixed") == contents(text.prepare("at once", take=45)[0])


@pytest.mark.parametrize("split", ["train", "valid"])
def test_empty_documents_alone_leave_an_unfinished_folder(text, split):
  kept = contents(getattr(text, split))
  for name in kept:
    (getattr(text, split) / name).unlink()
  write_lines(getattr(text, split) / "a.jsonl", ["", ""])
  with pytest.raises(
    UserError, match=rf"{split} must hold at least one row of 8 tokens; it has 0 tokens in 0 non-empty"
  ):
    text.prepare("fixed")
  assert "manifest.json" not in name_prefixes(text.folder / "fixed")
  for name, content in kept.items():
    (getattr(text, split) / name).write_bytes(content)
  assert contents(text.prepare("fixed")[0]) == contents(text.folder / "whole")


MEMORY = """
packing.GROUP, packing.SHARD = 100_000, 1 << 20
prepare(folder.with_name("short"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(train / "a.jsonl").write_text(json.dumps({"text": "a wave " * 700_000}))
prepare()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_document_of_megabytes_is_not_encoded_at_once(text):
  """4.9 MB without a newline. Measured memory growth: 47 MB, and 299 MB if the document is encoded at once."""
  kilobytes = text.process("long", MEMORY).communicate()[0]
  assert int(kilobytes) < 120_000, kilobytes


# Errors of the folder.


def begun(text):
  """Writes the first shards of the folder `begun`, which remains unfinished; returns its name."""
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
    ({"field": "content"}, r"\(field was 'text' and is 'content'\)"),
    ({"tokenizer": "train:320"}, r"\(tokenizer was '[0-9a-f]{64}' and is 'train:320'\)"),
  ],
)
def test_a_folder_of_another_request_is_a_user_error(text, stage, changes, message):
  name = begun(text) if stage == "begun" else stage
  before = contents(text.folder / name)
  with pytest.raises(UserError, match=rf"{name} was started for other rows {message}; choose a new directory, or"):
    text.prepare(name, **changes)
  assert contents(text.folder / name) == before


OTHER_VERSIONS = [
  ((preparation, "FORMAT_VERSION", 7), r"format 2 and SentencePiece [\d.]+ and would be continued with format 7 and"),
  ((tokenizer.sentencepiece, "__version__", "9.9"), r"and would be continued with format 2 and SentencePiece 9\.9"),
]


@pytest.mark.parametrize(("change", "message"), OTHER_VERSIONS)
def test_a_folder_is_not_continued_with_another_format_or_sentencepiece_version(text, monkeypatch, change, message):
  folder = text.folder / begun(text)
  before = contents(folder)
  with monkeypatch.context() as patch:
    patch.setattr(*change)
    with pytest.raises(
      UserError, match=rf"was started with .*{message}.*; install the versions .*, or delete {folder}"
    ):
      text.prepare("begun")
    assert contents(folder) == before
    assert text.prepare("whole")[1] == shards.read_manifest(text.folder / "whole"), (
      "a finished folder depends on the versions"
    )
  text.prepare("begun")
  assert contents(folder) == contents(text.folder / "whole")


def test_a_folder_of_a_fast_tokenizer_depends_on_the_version_of_its_library(text, monkeypatch, caplog):
  def interrupt(*_):
    raise KeyboardInterrupt

  for request in ("train_bytes:300", str(text.folder / "tokenizer.json")):
    whole, manifest = text.prepare(f"whole-{len(request)}", tokenizer=request)
    shutil.copy(whole / "tokenizer.json", text.folder)
    assert manifest["tokenizer"] == tokenizer.tokenizer_sha256(whole / "tokenizer.json")
    name = f"begun-{len(request)}"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(preparation.packing, "encode_chunks", interrupt)
      text.prepare(name, tokenizer=request)
    with monkeypatch.context() as patch:
      patch.setattr(tokenizer.tokenizers, "__version__", "9.9")
      with pytest.raises(UserError, match=r"with format 2 and tokenizers [\d.]+ and .* format 2 and tokenizers 9\.9, "):
        text.prepare(name, tokenizer=request)
    text.prepare(name, tokenizer=request)
    assert contents(text.folder / name) == contents(whole)
  assert not caplog.records


def test_a_tokenizer_that_changes_text_is_reported_once(text, caplog):
  tokenizer.train_tokenizer(sentences(0, 100), 300, text.folder / "tokenizer.json")
  library = tokenizer.tokenizers.Tokenizer.from_file(str(text.folder / "tokenizer.json"))
  library.normalizer = tokenizer.tokenizers.normalizers.Lowercase()
  library.save(str(text.folder / "tokenizer.json"))
  for _ in range(2):
    _, manifest = text.prepare("lower", tokenizer=str(text.folder / "tokenizer.json"))
  (record,) = caplog.records
  assert "tokenizer.json changes text: 'The Tide" in record.message and "as 'the tide" in record.message
  assert manifest["train"]["bytes"] == shards.read_manifest(text.folder / "whole")["train"]["bytes"]


def test_a_folder_without_recorded_versions_is_continued(text, monkeypatch):
  """Earlier code did not record the versions. Such a folder may hold days of work."""
  path = text.folder / begun(text) / "progress.json"
  saved = read_checksummed_json(path)
  del saved["format"], saved["sentencepiece"]
  write_checksummed_json(path, saved)
  monkeypatch.setattr(tokenizer.sentencepiece, "__version__", "9.9")
  text.prepare("begun")
  assert contents(path.parent) == contents(text.folder / "whole")


@pytest.fixture
def lock_fails(monkeypatch):
  """Sets the error number with which locking a folder fails. The locks of `datasets` still work."""

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


def test_another_tokenizer_at_the_same_path_is_a_user_error(text):
  tokenizer.train_tokenizer(sentences(0, 100), 300, text.model)
  with pytest.raises(UserError, match=r"started for other rows \(tokenizer was '\w{64}' and is '\w{64}'\)"):
    text.prepare("whole")


@pytest.mark.parametrize(("stage", "file"), [("begun", "progress.json"), ("whole", "manifest.json")])
def test_damaged_json_is_a_user_error(text, stage, file):
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


FULL_DISK = """
for limit in LIMITS:
  where = folder.with_name(f"full-{limit}")
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
  prepare(where)
  print((where / "manifest.json").exists(), flush=True)
  resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
  prepare(where)
"""


def test_a_full_disk_is_a_user_error_and_the_same_command_finishes(made):
  """Limits of the file size: no file fits, some files fit, all files but the manifest fit."""
  whole = contents(made.folder / "whole")
  last = len(whole["manifest.json"])
  limits = [100, (100 + last) // 2, last - 1]
  output = made.process("full", FULL_DISK.replace("LIMITS", repr(limits))).communicate()[0].splitlines()
  for limit, (error, finished) in zip(limits, zip(output[::2], output[1::2], strict=True), strict=True):
    assert finished == "False" and "File too large; make room, and the same command continues where it stopped" in error
    assert error.startswith(f"error: {made.folder / f'full-{limit}'} must be a writable directory")
    assert contents(made.folder / f"full-{limit}") == whole


def test_an_unwritable_folder_is_a_user_error(text):
  (text.folder / "file").touch()
  for name in ("file", "file/folder"):
    with pytest.raises(UserError, match=r"must be a writable directory.*; make room, .* choose another"):
      text.prepare(name)
  drop = "folder.parent.mkdir(mode=0o500)\nos.geteuid() or os.seteuid(65534)\nprepare()"  # root may write anywhere
  output = text.process("closed/folder", drop).communicate()[0]
  assert "must be a writable directory" in output and "Permission denied" in output
