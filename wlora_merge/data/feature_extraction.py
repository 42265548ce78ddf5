"""The task feature-extraction: what a model's body gives for a text or an image. It has no loss, so it is not fitted."""

from __future__ import annotations

from .task import Task

FEATURE_EXTRACTION = Task(
    name="feature-extraction",
    auto_class_name="AutoModel",
    pipeline_tag="feature-extraction",
    peft_task_type="FEATURE_EXTRACTION",
    peft_auto_class_name="AutoPeftModelForFeatureExtraction",
    has_head=False,
    is_body=True,
    outputs=("last_hidden_state",),
)
