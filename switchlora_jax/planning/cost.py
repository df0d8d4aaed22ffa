"""Cost of a program: the operations of its matrix products, and the memory of the compiled program."""

import math

import jax
from jax.extend import core


def operations(function, *args) -> int:
  """Floating-point operations (multiplications and additions) of the matrix products in `function(*args)`.

  A loop counts by its length. A loop with unknown trip count (the switch's, 0 or 1 iterations) counts once. Of the
  branches of a conditional, the most expensive one counts. `args` may be abstract.
  """
  return _operations(jax.make_jaxpr(function)(*args).jaxpr)


def _operations(jaxpr) -> int:
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation) -> int:
  if equation.primitive.name == "dot_general":
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
  inner = [_operations(jaxpr) for jaxpr in _inner(equation.params)]
  if equation.primitive.name == "cond":
    return max(inner)
  return sum(inner) * equation.params.get("length", 1)


def _inner(params):
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item


def memory(compiled) -> dict[str, int]:
  """Bytes per device of a compiled program; "shared" are outputs that reuse the memory of arguments."""
  analysis = compiled.memory_analysis()
  arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
  shared, temporaries = analysis.alias_size_in_bytes, analysis.temp_size_in_bytes
  return {
    "arguments": arguments,
    "outputs": outputs,
    "shared": shared,
    "temporaries": temporaries,
    "peak": arguments + outputs - shared + temporaries,
  }
