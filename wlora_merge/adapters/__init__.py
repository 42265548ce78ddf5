"""A PEFT folder, and what it changes in a base.

This room knows PEFT's files and the layouts of layers. It must not know mixtures, tasks or exports.

adapter            a PEFT folder -> Adapter: load_adapters
find               the adapters of a folder or a list: find_adapters
config             each field of a LoraConfig: folded, without effect, or refused
keys               a key of an adapter's file -> module and part
conventions        what other trainers write differently into a PEFT folder
factors            Factors: one adapter's change of one target module
layouts            kinds of layers <-> matrices: Layout
experts            factors of fused expert weights -> factors of the files' tensors
targets            which module or tensor of the base a name means: modules_of, tensors_of
deltas             ModuleDelta, TensorDelta: all adapters' changes of one module, or of one tensor
stacking           adapters' factors and biases -> ModuleDeltas: stack
trainable_tokens   trained rows of an embedding -> factors
added_tokens       a base with the vocabulary of one adapter, and all adapters at its size: resized
tokenizers         the tokenizer that lies beside an adapter
modules_to_save    adapters' whole tensors -> TensorDeltas: stack_tensors
"""
