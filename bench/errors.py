"""The one exception a user causes: its message is one clear line that says what, where and what to do."""


class UserError(Exception):
    """Bad input. The command line prints the message alone, without a traceback, and exits with code 2."""
