"""`remax plan`: compute the memory that each device needs for a configuration, without a device or weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from remax_lightning.errors import UserError
from remax_lightning.tools.parsers import plan_parser
from remax_lightning.tools.plan.model_sizes import Sizes, measure
from remax_lightning.tools.plan.phases import (
    HEADROOM,
    PARTS,
    PHASES,
    Parts,
    least_devices,
    offloaded_bytes,
    peak_bytes,
    ppo_phases,
    remax_phases,
)
from remax_lightning.tools.plan.planned_run import PlannedRun
from remax_lightning.tools.plan.run_config import read_run
from remax_lightning.tools.plan.types import ServerBytes, Strategy

GB = 1e9


def main(args: Sequence[str]) -> dict[str, Any]:
    """Compute the memory that each device needs for `remax fit` with the same arguments.

    Args:
        args: the arguments after `remax plan`.

    Returns:
        The content of `--json`.

    Raises:
        UserError: if the configuration is wrong, or cannot be planned.
    """
    # ---- Own options; the rest is that of `remax fit` ----
    options, rest = plan_parser().parse_known_args(args)
    if options.memory is not None and options.memory <= 0:
        raise UserError(f"--memory must be above 0, got {options.memory:g}")
    # ---- Read, measure, print ----
    run, memory = read_run(rest), None if options.memory is None else options.memory * GB
    reason, sizes = choose_checkpointing(run, memory)
    run = run._replace(notes=(*run.notes, reason)) if reason else run
    answer = plan(run, sizes or measure(run), memory)
    print(json.dumps(answer) if options.json else format_plan(run, answer))
    return answer


def plan(run: PlannedRun, sizes: Sizes, memory: float | None = None) -> dict[str, Any]:
    """Return the memory of a run, in bytes per device.

    Args:
        run: the run as configured.
        sizes: sizes of its models and passes.
        memory: memory of a device; None leaves out whether the run fits.
    """
    usable = None if memory is None else (1 - HEADROOM) * memory  # bytes

    def phases_on(devices: int) -> dict[str, Parts]:
        return remax_phases(sizes, replace(run.strategy, devices=devices), usable)

    # ---- ReMax, and PPO for comparison, on the devices of the run ----
    phase_parts, ppo = phases_on(run.strategy.devices), ppo_phases(sizes, run.strategy, usable)
    offloaded = offloaded_bytes(sizes.policy, sizes.step, sizes.frozen, run.strategy)
    value_offloaded = offloaded_bytes(sizes.value, replace(sizes.step, server=None), [], run.strategy)
    answer: dict[str, Any] = {
        "devices": run.strategy.devices,
        "parameters": sizes.parameters,
        "phases": phase_parts,
        "peak": peak_bytes(phase_parts),
        "host": offloaded,
        "ppo": {"phases": ppo, "peak": peak_bytes(ppo), "host": offloaded + value_offloaded},
        "notes": list(run.notes),
    }
    # ---- Whether it fits, and on how many devices it would ----
    if usable is not None:
        least = least_devices(lambda devices: peak_bytes(phases_on(devices)), usable)
        answer |= {"memory": memory, "fits": answer["peak"] <= usable, "least_devices": least}
    if reason := _server_without_room(sizes.step.server, memory):  # more devices do not help: each has a whole copy
        answer |= {"fits": False, "least_devices": None}
        answer["notes"].append(reason)
    return answer


def _server_without_room(server: ServerBytes | None, memory: float | None) -> str:
    """Return why a server that shares the device cannot start; empty where it can, or nothing is known."""
    if server is None or server.share is None or memory is None:
        return ""
    least, taken = server.weights + server.response, server.taken(memory)
    if least <= taken:
        return ""
    return (
        f"the vLLM server takes {server.share:g} of the device's memory, {_format_gb(taken)} GB, and its weights with"
        f" the keys and values of one response are {_format_gb(least)} GB; raise --gpu-memory-utilization in"
        " model.rollout.init_args.server_args"
    )


def device_memory() -> float | None:
    """Return the bytes of the smallest GPU of this machine; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return float(min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())))


def choose_checkpointing(run: PlannedRun, memory: float | None) -> tuple[str, Sizes | None]:
    """Decide `gradient_checkpointing: auto` of the policy of `run`: off where the run then fits.

    Args:
        run: whose module is changed.
        memory: bytes of a device; None where that is not known, which leaves checkpointing on.

    Returns:
        A sentence with the reason, empty where there is nothing to decide; and the sizes of the run as it will be,
        where they were measured for that.
    """
    module = run.module
    source = module.policy_source
    if source.gradient_checkpointing != "auto":
        return "", None
    key = "model.policy.gradient_checkpointing: auto"
    module.policy_source = replace(source, gradient_checkpointing=memory is None)
    if memory is None:
        return f"{key} is true, because the memory of the device is not known", None
    usable = (1 - HEADROOM) * memory
    sizes = measure(run)
    peak = peak_bytes(remax_phases(sizes, run.strategy, usable))
    module.policy_source = replace(source, gradient_checkpointing=peak > usable)
    fits = "fits" if peak <= usable else "does not fit"
    reason = (
        f"{key} is {str(peak > usable).lower()}: without it the run needs {_format_gb(peak)} GB, which {fits} into"
        f" {_format_gb(usable)} GB of {memory / GB:.3g}"
    )
    return reason, sizes if peak <= usable else None


def format_plan(run: PlannedRun, answer: Mapping[str, Any]) -> str:
    """Return the plan as text."""
    unit = "GPU" if run.device == "gpu" else "process"
    # ---- The run, the table of its phases ----
    lines = [*_heading(run, answer, unit), "", *_format_table(answer["phases"], f"GB per {unit}"), ""]
    # ---- The peak, and what it compares with ----
    highest = max(answer["phases"], key=lambda phase: sum(answer["phases"][phase].values()))
    lines.append(f"Peak: {_format_gb(answer['peak'])} GB per {unit}, in {highest}.")
    if answer["host"]:
        lines.append(f"In the host's memory: {_format_gb(answer['host'])} GB for each {unit} of it.")
    ppo = answer["ppo"]["peak"]
    share = f"{ppo / answer['peak'] - 1:+.0%}"
    lines.append(f"PPO for the same, with a value model as large as the policy: {_format_gb(ppo)} GB ({share}).")
    if "fits" in answer:
        lines.append(_fit_summary(run.strategy, answer, unit))
    return "\n".join([*lines, *(f"Note: {note}." for note in answer["notes"])])


def _heading(run: PlannedRun, answer: Mapping[str, Any], unit: str) -> list[str]:
    work, sampling = run.work, run.work.sampling
    devices = run.strategy.devices
    return [
        (
            f"Policy {run.module.policy_source.path}: {answer['parameters'] / 1e6:,.1f} M parameters in"
            f" {str(run.policy_dtype).removeprefix('torch.')}, {_strategy_name(run.strategy)} on {devices} {unit}"
            f"{'s' if devices > 1 and unit == 'GPU' else 'es' if devices > 1 else ''}."
        ),
        (
            f"Each makes {sampling.num_samples} sampled"
            f"{' and a greedy response' if run.module.objective.needs_greedy else ''} of {sampling.max_response_length}"
            f" tokens to {work.prompts} prompts of {work.prompt_length}, and trains on {work.training_rows} at a time."
        ),
    ]


def _strategy_name(strategy: Strategy) -> str:
    name = {"single": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}.get(strategy.kind, f"ZeRO-{strategy.stage}")
    return name + (" with offload" if strategy.offload_optimizer or strategy.offload_parameters else "")


def _format_table(phase_parts: Mapping[str, Parts], title: str) -> list[str]:
    # Parts that no phase has are left out.
    shown = [name for name in PARTS if any(phase_parts[phase].get(name) for phase in PHASES)]
    width = max(len(title), *map(len, shown)) + 2
    rows = [f"{title:{width}}" + "".join(f"{phase:>10}" for phase in PHASES)]
    rows += [
        f"{name:{width}}" + "".join(f"{_format_gb(phase_parts[phase].get(name, 0)):>10}" for phase in PHASES)
        for name in shown
    ]
    total = "".join(f"{_format_gb(sum(phase_parts[phase].values())):>10}" for phase in PHASES)
    return [*rows, f"{'total':{width}}{total}"]


def _fit_summary(strategy: Strategy, answer: Mapping[str, Any], unit: str) -> str:
    fits, least = answer["fits"], answer["least_devices"]
    usable = (1 - HEADROOM) * answer["memory"]
    start = (
        f"{'Fits' if fits else 'Does not fit'} into {answer['memory'] / GB:g} GB, of which {_format_gb(usable)} count."
    )
    if least is None:
        return f"{start} Under {_strategy_name(strategy)} it fits on no number of {unit}s."
    return f"{start} The least under {_strategy_name(strategy)}: {least} {unit}{'s' if least > 1 else ''}."


def _format_gb(number: float) -> str:
    return f"{number / GB:.3f}" if number < GB else f"{number / GB:.2f}" if number < 100 * GB else f"{number / GB:.1f}"
