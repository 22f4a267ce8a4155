"""The errors a user can mend: the CLI prints their message and nothing else."""


class KDError(Exception):
    """Something in the input is wrong; the message names it and says how to mend it."""


class IncompatibleError(KDError):
    """A method cannot work between these two detectors; the message says why and what would work."""


class UnknownDetectorError(KDError):
    """No adapter knows the class of a model; the message says for which libraries there are some."""


class NonFiniteLossError(KDError):
    """A loss term became NaN or infinite; the message names the term and the step."""
