"""The stages a model passes through, from import to a target's own form."""

from enum import StrEnum


class Stage(StrEnum):
    """How far a model has come; the order of members is the order of the pipeline."""

    IMPORTED = "imported"
    CANONICAL = "canonical"
    ASSIGNED = "assigned"
    QDQ = "qdq"
    LOWERED = "lowered"

    @property
    def rank(self) -> int:
        """Position in the pipeline, from 0."""
        return list(Stage).index(self)
