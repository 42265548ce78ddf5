"""A fit: which candidates there are, how each is trained, how they are compared, and which is kept.

This room knows everything below it but how an export is written. It must not know the command line.

fit                the workflow: fit
stages             what a fit does once its model is loaded
given              what a fit works on, before its model is loaded: Given
screening          which of many adapters a fit mixes
preparation        the model loaded, the examples encoded: Prepared
run                what stays the same through a fit, and what one training is asked for
model              the model that a fit trains on
learner            one loaded model on which candidates are placed, trained and judged
head_inputs        what a head sees of an example, and how it is put into its class: HeadInputs
solved_head        a new head's problem on the rows of a fit: SolvedHead
solver             a linear head at its optimum; predictions that leave each row out
packing            whether a model keeps packed examples apart
completions        completions that repeat, as classes: Completions
placement          candidates put on the model: Placement
loop               one training: optimizer, batches, state
candidates         what is compared, and for how long: Candidate
comparison         candidates trained and judged on the same examples
cross_validation   which shots are held out
scoring            what a model gave -> scores with standard errors
selection          which candidate is kept
initial_logits     where a fit starts
cma_es             a search without gradients
resume             the state of a fit, taken up again
trackers           what a fit logs to
record             what a mixture remembers of its fit
"""
