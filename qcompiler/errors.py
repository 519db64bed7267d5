"""What can go wrong, as exceptions with exit codes.

Every message says what happened, where, why, and what to do about it.
"""


class QCompilerError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        message: What is wrong and why, one sentence.
        where: The file, node, tensor or option concerned, or None.
        hint: What to do about it, or None.
        reason: Entry of docs/refusals.md that says more, or None.
        exit_code: The process exit status of the command line.
    """

    exit_code = 70
    reason: str | None = None

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        reason: str | None = None,
    ) -> None:
        if reason is not None:
            self.reason = reason
        self.message = message
        self.where = where
        self.hint = hint
        super().__init__(message)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{place}{self.message}{hint}"


class UsageError(QCompilerError):
    """An option, recipe or path that cannot be used."""

    exit_code = 2


class ModelError(QCompilerError):
    """The model is malformed, or holds something that cannot be compiled."""

    exit_code = 3
    reason = "bad-model"


class TargetError(QCompilerError):
    """The target cannot run what was asked for."""

    exit_code = 4
    reason = "target-cannot"


class ParityError(QCompilerError):
    """Outputs differ by more than was declared, or a gate failed."""

    exit_code = 5
    reason = "outputs-differ"


class InternalError(QCompilerError):
    """A pass broke a rule of its own: a defect in the compiler, not in the input."""

    exit_code = 70
    reason = "defect"


def printable(text: str) -> str:
    """Return text with control characters written out: names in a model are untrusted."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
