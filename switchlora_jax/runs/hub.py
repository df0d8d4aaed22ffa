"""Models of the Hugging Face hub, named `hub:NAME`."""

import functools
from pathlib import Path

from switchlora_jax.errors import UserError, one_line

HUB = "hub:"  # followed by the name of a model


@functools.cache
def download(name: str, files: tuple[str, ...], flag: str, local: str) -> Path:
  """Downloads files of `hub:NAME` into the cache of `huggingface_hub`, unless they are there.

  Args:
    files: patterns of the names of the files.
    flag: the setting that names the model, for messages.
    local: what the setting takes instead, for messages.

  Returns:
    The folder with the files.

  Raises:
    UserError: the hub cannot be reached, or the model does not exist or is not accessible.
  """
  import huggingface_hub  # local import: it takes a while, and most runs do not use the hub

  try:
    return Path(huggingface_hub.snapshot_download(name.removeprefix(HUB), allow_patterns=list(files)))
  except Exception as error:  # network errors, and errors of invalid, missing and gated models
    raise UserError(
      f"{flag} (={name!r}) could not be downloaded: {one_line(error)}; it needs network access and the name of a "
      f"model, as in hub:openai-community/gpt2; for a local copy, pass {local}"
    ) from error
