"""The command on a run that was trained, as a user meets it, and what it says of prompts and flags without sense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import small_model
from grids import command, imported
from tiny import resolved

from switchlora_jax.errors import UserError
from switchlora_jax.interop import export, pretrained
from switchlora_jax.training import phases, trainer

ROW = 48  # tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The directory of a short run of SwitchLoRA."""
  folder = tmp_path_factory.mktemp("generate")
  config = resolved(
    folder, 1, seq_len=ROW, steps=60, eval_every=60, checkpoint_every=60, learning_rate=3e-2, data__epochs=2
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer, "make_mesh", lambda **_: small_model.mesh(1))
    patch.setattr(trainer, "make_learnt_rank", lambda first: lambda *_: 0.0)
    trainer.train(config, folder / "run")
  return folder / "run"


def said(capsys, *flags):
  """What the command writes to standard output."""
  with imported("generate", *flags) as module:
    module.main()
  return capsys.readouterr().out


def without_cache(run, prompt):
  """The likeliest text to the end of a row, of the run's newest checkpoint, the whole row run again for each token."""
  found = pretrained.load(run)
  tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(found.tokenizer))
  plain = resolved(run.parent, 1, method="full")
  model = phases.build_phase(plain, small_model.mesh(1)).model
  tokens = tokenizer.encode(prompt)
  apply = jax.jit(model.apply)
  while len(tokens) < ROW:
    row = np.array([tokens + [0] * (ROW - len(tokens))])
    logits = apply({"params": found.weights}, row)[0, len(tokens) - 1, : tokenizer.get_piece_size()]
    tokens.append(int(jnp.argmax(logits)))
  return tokenizer.decode(tokens)


def test_a_trained_run_says_with_a_cache_what_it_says_without(run, capsys):
  text = said(capsys, f"--run={run}", "--prompt=the model", "--temperature=0")
  assert text == without_cache(run, "the model") + "\n"
  assert text.startswith("the model") and len(set(text.split())) > 5


def test_an_exported_run_says_the_same(run, tmp_path, capsys):
  export.export(run, tmp_path / "exported")
  capsys.readouterr()
  prompt = ("--prompt=the model", "--temperature=0")
  assert said(capsys, f"--model={tmp_path / 'exported'}", *prompt) == said(capsys, f"--run={run}", *prompt)


def test_the_text_is_shown_as_it_comes(run, capsys, monkeypatch):
  """When a token is drawn, what came before it has been written."""
  with imported("generate", f"--run={run}", "--prompt=the model", "--max_new_tokens=8") as module:
    generate, shown = module.generate, []

    def watched(*args, **how):
      for token in generate(*args, **how):
        shown.append(capsys.readouterr().out)
        yield token

    monkeypatch.setattr(module, "generate", watched)
    module.main()
  assert "".join(shown[:2]).startswith("the model") and sum(map(bool, shown[1:])) > 3


def test_what_stands_before_every_text_is_read_by_the_model_and_not_shown(run, capsys, monkeypatch):
  """Its end of text, for want of a BOS; neither is shown."""
  found, asked = pretrained.load(run), []
  monkeypatch.setattr(pretrained, "load", lambda path: found._replace(prefix=(1,)))
  with imported("generate", f"--run={run}", "--prompt=the model", "--max_new_tokens=2") as module:
    generate = module.generate
    monkeypatch.setattr(
      module, "generate", lambda *args, **how: generate(*args[:2], asked.append(args[2]) or args[2], **how)
    )
    module.main()
  tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(found.tokenizer))
  assert asked == [[1, *tokenizer.encode("the model")]]
  assert capsys.readouterr().out.startswith("the model")


def test_a_process_writes_the_text_and_says_what_the_model_is(run):
  options = ("--prompt=a low é", "--max_new_tokens=9", "--top_k=5", "--top_p=0.9", "--seed=3")
  first, second = (command("generate", f"--run={run}", *options) for _ in range(2))
  assert first.returncode == 0, first.stderr
  assert first.stdout == second.stdout and first.stdout.startswith("a low é")
  assert f"{run}, switchlora, step 60 of 60:" in first.stderr


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    ([], "--run or --model must be given, one of them; neither is"),
    (["--run=a", "--model=b"], "one of them; both are"),
    (["--run={run}"], "--prompt is missing or empty"),
    (["--run={run}", "--prompt="], "--prompt is missing or empty"),
    (["--run={run}", "--prompt=a\udcff"], "--prompt must be text in UTF-8"),
    (["--run={run}", "--prompt=a", "--temperature=-1"], r"temperature \(=-1\)"),
    (["--run={run}", "--prompt=a", "--top_k=-1"], r"top_k \(=-1\)"),
    (["--run={run}", "--prompt=a", "--top_p=2"], r"top_p \(=2\)"),
    (["--run={run}/nowhere", "--prompt=a"], "nowhere must be the directory of a run"),
    (
      ["--run={run}", "--prompt=a", f"--max_new_tokens={ROW}"],
      rf"at most {ROW} tokens.*try --max_new_tokens={ROW - 1}",
    ),
    (["--run={run}", f"--prompt={'9' * ROW}"], rf"found {ROW} tokens and 1 new one; try a shorter prompt"),
    (["--run={run}", f"--prompt={'9' * 999}", "--max_new_tokens=4"], "found 999 tokens and 4 new ones; try a shorter"),
  ],
)
def test_mistakes_are_sentences(run, flags, sentence):
  with (
    imported("generate", *(flag.format(run=run) for flag in flags)) as module,
    pytest.raises(UserError, match=sentence),
  ):
    module.main()


def test_a_prompt_that_just_fits_is_taken(run, capsys):
  text = said(capsys, f"--run={run}", f"--prompt={'9' * (ROW - 1)}", "--temperature=0")
  assert text.startswith("9" * (ROW - 1))


def test_characters_that_the_tokenizer_does_not_know_are_named(tmp_path):
  """The project's own tokenizers know all; others, T5's among them, do not."""
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["some words of a small text"] * 20),
    model_prefix=str(tmp_path / "small"),
    vocab_size=30,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "small.model"))
  with imported("generate") as module:
    assert module.encode(tokenizer, "some text") == tokenizer.encode("some text")
    with pytest.raises(UserError, match="characters that the tokenizer does not know: '☃' 'QQ'; leave them out"):
      module.encode(tokenizer, "some ☃ words QQ")
    with pytest.raises(UserError, match=r"--prompt \(='  '\) has nothing that the tokenizer takes for text"):
      module.encode(tokenizer, "  ")
