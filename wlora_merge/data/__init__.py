"""Data files -> examples -> model inputs; one file for each task.

This room knows files of data, columns, labels, and the tokenizers and processors of transformers. It must not know adapters or
mixtures, and it runs no model.

formats                one file -> a table
sources                a file, a folder or a hub data set -> a table
columns                which column is what
examples               a table -> Examples: read_examples
labels                 names and order of classes: LabelSet
metrics                numbers from logits and labels: Metric
task                   what a task is: Task
tasks                  the list of tasks: get_task
causal_lm, seq2seq_lm, text_classification, token_classification, question_answering, image_classification,
feature_extraction     one task each, with all that other rooms ask about it
"""
