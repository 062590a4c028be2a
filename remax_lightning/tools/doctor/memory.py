"""Whether the run fits into the available memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from remax_lightning.errors import UserError
from remax_lightning.modules import ReMaxModule
from remax_lightning.tools.doctor.context import DoctorContext, Finding, NotApplicable
from remax_lightning.tools.plan.command import GB, choose_checkpointing, device_memory, plan
from remax_lightning.tools.plan.model_sizes import measure
from remax_lightning.tools.plan.phases import HEADROOM
from remax_lightning.tools.plan.run_config import read_run

CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")
"""File with the memory limit of a container."""


def check_memory(context: DoctorContext) -> Finding:
    """Compare the peak of `remax plan` with the memory of a GPU, or of the host if the run uses the CPU."""
    if not isinstance(context.module, ReMaxModule):
        return _check_without_activations(context)
    try:
        # ---- The peak of `remax plan`, per process on a CPU and per GPU otherwise ----
        run = read_run(context.args)
        on_cpu = run.device == "cpu"
        available = host_memory() if on_cpu else device_memory()
        per_device = None if available is None else available / run.strategy.devices if on_cpu else available
        with torch.enable_grad():  # the planner traces a backward pass
            _, sizes = choose_checkpointing(run, per_device)
            answer = plan(run, sizes or measure(run), per_device)
    except UserError as error:
        return Finding("warn", f"cannot be planned: {error}", "see `remax plan`; no other check depends on this one")
    unit = "process" if on_cpu else "GPU"
    needed = f"{answer['peak'] / GB:.3g} GB per {unit} on {run.strategy.devices}"
    values = {"peak": float(answer["peak"])}
    if per_device is None:
        raise NotApplicable(f"{needed}, and this machine has no GPU to compare with; see `remax plan --memory GB`")
    measured = f"{needed}, of {(1 - HEADROOM) * per_device / GB:.3g} usable"
    values["memory"] = per_device
    if answer["fits"]:
        return Finding("pass", measured, "", values)
    least = answer["least_devices"]
    fix = (
        "lower data.batch_size or micro_batch_size, shorten responses, set gradient_checkpointing or"
        f" model.policy.lora, or take an overlay of configs/strategies; `remax plan` shows the parts"
        f"{'' if least is None else f' (unchanged, it fits on {least})'}"
    )
    return Finding("fail", measured, fix, values)


def _check_without_activations(context: DoctorContext) -> Finding:
    """Compare the bytes of weights, gradients and optimizer with the memory; activations come on top."""
    if not context.module._modules:
        raise NotApplicable("needs models")
    model = context.module.trained_model
    # An optimizer over one number shows whether it keeps moments.
    optimizer = context.module.optimizer([torch.nn.Parameter(torch.zeros(1))])
    moments = 2 if "betas" in optimizer.defaults else 0
    trained = sum(
        parameter.numel() * parameter.element_size() for parameter in model.parameters() if parameter.requires_grad
    )
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    needed = weights + trained * (1 + moments)  # a gradient, and moments of the same size
    on_cpu = context.trainer.strategy.root_device.type == "cpu"
    available = host_memory() if on_cpu else device_memory()
    measured = f"weights, gradients and the optimizer take {needed / GB:.3g} GB without activations"
    values = {"least": float(needed)}
    if context.note:
        raise NotApplicable(f"{measured}, and this machine has no GPU to compare with")
    if context.is_spread:
        raise NotApplicable(f"{measured} in one process, and trainer.strategy spreads them over the devices")
    if available is None:
        raise NotApplicable(f"{measured}, and the memory of this machine is unknown")
    measured += f", of {(1 - HEADROOM) * available / GB:.3g} usable"
    if needed <= (1 - HEADROOM) * available:
        return Finding("pass", measured, "", values)
    fix = "train in bf16-true, or shard the model over devices with an overlay of configs/strategies"
    return Finding("fail", measured, fix, values)


def host_memory() -> float | None:
    """Return the bytes of host memory that this process may use; None if the system does not say."""
    names: Any = os.sysconf_names
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(names):
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # "max" without a limit, else bytes
    limit = CONTROL_GROUP.read_text().strip() if CONTROL_GROUP.is_file() else ""
    return float(min(total, int(limit)) if limit.isdecimal() else total)
