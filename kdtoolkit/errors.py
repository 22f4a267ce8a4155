"""Errors that a user can fix, of which the command line prints the message alone; text made safe for a terminal."""

import unicodedata


class KDError(Exception):
    """Something in the input is wrong. The message names it and says how to fix it."""


class IncompatibleError(KDError):
    """A method cannot work between these two detectors. The message says why, and which methods can."""


class UnknownDetectorError(KDError):
    """No adapter knows the class of a model. The message names the libraries that have adapters."""


class NonFiniteLossError(KDError):
    """A loss term became NaN or infinite. The message names the term and the step."""


class UnwritableError(KDError):
    """A run's folder cannot be written. The message names what stops it."""


def printable(text: str) -> str:
    r"""Text for a terminal: control characters but the line feed become escapes, such as \x1b.

    A file name may hold control characters, which a terminal takes for commands, and bytes that are no UTF-8.
    """
    return "".join(
        ascii(character)[1:-1] if unicodedata.category(character) in ("Cc", "Cs") and character != "\n" else character
        for character in text
    )
