"""Pre-train LLaMA with SwitchLoRA and its rivals. The modules, in the order data flows:

  config          checks a config once, fills in what follows from it
  documentation   text that comes with the packages: the prose of their documentation
  corpus          documents of local files and of the Hugging Face hub, read in parts
  tokenizer       trains or loads SentencePiece
  packing         documents → tokens → rows, from any position on
  rows            packed rows on disk: shards, checksums, the manifest
  preparation     a folder of packed rows, filled once, killed and continued
  stream          rows that are packed while the text is read
  dataset         config.data → rows, found in a folder or made now
  order           the order in which an epoch takes its rows, computed, not kept
  batches         the batch of step t, a pure function of (seed, t)
  sharding        the mesh, and where arrays live on it
  llama           the model; each linear layer is made by a factory it is handed
  loss            next-token cross-entropy from the hidden states, a chunk of tokens at a time
  split_float     base kernels in 16 bits, and 8 more so that they do not drift
  dense           LoRADense, SwitchLoRADense: collections, initialisation, the merged forward and backward
  candidates      the vectors that wait: their draws, and their rows wherever they lie
  switching       Algorithms 1 and 2 of the paper, pure functions
  optimizer       Adam with a step count per LoRA vector, reset and freeze; schedule; clipping
  methods/        full · lora · switchlora · relora · galore: what each method adds to a step
  weights         the plain weights of a model: adapters merged in, or split off again
  hosts           several processes, one run: what they agree on, what the first does alone
  spikes          what a loss spike is, and what a run does about one
  train_state     everything a run is made of at one moment, one pytree
  train_step      loss → accumulated gradients → clip → method → update, one dispatch
  program         what a config compiles to, for each phase of its run
  warm_start      full-rank training first, within the run or in another
  peers           what the processes of a run tell each other while they are busy
  supervision     stops a run by signals, on all processes; detects hangs and lost processes
  trainer         the story of a run: build, restore, step, evaluate, save
  evaluation      validation loss, perplexity, bits per byte, and their standard errors
  glue            GLUE: its tasks, their rows, their metrics
  examples        labelled texts as token ids, and batches of them with little padding
  classifier      a pre-trained model with a head on the last token, trained in full
  drift           a study: how far stored kernels drift while vectors are switched
  tensor_files    named tensors in safetensors files
  huggingface     plain weights ↔ a Hugging Face LLaMA folder; huggingface_tokenizer: its tokenizer.json
  pretrained      the plain weights of a run or of such a folder
  export          a run as such a folder, compared with the run before it is done
  analysis        what the weights have learnt: singular values, ranks
  generation      text from a model, token by token
  manifest        what a checkpoint says of itself: sizes and checksums, written last
  checksums       one of every array, computed where it lies
  checkpoint      orbax, with checksums and fallback; a failed save is a sentence
  lock            one process at a time in a directory
  run_directory   config.json, tokenizer, and the rules for continuing a run
  saved_run       a run that is only read: its config and the weights of a checkpoint
  metrics         JSON lines, TensorBoard, progress bar, loss curve
  report          what is printed before and after a run
  cost, topology  operations and memory of a compiled step, also for GPUs that are not there
  collectives     what a compiled step sends between devices
  planner         what a run costs, before it starts

To use the layer, the switch and the optimizer in a model of your own, see `dense.SwitchLoRADense`.
"""

from switchlora_jax.lowrank.layers import LoRADense, SwitchLoRADense, lora_vectors, merge
from switchlora_jax.lowrank.optimizer import vector_adam
from switchlora_jax.lowrank.spares import draw_uniforms
from switchlora_jax.lowrank.switching import SwitchSchedule, switch

__all__ = [
  "LoRADense",
  "SwitchLoRADense",
  "SwitchSchedule",
  "draw_uniforms",
  "lora_vectors",
  "merge",
  "switch",
  "vector_adam",
]
