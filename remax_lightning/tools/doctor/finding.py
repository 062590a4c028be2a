"""The result of a check: status, what was measured, and what to do."""

from __future__ import annotations

from typing import Literal, NamedTuple

Status = Literal["pass", "warn", "fail", "skip"]
"""`skip` if a check does not apply, or needs something that could not be loaded."""


LARGE_KL = 0.5
"""KL in nats per token above which two distributions belong to different policies. Training seldom moves a policy
further."""


class Finding(NamedTuple):
    """What a check found.

    Args:
        status: `pass`, `warn`, `fail` or `skip`.
        measured: what was measured, with its figures.
        fix: what to do; empty if nothing has to be done.
        values: the figures by name, for `--json`.
    """

    status: Status
    measured: str
    fix: str = ""
    values: dict[str, float] = {}  # noqa: RUF012 (never written to)


class NotApplicable(Exception):  # noqa: N818 (nothing went wrong)
    """Raised by a check that does not apply to this run; the message says why."""


class Tolerance(NamedTuple):
    """Limits of a difference: below `rounding` a check passes, above `fault` it fails, in between it warns.

    Args:
        rounding: the largest difference that passes.
        fault: the largest that does not fail.
    """

    rounding: float
    fault: float

    def status(self, difference: float) -> Status:
        """Return the status for a difference; NaN fails."""
        if difference <= self.rounding:
            return "pass"
        return "warn" if difference <= self.fault else "fail"


def worst(findings: list[Finding]) -> Finding:
    """Combine the findings of one check: the worst status, with the texts of the findings that have it."""
    order: tuple[Status, ...] = ("fail", "warn", "pass", "skip")
    status = min((finding.status for finding in findings), key=order.index)
    worst_findings = [finding for finding in findings if finding.status == status]
    return Finding(
        status,
        "; ".join(dict.fromkeys(finding.measured for finding in worst_findings)),
        "; ".join(dict.fromkeys(finding.fix for finding in worst_findings if finding.fix)),
        {name: value for finding in findings for name, value in finding.values.items()},
    )
