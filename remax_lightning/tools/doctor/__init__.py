"""The checks of `remax doctor`: one function per check."""

from remax_lightning.tools.doctor.context import DoctorContext, load_context
from remax_lightning.tools.doctor.finding import Finding
from remax_lightning.tools.doctor.registry import CHECKS, Check, Result, run_checks

__all__ = ["CHECKS", "Check", "DoctorContext", "Finding", "Result", "load_context", "run_checks"]
