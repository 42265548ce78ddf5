"""Bytes on disk. A writer knows one format, gets tensors and numbers, and knows nothing of softmaxes or workflows."""
