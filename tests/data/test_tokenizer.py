import io
import json
import shutil

import huggingface_hub
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from paths import SHARED
from tiny import DOCUMENTS

from switchlora_jax.data import tokenizer
from switchlora_jax.data.readers import BadRow, RowOptions
from switchlora_jax.errors import UserError
from switchlora_jax.interop import tokenizer_json

T5 = SHARED / "t5_tokenizer" / "t5_32100.model"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "own.model"
  tokenizer.train_tokenizer(DOCUMENTS, 320, path)
  return path


@pytest.fixture(scope="module")
def trained(path):
  return tokenizer.load_tokenizer(path)


@pytest.fixture(scope="module")
def library(path):
  return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module")
def t5():
  if not T5.exists():
    pytest.skip("the SentencePiece model of T5 is not available")
  return tokenizer.load_tokenizer(T5)


def write_foreign_model(path, **options):
  """Trains a SentencePiece model without `tokenizer.train_tokenizer`."""
  model = io.BytesIO()
  settings = {"vocab_size": 40, "hard_vocab_limit": False, "model_type": "bpe", "minloglevel": 2} | options
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(DOCUMENTS), model_writer=model, **settings)
  path.write_bytes(model.getvalue())
  return path


# Training.


def test_special_pieces_have_the_ids_of_t5(trained, library):
  assert (trained.pad, trained.eos, library.unk_id(), trained.bos) == (0, 1, 2, None)


def test_special_pieces_of_t5(t5):
  assert (t5.pad, t5.eos, t5.bos, t5.size) == (0, 1, None, 32_100)


@given(st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
def test_decoding_inverts_encoding(trained, text):
  assert trained.decode(trained.encode([text])[0]) == text


@pytest.mark.parametrize("text", [" a  b ", "\n\n\ta\r\n", "é漢😀", "</s><unk><0x41>", ""])
def test_unusual_text_is_encoded_without_loss_or_special_pieces(trained, library, text):
  (ids,) = trained.encode([text])
  assert trained.decode(ids) == text and not {library.unk_id(), trained.eos} & set(ids)


def test_ids_are_those_of_the_library(trained, library):
  assert trained.encode(DOCUMENTS) == library.encode(DOCUMENTS) == trained.encode(DOCUMENTS, parallel=False)


def test_bytes_of_the_ids_of_a_text_are_those_of_the_text(trained):
  text = " a  wave é漢\n😀"
  (ids,) = trained.encode([text])
  assert b"".join(map(trained.token_bytes, ids)) == text.encode()
  assert [trained.token_bytes(token) for token in range(3)] == [b"", b"", b""]  # padding, EOS and unknown


def test_frequent_text_has_fewer_pieces(trained):
  frequent, rare = trained.encode(["the tide", "eht edit"])
  assert len(frequent) < len(rare)
  assert 300 < trained.size <= 320


def test_training_is_deterministic(path, tmp_path):
  tokenizer.train_tokenizer(iter(DOCUMENTS), 320, tmp_path / "again")
  tokenizer.train_tokenizer(DOCUMENTS + ["Rocks, rocks, rocks."] * 9, 320, tmp_path / "other")
  assert path.read_bytes() == (tmp_path / "again").read_bytes() != (tmp_path / "other").read_bytes()
  assert sorted(file.name for file in tmp_path.iterdir()) == ["again", "other"]


def test_long_lines_are_used_for_training(tmp_path):
  tokenizer.train_tokenizer(["zebra " * 5000], 300, tmp_path / "model")
  assert len(tokenizer.load_tokenizer(tmp_path / "model").encode([" zebra"])[0]) == 1


def test_training_reads_no_more_than_its_sample(monkeypatch, tmp_path):
  monkeypatch.setattr(tokenizer, "SAMPLE", 100)
  documents = iter(["The tide rises. " * 4] * 3)
  tokenizer.train_tokenizer(documents, 300, tmp_path / "model")
  assert len(list(documents)) == 1


@pytest.mark.parametrize(("documents", "vocab_size"), [(DOCUMENTS, 256), ([], 320), (["", "\n"], 320)])
def test_too_little_text_or_too_small_a_vocabulary_is_a_user_error(tmp_path, documents, vocab_size):
  message = rf"could not train a tokenizer of {vocab_size} pieces .*: use more text, a larger vocabulary"
  with pytest.raises(UserError, match=message):
    tokenizer.train_tokenizer(documents, vocab_size, tmp_path / "model")
  assert not list(tmp_path.iterdir())


def test_an_error_of_the_text_is_raised_as_it_is(tmp_path):
  """SentencePiece would report it with a traceback in its message."""
  row = BadRow("a.jsonl, line 2", "text", "null", "mend it", RowOptions())
  for error in (row, KeyboardInterrupt("stopped")):

    def documents(error=error):
      yield "The tide rises."
      raise error

    with pytest.raises(type(error)) as caught:
      tokenizer.train_tokenizer(documents(), 320, tmp_path / "model")
    assert caught.value is error and not list(tmp_path.iterdir())


def test_pieces_and_rows_without_text_do_not_change_the_tokenizer(path, tmp_path):
  row = BadRow("a.jsonl, line 2", "text", "null", "mend it", RowOptions())
  pieces = [text if number % 2 else [text[:7], text[7:]] for number, text in enumerate(DOCUMENTS)]
  tokenizer.train_tokenizer([row, *pieces, row], 320, tmp_path / "same")
  assert (tmp_path / "same").read_bytes() == path.read_bytes()


# Loading.


def test_a_missing_or_invalid_model_file_is_a_user_error(tmp_path):
  with pytest.raises(UserError, match=r"the tokenizer '.*none' must be .* there is no such file; pass an"):
    tokenizer.load_tokenizer(tmp_path / "none")
  with pytest.raises(UserError, match="there is no such file"):
    tokenizer.load_tokenizer("a" * 300)  # too long for a file name
  (tmp_path / "text").write_text("The tide rises.")
  (tmp_path / "empty").touch()
  for name in ("text", "empty"):
    with pytest.raises(UserError, match="must be a SentencePiece model; reading it failed"):
      tokenizer.load_tokenizer(tmp_path / name)


def test_a_folder_names_its_tokenizer(path, tmp_path):
  (tmp_path / "tokenizer.json").touch()
  assert tokenizer.locate(str(tmp_path), "--tokenizer") == tmp_path / "tokenizer.json"
  shutil.copy(path, tmp_path / "tokenizer.model")
  assert tokenizer.locate(str(tmp_path), "--tokenizer") == tmp_path / "tokenizer.model"
  assert tokenizer.locate(str(path), "--tokenizer") == path
  with pytest.raises(
    UserError, match=r"^--tokenizer \(='\S+'\) must have a tokenizer\.model or a tokenizer\.json; it has"
  ):
    tokenizer.locate(str(tmp_path.parent), "--tokenizer")


def test_the_tokenizer_of_a_model_of_the_hub_is_downloaded_once_and_alone(monkeypatch, tmp_path):
  asked = []
  download = lambda name, revision, allow_patterns: asked.append((name, revision, allow_patterns)) or str(tmp_path)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  (tmp_path / "tokenizer.json").touch()
  for _ in range(2):
    assert tokenizer.locate("hub:some/model", "--tokenizer") == tmp_path / "tokenizer.json"
  ((name, revision, patterns),) = asked
  assert (name, revision) == ("some/model", None) and not any(
    "safetensors" in pattern or "*" in pattern for pattern in patterns
  )
  assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "config.json"} <= set(patterns)
  tokenizer.locate("hub:some/model@v1.0", "--tokenizer")
  assert asked[1][:2] == ("some/model", "v1.0")
  with pytest.raises(UserError, match="must have a branch, a tag or a commit after @"):
    tokenizer.locate("hub:some/model@", "--tokenizer")


def test_an_unreachable_hub_is_a_user_error(monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  message = (
    r"^--tokenizer \(='hub:no-such/model'\) could not be downloaded: .*; it needs network access and the name of a"
  )
  with pytest.raises(UserError, match=message):
    tokenizer.locate("hub:no-such/model", "--tokenizer")


def test_a_conversion_of_a_model_is_the_same_tokenizer(path, tmp_path):
  files, _ = tokenizer_json.convert(path, 9)
  for name, contents in files.items():
    (tmp_path / name).write_text(json.dumps(contents))
  assert tokenizer.gives_same_ids(path, path) and tokenizer.gives_same_ids(path, tmp_path / "tokenizer.json")
  other = tmp_path / "other" / "tokenizer.json"
  other.parent.mkdir()
  tokenizer.train_tokenizer(DOCUMENTS, 320, other)
  assert not tokenizer.gives_same_ids(path, other)
  assert not tokenizer.gives_same_ids(tmp_path / "tokenizer.json", other)
  again = tmp_path / "again.json"  # as `transformers` may write it, with a truncation that is not applied
  truncation = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
  again.write_text(json.dumps(json.loads(other.read_text()) | {"truncation": truncation}, indent=1))
  assert tokenizer.gives_same_ids(other, again)


def test_a_model_without_eos_is_a_user_error(tmp_path):
  with pytest.raises(UserError, match=r"must have an end-of-sentence piece, to mark the end of a document; train it"):
    tokenizer.load_tokenizer(write_foreign_model(tmp_path / "model", eos_id=-1))
  assert tokenizer.load_tokenizer(write_foreign_model(tmp_path / "model")).eos == 2


def test_a_model_larger_than_the_vocabulary_is_a_user_error(path, trained):
  pieces = trained.size
  tokenizer.check_vocabulary(path, pieces)
  with pytest.raises(UserError, match=rf"vocabulary \(={pieces - 1}\); it has {pieces} pieces; pass --config\.model"):
    tokenizer.check_vocabulary(path, pieces - 1)
