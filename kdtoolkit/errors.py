"""Errors that a user can fix. The command line prints their message and nothing else."""


class KDError(Exception):
    """Something in the input is wrong. The message names it and says how to fix it."""


class IncompatibleError(KDError):
    """A method cannot work between these two detectors. The message says why, and which methods can."""


class UnknownDetectorError(KDError):
    """No adapter knows the class of a model. The message names the libraries that have adapters."""


class NonFiniteLossError(KDError):
    """A loss term became NaN or infinite. The message names the term and the step."""
