"""Why a photograph gives no training sample: a value with a type, never a crash and never silence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rejection:
    """One photograph that is left out.

    ``cause`` is a short fixed word for counting (``"no_foreground"``), ``detail`` a sentence with the value found, the
    value expected and the key to change. ``value`` is the value found, where the cause is a limit.
    """

    cause: str
    detail: str
    value: float | None = None


class Rejected(ValueError):
    """Raised inside a step; carries the :class:`Rejection` that the caller records."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.rejection = Rejection(cause, detail)
