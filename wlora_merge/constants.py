"""The values that options and files may hold, and the names of our own files. No rules, no other knowledge."""

from __future__ import annotations

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE, MULTI, REGRESSION)

GRANULARITIES = ("module", "layer", "global")
MIXTURE_FILE, MIXTURE_TENSORS = "mixture.json", "mixture.safetensors"
MANIFEST_FILE = "wlora_merge.json"
PARAMETER, SCALE_PARAMETER = "wlora_weights", "wlora_delta_scale"
"""The parameters of an attached model that are the mixture's own; its checkpoints hold them beside the base's tensors."""
NEW_ADAPTER = "new"
"""What a mixture calls the adapter that its fit trained."""
NEW_FOLDER = "new_adapter"
"""Where a mixture folder has it."""
FIT_STATE = ".fit-state"
NORMALIZE = ("all", "present", "none")
LINEAR, MAJORITY_SIGNS = "linear", ("total", "frequency")
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""The ways to combine delta weights that are not their weighted sum; each prunes them first."""
COMBINATIONS = (LINEAR, *PRUNING)
FORMATS = ("dense", "lora", "onnx")
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""What weights may be written in, and how safetensors calls it."""
SERVERS = (
    "transformers", "peft", "sentence-transformers", "vllm", "tgi", "llama.cpp", "ctranslate2", "lm-eval", "onnxruntime", "optimum",
    "openvino", "transformers.js", "onnxruntime-genai",
)  # fmt: skip
ONNX_DTYPES, ONNX_QUANTIZE, ONNX_RUNTIMES = ("float32", "float16"), ("int8", "int4"), ("genai",)
ONNX_PROVIDERS = ("cpu", "cuda", "dml", "webgpu")
