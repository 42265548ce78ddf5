"""An export folder: written, described, verified.

This room knows mixtures, models and ONNX, and the folders made of them. It must not know training or the command line.

export           the workflow: export
format           what a format is: Format, Plan, Measures
formats          the list of them: FORMATS
dense_format     safetensors, planned, written, described and verified
lora_format      one PEFT adapter
onnx_format      graphs, traced or refolded, or a folder of genai
beside           what lies beside the adapters, carried or named
dense            which tensors go into which files: plan
pooling_layer    mean pooling as one more layer of a dense export
stream           the bytes of those files: write_files
carried          what the base has beside its weights
lora             the factors and the files of one PEFT adapter
onnx_refold      a mixture folded into an ONNX export of its base
head             the trained head in an export's own files
manifest         wlora_merge.json: what went in and out: Manifest, read_manifest
folders          which exports and mixtures lie in a folder
model_card       README.md with the hub's metadata, from model_card.md.j2
serving          what servers take
report           report.html, from report.html.j2: write_report
report_answer    which candidate is best, in words: answer, interval
report_data      what a mixture changes, measured
report_groups    which of many adapters a figure shows as one
report_figures   and drawn
verify           the workflow: verify
verify_files     digests, headers and configs, before anything is loaded
verify_weights   weights folded again and compared
verify_outputs   how far outputs may differ
probe            the inputs that outputs are compared on
unmerged         the mixture attached to its base, not merged
"""
