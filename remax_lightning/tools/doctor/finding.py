"""What a check says: whether its question is answered well, what was measured, and what to do."""

from __future__ import annotations

from typing import Literal, NamedTuple

Status = Literal["pass", "warn", "fail", "skip"]
"""`skip` where a check does not apply, or lacks what could not be loaded."""


LARGE_KL = 0.5
"""Nats per token, as a KL, from which two distributions are those of two policies: trained ones seldom end further from
where they started."""


class Finding(NamedTuple):
    """What a check has found.

    Args:
        status: how it ended.
        measured: what was seen, with its figures.
        fix: what to do; empty where nothing has to be done.
        values: the figures by name, for `--json`.
    """

    status: Status
    measured: str
    fix: str = ""
    values: dict[str, float] = {}  # noqa: RUF012 (never written to)


class NotApplicable(Exception):  # noqa: N818 (nothing went wrong)
    """There is nothing to check in this run; the message says why."""


class Tolerance(NamedTuple):
    """Up to where a difference is rounding, and from where it is a fault; in between it is told.

    Args:
        rounding: the largest difference that passes.
        fault: the largest that does not fail.
    """

    rounding: float
    fault: float

    def status(self, difference: float) -> Status:
        """Return how a check of such a difference ends; NaN is a fault."""
        if difference <= self.rounding:
            return "pass"
        return "warn" if difference <= self.fault else "fail"


def worst(findings: list[Finding]) -> Finding:
    """Return one finding for several of the same check: the worst status, and what those of that status say."""
    order: tuple[Status, ...] = ("fail", "warn", "pass", "skip")
    status = min((finding.status for finding in findings), key=order.index)
    said = [finding for finding in findings if finding.status == status]
    return Finding(
        status,
        "; ".join(dict.fromkeys(finding.measured for finding in said)),
        "; ".join(dict.fromkeys(finding.fix for finding in said if finding.fix)),
        {name: value for finding in findings for name, value in finding.values.items()},
    )
