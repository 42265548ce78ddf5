"""Which adapters, and how much of each: folded into weights, or attached to a model in memory.

This room knows adapters over a base, and the maths of mixing them. It must not know formats of exports, ONNX or training
loops; of the data room it may ask `data.tasks` alone.

mixture         Mixture, InputRef
record          what mixture.json holds: MixtureRecord, FitMetrics
files           mixture.json and mixture.safetensors, found and read
weights         softmax, presence, gains
groups          which modules share mixture weights
inputs          a mixture's inputs, found again and checked: find_inputs, Inputs
fold            the sum, and its low-rank forms: fold_*
combination     what else can be done with delta weights than to sum them: Combination
combined_adapter  such a combination as one adapter, to attach it
mix             a mixture without fitting: mix
told_task       what the mixture is for, where nobody says it: told_task
compatibility   can these adapters be mixed on this base?
attach          adapters on a model in memory: attach, detach
attachment      Attachment: what was attached, the owner of layers and hooks
stacked_lora    StackedLora: the module that a fit trains through
model_gains     ModelGains: gains of all modules in one operation, for a forward pass
new_lora        NewLora: the LoRA that a fit trains from zero, and its PEFT files
live_model      which module or tensor of a model in memory a name means
live_base       whether a model in memory is what its base's files say
whole_tensors   whole tensors as factors, for a fit
"""
