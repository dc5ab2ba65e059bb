"""The error that a user can mend. Nothing else of ours is imported here."""


class JetFlowError(ValueError):
    """What a user can mend: the command line prints it in one line, without a traceback."""
