"""For command lines: numbers that are read from them, and errors in a line."""

import argparse


def positive(text: str) -> int:
    """A number of at least one, or what argparse makes a sentence of."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive integer")
    return int(text)


def first_line(error: Exception, own: type[Exception]) -> str:
    """Say what went wrong in a line; errors of a class of ours are a sentence that says it all."""
    words = f"{error}" if isinstance(error, own) else f"{type(error).__name__}: {error}"
    return words.strip().splitlines()[0][:200]
