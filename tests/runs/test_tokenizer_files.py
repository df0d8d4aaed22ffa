import json

import pytest

from switchlora_jax.errors import UserError
from switchlora_jax.runs.tokenizer_files import kept_files, special_token, tokenizer_in


def write(folder, **contents):
  for name, content in contents.items():
    (folder / f"{name}.json").write_text(json.dumps(content))
  return folder / "tokenizer.json"


def test_a_sentencepiece_model_is_preferred(tmp_path):
  assert tokenizer_in(tmp_path).name == "tokenizer.model"
  write(tmp_path, tokenizer={})
  assert tokenizer_in(tmp_path).name == "tokenizer.json"
  (tmp_path / "tokenizer.model").touch()
  assert tokenizer_in(tmp_path).name == "tokenizer.model"


def test_files_beside_a_tokenizer_are_searched_in_order(tmp_path):
  path = write(tmp_path, tokenizer={}, config={"eos_token_id": 4})
  assert special_token(path, "eos") == 4 and special_token(path, "bos") is None
  write(tmp_path, generation_config={"eos_token_id": 3})
  assert special_token(path, "eos") == 3
  write(tmp_path, special_tokens_map={"eos_token": {"content": "b"}})
  assert special_token(path, "eos") == "b"
  write(tmp_path, tokenizer_config={"eos_token": "a"})
  assert special_token(path, "eos") == "a"
  assert special_token(tmp_path / "other.json", "eos") is None
  write(tmp_path, tokenizer_config=[])
  with pytest.raises(UserError, match="must hold a JSON object"):
    special_token(path, "eos")


def test_kept_files_are_unchanged_and_name_the_same_special_tokens(tmp_path):
  path = write(tmp_path, tokenizer={"a": 1}, tokenizer_config={"bos_token": "x"}, generation_config={"top_k": 3})
  (tmp_path / "chat_template.jinja").write_text("{{ x }}")
  (tmp_path / "model.safetensors").touch()
  kept = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
  files = kept_files(path)
  assert files == {name: (tmp_path / name).read_bytes() for name in kept}
  write(tmp_path, config={"eos_token_id": 4, "bos_token_id": 5})
  with_id = kept_files(path)
  assert json.loads(with_id.pop("generation_config.json")) == {"top_k": 3, "eos_token_id": 4}
  del files["generation_config.json"]
  assert with_id == files and kept_files(write(tmp_path)).keys() == kept
  (tmp_path / "config.json").rename(tmp_path / "lone.json")
  assert kept_files(tmp_path / "lone.json").keys() == {"tokenizer.json"}


def test_a_sentencepiece_model_gets_its_name(tmp_path):
  (tmp_path / "t5.model").write_bytes(b"pieces")
  assert kept_files(tmp_path / "t5.model") == {"tokenizer.model": b"pieces"}


def test_a_sentencepiece_model_keeps_the_conversion_beside_it(tmp_path):
  write(tmp_path, tokenizer={"a": 1}, tokenizer_config={"bos_token": "x"}, config={"eos_token_id": 4})
  for name in ("tokenizer.model", "other.model", "chat_template.jinja"):
    (tmp_path / name).write_bytes(b"pieces")
  kept = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
  assert kept_files(tmp_path / "tokenizer.model") == {name: (tmp_path / name).read_bytes() for name in kept}
  assert kept_files(tmp_path / "other.model") == {"tokenizer.model": b"pieces"}
