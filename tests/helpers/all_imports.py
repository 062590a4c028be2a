"""All that ranks, commands and children of rewards import. See `helpers.forks`, whose process imports this module."""

from __future__ import annotations

import gc

from helpers import training  # noqa: F401
from transformers.models.opt import modeling_opt  # noqa: F401

from benchmarks.chaos.warm import import_all
from remax_lightning.rewards import timed  # noqa: F401

import_all()
gc.freeze()  # a search for garbage would copy the memory of all these objects into each fork
