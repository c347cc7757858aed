"""What Nano-GPT says to a person rather than to a program.

In: a sentence with the numbers in it, and the command that fixes the problem. Out: an exception or a warning that `cli` prints as it stands.
"""


class UserError(Exception):
    """A person asked for something that cannot be done. It reaches the terminal without a traceback, with exit code 2.

    `what` says what happened, with the numbers; `fix` is what to do about it, best of all one command.
    A broken promise between two functions is no UserError but an `assert`.
    """

    def __init__(self, what: str, fix: str = ""):
        super().__init__(f"{what}\n{fix}" if fix else what)


class Notice(UserWarning):
    """A warning that does not stop the work, for a person: given to `warnings.warn`, so that a program can silence it."""
