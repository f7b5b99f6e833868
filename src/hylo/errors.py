"""The one error that users meet: what is wrong, where, and how to mend it, in one line."""


class HyloError(Exception):
    """Bad input. The command line prints the message as one line and exits with status 2."""
