"""What a user sees when something is wrong.

This room knows the kinds of failure and nothing else; it imports nothing. A library error is one sentence that names the
file and the tensor, what was got, what was expected, and what to do. The command line prints it and exits 1. A bug is not
one of these: it keeps its traceback.
"""


class WloraMergeError(Exception):
    """Something outside the program is wrong, and the message says what to do about it."""


class AdapterError(WloraMergeError):
    """An adapter folder is missing, broken, or does not fit the base model."""


class BaseModelError(WloraMergeError):
    """A base model folder is missing or broken, or lacks what an adapter changes."""


class UnsupportedError(WloraMergeError):
    """A named feature of an input, or a combination of options, that cannot be done exactly."""


class MixtureError(WloraMergeError):
    """A mixture folder is broken, or its inputs are not the ones that it was made from."""


class DataError(WloraMergeError):
    """A data file is missing, empty, or lacks the columns that the task needs."""


class OutputError(WloraMergeError):
    """An output folder cannot be written or put in place."""


class VerifyError(WloraMergeError):
    """An export is not what its manifest says, or does not compute what its mixture does."""


class NotFiniteError(VerifyError):
    """A model's own outputs are NaN or infinite, so that no export can be compared with them."""


class RecipeError(WloraMergeError):
    """A recipe has an unknown key, a wrong value, or lacks one that it needs."""


class WloraMergeWarning(UserWarning):
    """Something that the user should know and that does not stop the work."""
