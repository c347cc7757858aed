"""Errors and warnings that are meant for the user."""

from collections.abc import Mapping


class UserError(Exception):
    """A request that cannot be carried out; the command line prints it without a traceback.

    A broken invariant between two functions is an `assert`, not a `UserError`.

    Args:
        what: What failed, with the value and its limit.
        fix: One action that helps, as a sentence, or as the settings to change.
    """

    def __init__(self, what: str, fix: str | Mapping[str, object] = ""):
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        if isinstance(self.fix, str):
            return f"{self.what}\n{self.fix}" if self.fix else self.what
        settings = ", ".join(f"{name}={value!r}" for name, value in self.fix.items())
        return f"{self.what}\nSet {settings}."


class Notice(UserWarning):
    """A warning for the user that does not stop the work."""
