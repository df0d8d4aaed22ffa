"""Model FLOPs, memory, start-up time and traces of the profiler."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import small_model

from switchlora_jax.models import make_model
from switchlora_jax.models.loss import mean_loss
from switchlora_jax.planning import cost
from switchlora_jax.training import throughput


def test_model_flops_are_those_of_the_products():
  """Of a full-rank step whose queries are one block: it computes all scores, seven products of them with one again.

  Model FLOPs count six products of half the scores.
  """
  config = small_model.config("full", seq_len=9)
  rows = jax.ShapeDtypeStruct((16, 9), jnp.int32)
  model = make_model(config.model)
  params = jax.eval_shape(model.init, jax.random.key(0), rows)["params"]
  found = cost.operations(jax.grad(lambda params, rows: mean_loss(model, params, {}, rows)), params, rows)
  scores = 2 * config.model.num_layers * 16 * 9 * 9 * config.model.hidden_size  # one product of all scores
  head = 6 * 16 * config.model.hidden_size * config.model.vocab_size  # of the last token, which has no target
  expected = throughput.model_flops(config.model, 16, 9)
  assert found == expected - head - 3 * scores + 7 * scores


def test_peak_memory_is_that_of_the_process_on_a_cpu():
  (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
  assert throughput.peak_memory() == pytest.approx(1024 * int(line.split()[1]), rel=0.02)


def test_seconds_since_the_start_advance():
  first = throughput.seconds_since_start()
  time.sleep(0.05)
  assert first > 0 and 0.03 < throughput.seconds_since_start() - first < 5


def test_a_trace_has_the_asked_steps_after_the_first_two(tmp_path):
  tracer, step, began = throughput.StepTracer(tmp_path, 3), jax.jit(lambda x: x @ x), []
  for number in range(1, 8):
    tracer.before_step()
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      values = step(jnp.ones((64, 64)))
    tracer.after_step(values)
    began.append(bool(list(tmp_path.rglob("*.xplane.pb"))))
  tracer.close()
  assert began == [False] * 4 + [True] * 3  # written after the fifth step
  (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
  profile = jax.profiler.ProfileData.from_file(str(trace))
  events = [event for plane in profile.planes for line in plane.lines for event in line.events]
  assert sum(event.name == "train" for event in events) == 3


def test_a_trace_that_ends_early_is_written(tmp_path):
  tracer = throughput.StepTracer(tmp_path, 10)
  for _ in range(4):
    tracer.before_step()
    tracer.after_step(jnp.ones(()))
  tracer.close()
  tracer.close()
  assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_a_trace_that_cannot_begin_is_a_warning(tmp_path, caplog):
  tracer = throughput.StepTracer(tmp_path, 2)
  with jax.profiler.trace(tmp_path / "of the user"):
    for _ in range(5):
      tracer.before_step()
      tracer.after_step(jnp.ones(()))
  tracer.close()
  assert caplog.text.count("the trace of the profiler cannot be written (") == 1
  assert not (tmp_path / "plugins").exists()


def test_a_command_that_ends_before_its_trace_begins_says_so(tmp_path, caplog):
  tracer = throughput.StepTracer(tmp_path, 2)
  tracer.before_step()
  tracer.after_step(jnp.ones(()))
  tracer.close()
  assert "no trace was written: the command ended before its step 3" in caplog.text


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path, caplog, monkeypatch):
  def full_disk():
    raise RuntimeError("No space left on device")

  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
  monkeypatch.setattr(jax.profiler, "stop_trace", full_disk)
  tracer = throughput.StepTracer(tmp_path, 1)
  for _ in range(5):
    tracer.before_step()
    tracer.after_step(jnp.ones(()))
  assert "the trace of the profiler cannot be written (No space left on device)" in caplog.text
