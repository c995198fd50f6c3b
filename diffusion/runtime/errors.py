"""Errors of libraries, in the words of ours."""


def first_line(error, most=300):
    """The first line of an exception's message, cut to so many characters; its type where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:most]
