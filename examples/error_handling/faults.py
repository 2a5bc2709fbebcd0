"""What can go wrong, and which of it another attempt may cure.

The fields go to ``super().__init__`` positionally, so that the errors survive pickle.
"""

from __future__ import annotations


class ValidationError(Exception):
    """The input is wrong, and will be wrong the next time."""

    def __init__(self, field: str, issue: str) -> None:
        super().__init__(field, issue)
        self.field, self.issue = field, issue

    def __str__(self) -> str:
        return f"validation failed on {self.field}: {self.issue}"


class NetworkError(Exception):
    """The way to the service was down for a moment."""

    def __init__(self, operation: str, problem: str) -> None:
        super().__init__(operation, problem)
        self.operation, self.problem = operation, problem

    def __str__(self) -> str:
        return f"network error during {self.operation}: {self.problem}"


class PoolExhausted(Exception):
    """Nothing that this process does can work any more."""


def is_transient(error: BaseException) -> bool:
    """Tell whether to try again; an AbortError never gets here."""
    # Errors that nobody thought of are tried again; only what is known to be permanent is not.
    return not isinstance(error, ValidationError)
