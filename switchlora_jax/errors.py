"""The one exception that is the user's to fix; commands print it as a sentence, without a traceback."""


class UserError(ValueError):
  """A mistake in a flag, a config, a file or a directory: what was expected, what was found, what to do."""
