"""The checks of `remax doctor`, one function each."""

from remax_lightning.tools.doctor_checks.finding import Finding
from remax_lightning.tools.doctor_checks.listed import CHECKS, Check, Result, examine
from remax_lightning.tools.doctor_checks.subject import Subject, read_subject

__all__ = ["CHECKS", "Check", "Finding", "Result", "Subject", "examine", "read_subject"]
