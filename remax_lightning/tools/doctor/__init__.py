"""The checks of `remax doctor`, one function each."""

from remax_lightning.tools.doctor.context import DoctorContext, read_subject
from remax_lightning.tools.doctor.finding import Finding
from remax_lightning.tools.doctor.registry import CHECKS, Check, Result, examine

__all__ = ["CHECKS", "Check", "DoctorContext", "Finding", "Result", "examine", "read_subject"]
