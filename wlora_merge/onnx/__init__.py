"""A model folder -> ONNX, run and checked.

This room knows dense model folders, torch's exporter and ONNX Runtime. It must not know mixtures, adapters or export folders.

convert        a dense folder -> an ONNX folder
dummy_inputs   the inputs that a graph is traced and compared on
trace          torch's exporter, and what it needs of transformers
rope           rotary positions whose frequencies depend on the length
seq2seq        encoder and decoder of a seq2seq model as graphs
pooling        sentence embeddings in the graph
weights        which tensors of a model are its weights, and what else a graph depends on
graph          the traced graph made tidy
skeleton       a graph without its weights, and the file that it becomes with them: fill
trace_cache    such graphs, kept for the next export
protobuf       an ONNX file as bytes, read lazily: read_onnx
js_names       under which names transformers.js looks for graphs
match          which initializers are which tensors: Matcher
session        ONNX Runtime sessions, and how a graph is run
validate       a graph's outputs against the model's
quantize       int8 and int4 graphs
genai          an onnxruntime-genai folder
"""
