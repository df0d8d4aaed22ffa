"""Continue a prompt with a trained model. Text is printed as it is sampled; Ctrl-C stops.

python -m experiments.generate --run=runs/tiny --prompt="This function returns" --top_p=0.9
python -m experiments.generate --model=exports/tiny --prompt="This function returns" --temperature=0

Prints the prompt and its continuation on stdout, and the origin of the model on stderr.
"""

import contextlib
import itertools
import sys
from pathlib import Path

import jax
from absl import flags

from experiments.common import cli
from switchlora_jax.data.tokenizer import Tokenizer, load_tokenizer
from switchlora_jax.errors import UserError
from switchlora_jax.interop import pretrained
from switchlora_jax.models import make_model
from switchlora_jax.models.generation import Sampling, generate, stream_text

RUN = flags.DEFINE_string("run", None, "directory of a run: its --workdir; uses the newest checkpoint")
MODEL = flags.DEFINE_string("model", None, "a Hugging Face folder, instead of --run")
PROMPT = flags.DEFINE_string("prompt", None, "text to continue")
DEFAULT_TOKENS = 512
NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens",
  None,
  f"maximum number of sampled tokens; default: up to the sequence length of training, at most {DEFAULT_TOKENS}",
  lower_bound=1,
)
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "divisor of the logits; 0 selects the likeliest token")
TOP_K = flags.DEFINE_integer("top_k", 0, "sample from the K likeliest tokens; 0 disables")
TOP_P = flags.DEFINE_float("top_p", 1.0, "sample from the likeliest tokens with this total probability")
SEED = flags.DEFINE_integer("seed", 0, "random seed of the sampling", lower_bound=0, upper_bound=2**32 - 1)


def model_and_sampling() -> tuple[Path, Sampling]:
  """The folder of the model and the sampling settings, after all flags are checked."""
  if bool(RUN.value) == bool(MODEL.value):
    found = "both" if RUN.value else "neither"
    raise UserError(f"expected exactly one of --run and --model, found {found}; for example --run=runs/tiny")
  if not PROMPT.value:
    raise UserError('--prompt is missing or empty; give the text to continue, for example --prompt="This function"')
  if any("\ud800" <= character <= "\udfff" for character in PROMPT.value):
    raise UserError("--prompt must be valid UTF-8, but is not; encode it as UTF-8")
  sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
  sampling.check()
  return Path(RUN.value or MODEL.value).expanduser(), sampling


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
  """The token ids of a prompt.

  Raises:
    UserError: the prompt has no tokens, or characters outside the vocabulary, which the message lists.
  """
  if unknown := tokenizer.unknown(prompt):
    raise UserError(
      f"--prompt has characters outside the tokenizer's vocabulary: {' '.join(map(repr, unknown))}; remove them"
    )
  (ids,) = tokenizer.encode([prompt])
  if not ids:
    raise UserError(f"--prompt (={prompt!r}) has no tokens; give some words")
  return ids


def new_token_count(prompt: list[int], longest: int) -> int:
  """The number of tokens to sample after a prompt.

  Raises:
    UserError: prompt and continuation are longer than `longest`, the sequence length of training.
  """
  left = longest - len(prompt)
  if left < (NEW_TOKENS.value or 1):
    remedy = f"--max_new_tokens={left}" if left > 0 else "a shorter prompt"
    raise UserError(
      f"prompt and continuation must have at most {longest} tokens, the sequence length of training; "
      f"found {len(prompt)} + {NEW_TOKENS.value or 1}; try {remedy}"
    )
  return NEW_TOKENS.value or min(left, DEFAULT_TOKENS)


def main():
  """Check the flags, load the model, print tokens as they are sampled."""
  folder, sampling = model_and_sampling()
  model = pretrained.load(folder)
  tokenizer = load_tokenizer(model.tokenizer)
  prompt = [*model.prefix, *encode_prompt(tokenizer, PROMPT.value)]
  new_tokens = new_token_count(prompt, model.seq_len)
  llama = make_model(model.architecture)
  variables = {"params": jax.device_put(model.weights)}
  draws = dict(pieces=tokenizer.size, sampling=sampling, seed=SEED.value)
  new = generate(llama, variables, prompt, new_tokens=new_tokens, end=tokenizer.eos, **draws)
  print(f"{model.origin}:\n", file=sys.stderr, flush=True)
  with contextlib.suppress(KeyboardInterrupt):
    for part in stream_text(tokenizer, itertools.chain(prompt, new)):
      print(part, end="", flush=True)
  print()


if __name__ == "__main__":
  cli.run(main)
