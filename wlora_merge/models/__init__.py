"""A base model: on disk, as a tree of modules, and as transformers loads it.

This room knows checkpoints of the hub and the classes of transformers. It must not know adapters, data or mixtures.

base_model        a checkpoint folder, read lazily: BaseModel, open_base
config_spellings  keys that transformers 4 and 5 spell otherwise
files             the files of its folder: carried_files
names             names of one spelling among those of another: NameResolver
module_tree       what transformers renames and fuses on loading: ModuleTree, empty_model
quantization      which format a base is quantized in
vocabulary        a base with more or fewer rows of its vocabulary: Vocabulary
tied_embeddings   what a model uses under two names
pooling           how token vectors become the one that a head sees: pool_tokens, add_pooling_layer
loading           models as transformers loads them, and its messages kept away
"""
