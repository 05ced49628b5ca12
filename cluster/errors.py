"""The root of every error that is meant for the user."""


class UserError(Exception):
    """Something the user can put right.

    The message is one line that says what is wrong, the value, the limit and the way out. Commands print it
    without a traceback and exit with a non-zero code. Subclasses derive from a standard-library type too, so that
    a caller of the Python API can catch `LookupError` or `ValueError` without knowing us.
    """
