"""Pre-train LLaMA with SwitchLoRA (arXiv 2406.06564) and the methods it is compared with.

The sub-packages and modules; each imports only those below it:

  config      checks a config and fills in its defaults
  planning    memory, traffic and time of a run, before it starts
  glue        fine-tuning a pre-trained model on GLUE
  training    the train state and step, phases, the trainer, evaluation, metrics
  interop     loading runs and Hugging Face folders as pre-trained models; export
  analysis    singular values and ranks of the weights; drift of stored kernels
  data        documents, tokenizer, packed sequences, the batch of step t
  methods     the training methods, and what each adds to a step; optimizers and schedules
  runs        run directories, checkpoints and files
  models      the LLaMA decoder, its loss, plain weights, text generation
  parallel    the mesh and shardings, several processes, supervision
  lowrank     the paper: layers, switching, spares, kernel storage, the optimizer
  errors      errors that commands print without a traceback

The public names work in any Flax model; the example in `SwitchLoRADense` trains one layer with them:

  LoRADense, SwitchLoRADense   linear layers with a frozen base kernel and a trainable adapter
  merge                        the merged weight `kernel + scale·AᵀB`
  SwitchSchedule, switch       Algorithms 1 and 2 of the paper
  draw_uniforms, FreshVectors  the random numbers and, without stored spares, the vectors that `switch` takes
  vector_adam                  Adam with a step count per LoRA vector
  lora_vectors                 marks the parameters whose rows are LoRA vectors
"""

from switchlora_jax.lowrank.layers import LoRADense, SwitchLoRADense, lora_vectors, merge
from switchlora_jax.lowrank.optimizer import vector_adam
from switchlora_jax.lowrank.spares import FreshVectors, draw_uniforms
from switchlora_jax.lowrank.switching import SwitchSchedule, switch

__all__ = [
  "FreshVectors",
  "LoRADense",
  "SwitchLoRADense",
  "SwitchSchedule",
  "draw_uniforms",
  "lora_vectors",
  "merge",
  "switch",
  "vector_adam",
]
