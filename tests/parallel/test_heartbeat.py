"""What processes say reaches all of them, also the last words; with a dictionary for the store between them."""

import threading
import time

import pytest

from switchlora_jax.parallel import heartbeat
from switchlora_jax.parallel.heartbeat import Peers


class Store:
  """The key-value store of `jax.distributed`, as far as it is used."""

  def __init__(self):
    self.values, self.broken = {}, False

  def key_value_set(self, key, value, allow_overwrite):
    if self.broken:
      raise RuntimeError("UNAVAILABLE")
    assert allow_overwrite
    self.values[key] = value

  def key_value_dir_get(self, key):
    return [(name, value) for name, value in list(self.values.items()) if name.startswith(f"{key}/")]


@pytest.fixture
def store(monkeypatch):
  monkeypatch.setattr(heartbeat, "BEAT", 0.05)
  return Store()


def process(store, here: int, count: int = 2) -> Peers:
  made = Peers()
  made.here, made.count, made._client = here, count, store
  return made


def wait_for(happened):
  deadline = time.monotonic() + 120
  while not happened():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_each_hears_what_all_say(store):
  with process(store, 0) as first, process(store, 1) as second:
    first.say(marks=3)
    second.say(marks=4, doing="step 4")
    for one in (first, second):
      wait_for(lambda one=one: {p: facts.get("marks") for p, facts in one.said.items()} == {0: 3, 1: 4})
    beat = first.said[1]["beat"]
    wait_for(lambda: first.said[1]["beat"] > beat)
    wait_for(lambda: first.said[1]["doing"] == "step 4")


def test_the_last_words_are_said_before_the_end(store):
  with process(store, 0) as first:
    with process(store, 1) as second:
      second.say(failed="KeyError: 5")
    wait_for(lambda: first.said.get(1, {}).get("ended") and first.said[1]["failed"] == "KeyError: 5")


def test_the_end_is_said_whenever_the_thread_looks(store, monkeypatch):
  """Also where it posts for the last time as soon as it may; else the others would miss this process."""
  ended = process(store, 0)
  ended._thread = threading.Thread(target=lambda: None)
  monkeypatch.setattr(Peers, "__setattr__", lambda self, *it: (object.__setattr__(self, *it), posts(self, it[0]))[0])
  posts = lambda peers, name: name == "_ended" and peers._post()
  with ended:
    pass
  assert ended.said[0]["ended"]


def test_one_process_hears_itself_without_a_store(monkeypatch):
  monkeypatch.setattr(heartbeat, "BEAT", 0.05)
  heard = threading.Event()
  with process(None, 0, count=1) as alone:
    alone.listen(lambda said: said[0].get("told") and heard.set())
    alone.say_now(told="SIGTERM")
    assert heard.wait(20)


def test_while_process_0_does_not_answer_nothing_new_is_heard(store):
  with process(store, 0) as first:
    wait_for(lambda: first.said)
    store.broken = True
    time.sleep(0.2)
    before = first.said
    time.sleep(0.3)
    assert first.said is before
    store.broken = False
    wait_for(lambda: first.said is not before)
