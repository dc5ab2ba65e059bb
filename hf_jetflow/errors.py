"""`JetFlowError`: the one exception that the command line turns into a message."""


class JetFlowError(ValueError):
    """What a user can mend: the command line prints it in one line, without a traceback."""
