"""Loggers: what each of them takes beyond Lightning's interface, and a logger for trackio."""

from remax_lightning.loggers.adapters import LoggerAdapter, check_loggers, logger_adapters
from remax_lightning.loggers.hyperparameters import log_hyperparameters, run_config
from remax_lightning.loggers.trackio import TrackioLogger

__all__ = [
    "LoggerAdapter",
    "TrackioLogger",
    "check_loggers",
    "log_hyperparameters",
    "logger_adapters",
    "run_config",
]
