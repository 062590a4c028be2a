"""All that ranks, commands and children of rewards import. See `helpers.forks`, whose process imports this module."""

from __future__ import annotations

import gc

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import peft  # noqa: F401
import torch
from helpers import training  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.opt import modeling_opt  # noqa: F401

from remax_lightning import cli_run  # noqa: F401
from remax_lightning.rewards import timed  # noqa: F401

torch.set_num_threads(1)
gc.freeze()  # a search for garbage would copy the memory of all these objects into each fork
