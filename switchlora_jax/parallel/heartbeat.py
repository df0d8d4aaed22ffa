"""What the processes of a run tell each other while their main threads are busy: a thread of each posts what this
process has to say in the key-value store of `jax.distributed`, and reads what all have said, every second.
"""

import json
import threading
from collections.abc import Callable

from jax._src import distributed  # as in hosts.py

BEAT = 1.0  # seconds between two posts
KEYS = "switchlora_jax/said"


class Peers:
  """The processes of this run, this one included; a context that tells and listens.

  Attributes:
    here, count: the number of this process, and how many there are.
    said: {process: its facts}, the newest of each that has said any. `beat` counts its posts; `ended` is true after
      its last.
  """

  def __init__(self):
    state = distributed.global_state
    self.here, self.count, self._client = state.process_id, state.num_processes, state.client
    self.said, self._mine, self._lock = {}, {"beat": 0}, threading.Lock()
    self._listeners, self._news, self._ended = [], threading.Event(), False
    self._thread = threading.Thread(target=self._talk, name="peers", daemon=True)

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, *_):
    self.say(ended=True)
    self._ended = True  # after what the thread is to say last
    self._news.set()
    self._thread.join(2 * BEAT)  # no longer: process 0 may be the one that does not answer

  def listen(self, hear: Callable[[dict[int, dict]], None]):
    """Have `hear(said)` called in the thread after every post."""
    self._listeners.append(hear)

  def say(self, **facts):
    """Add facts, plain values, to what this process says with its next post; returns at once."""
    with self._lock:
      self._mine |= facts

  def say_now(self, **facts):
    """The same, and let the next post be soon."""
    self.say(**facts)
    self._news.set()

  def _talk(self):
    while not self._ended:
      self._post()
      self._news.wait(BEAT)
      self._news.clear()
    self._post()

  def _post(self):
    with self._lock:
      self._mine["beat"] += 1
      mine = dict(self._mine)
    if self.count == 1:
      self.said = {self.here: mine}
    else:
      try:
        self._client.key_value_set(f"{KEYS}/{self.here}", json.dumps(mine), allow_overwrite=True)
        found = self._client.key_value_dir_get(KEYS)
      except Exception:  # process 0 is gone or does not answer: the watchdog sees that nothing new was said
        return
      self.said = {int(key.rpartition("/")[2]): json.loads(text) for key, text in found}
    for hear in self._listeners:
      hear(self.said)
