"""`JetFlowError`: the one exception that the command line turns into a message."""


class JetFlowError(ValueError):
    """An error that the user can fix: the command line prints it in one line, without a traceback."""
