"""The checks of `remax doctor`: one function per check."""

from remax_lightning.tools.doctor.command import CHECKS, Check, Result, run_checks
from remax_lightning.tools.doctor.context import DoctorContext, Finding, load_context

__all__ = ["CHECKS", "Check", "DoctorContext", "Finding", "Result", "load_context", "run_checks"]
