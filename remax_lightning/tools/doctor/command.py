"""`remax doctor`: check a configuration with its real models and data before training; the list of all checks."""

from __future__ import annotations

import json
import logging
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from remax_lightning.errors import UserError
from remax_lightning.files import check_output
from remax_lightning.modules import ReMaxModule, RewardModelModule, SFTModule
from remax_lightning.rollout import VLLMEngine
from remax_lightning.tools.doctor import memory, policy, prompts, responses, rewards
from remax_lightning.tools.doctor.context import DoctorContext, Finding, NotApplicable, Status, load_context
from remax_lightning.tools.parsers import doctor_parser

REMAX, SFT, REWARD_MODEL = ReMaxModule, SFTModule, RewardModelModule
ALL_STAGES = (REMAX, SFT, REWARD_MODEL)
"""The stages of training, by their module."""


class Check(NamedTuple):
    """One check of a run.

    Args:
        name: the name that is printed.
        run: the function that checks.
        stages: modules that the check applies to.
        needs: names of the loading checks that have to pass first.
    """

    name: str
    run: Callable[[DoctorContext], Finding]
    stages: tuple[type, ...] = (REMAX,)
    needs: tuple[str, ...] = ("data", "models")


class Result(NamedTuple):
    """The result of a check; see `Finding`."""

    name: str
    status: Status
    measured: str
    fix: str
    values: dict[str, float]


def check_data(context: DoctorContext) -> Finding:
    """Load the data."""
    context.load_data()
    kind, path = type(context.data).__name__, getattr(context.data, "path", "")
    return Finding("pass", f"{kind} reads {path or 'its rows'}")


def check_models(context: DoctorContext) -> Finding:
    """Load the models and run the module's own checks."""
    context.load_models()
    model = context.module.trained_model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype, device = str(model.dtype).removeprefix("torch."), context.module.device
    # Servers of the rollouts have been asked whether they fit by now.
    engine = getattr(getattr(context.module, "worker", None), "engine", None)
    servers = "".join(f"; {server}" for server in engine.describe()) if isinstance(engine, VLLMEngine) else ""
    measured = f"{type(model).__name__}, {parameters:,} parameters in {dtype}, on {device}{context.note}{servers}"
    return Finding("pass", measured)


def check_reward(context: DoctorContext) -> Finding:
    """Load the reward."""
    if context.reward is None:
        raise NotApplicable("the run has no model.reward")
    context.load_reward()
    return Finding("pass", f"{context.reward!r} is loaded")


CHECKS = (
    # loading
    Check("data", check_data, ALL_STAGES, ()),
    Check("models", check_models, ALL_STAGES, ()),
    Check("reward", check_reward, (REMAX, SFT), ("models",)),
    # the texts and token ids that the policy reads
    Check("prompts", prompts.check_prompts, ALL_STAGES),
    Check("bos", prompts.check_bos, ALL_STAGES),
    Check("prompt_eos", prompts.check_prompt_eos, ALL_STAGES),
    # where responses end, and what of them is trained
    Check("pad_token", responses.check_pad_token, ALL_STAGES),
    Check("prompt_padding", policy.check_prompt_padding, (REMAX, SFT)),
    Check("eos", responses.check_eos, (REMAX, SFT)),
    Check("eos_trained", responses.check_eos_trained, (REMAX, SFT)),
    Check("special_tokens", responses.check_special_tokens, (REMAX, SFT)),
    Check("truncation", responses.check_truncation),
    Check("generation_config", responses.check_generation_config),
    # the same log-probs in decoding, training and reference
    Check("greedy", policy.check_greedy),
    Check("log_probs", policy.check_log_probs),
    Check("packing", policy.check_packing),
    Check("on_policy", policy.check_on_policy),
    Check("kl_at_start", policy.check_kl_at_start),
    # what the reward reads, and whether it tells responses apart
    Check("reward_template", rewards.check_reward_template, (REMAX,), ("data", "models", "reward")),
    Check("reward_truncation", rewards.check_reward_truncation, (REMAX,), ("data", "models", "reward")),
    Check("reward_padding", rewards.check_reward_padding, (REMAX, REWARD_MODEL), ("data", "models", "reward")),
    Check("reward_spread", rewards.check_reward_spread, (REMAX,), ("data", "models", "reward")),
    Check("memory", memory.check_memory, ALL_STAGES, ()),
)
"""In the order in which they run: loading comes first, because later checks need it."""


def run_checks(context: DoctorContext) -> Iterator[Result]:
    """Yield the result of each check. A check that raises has failed; the others still run."""
    failed: set[str] = set()
    for check in CHECKS:
        finding = run_check(check, context, failed)
        if finding.status == "fail":
            failed.add(check.name)
        yield Result(check.name, *finding)


def run_check(check: Check, context: DoctorContext, failed: set[str]) -> Finding:
    """Return the finding of one check.

    Args:
        check: the check.
        context: the run.
        failed: names of the checks that failed before.
    """
    # ---- Not for this stage, or something that it needs has failed ----
    if not isinstance(context.module, check.stages):
        return Finding("skip", f"does not apply to {type(context.module).__name__}")
    missing = [name for name in check.needs if name in failed]
    if missing:
        return Finding("skip", f"needs {' and '.join(missing)}")
    try:
        # ---- Run it: whatever it raises is a finding, so that the other checks still run ----
        with torch.no_grad(), context.trainer.precision_plugin.forward_context():
            return check.run(context)
    except NotApplicable as reason:
        return Finding("skip", str(reason))
    except torch.OutOfMemoryError:
        fix = "a run on several devices may still fit: use --trainer.accelerator cpu here, and see the check `memory`"
        return Finding("fail", "this device has too little memory for the whole run in one process", fix)
    except UserError as error:
        return Finding("fail", str(error), "correct what the message says")
    except Exception as error:
        return Finding(
            "fail", f"{type(error).__name__}: {error}", "this is an error inside the check, not a result of it"
        )


WIDTH = 110
"""Columns of the output."""
COLUMN = max(len(check.name) for check in CHECKS) + 2


def main(args: Sequence[str]) -> list[Result]:
    """Check what `remax fit` would do with the same arguments. Nothing is trained or written.

    Args:
        args: the arguments after `remax doctor`.

    Returns:
        The result of each check.

    Raises:
        UserError: if the configuration is wrong.
        SystemExit: with code 1 if a check failed.
    """
    # ---- Own options; the rest is that of `remax fit` ----
    options, rest = doctor_parser().parse_known_args(args)
    if options.num_prompts < 1:
        raise UserError(f"--num_prompts must be at least 1, got {options.num_prompts}")
    check_output(options.json, "--json")
    # ---- Check, and print each result at once ----
    results = []
    with quiet_lightning():
        for result in run_checks(load_context(rest, options.num_prompts)):
            print(format_result(result), flush=True)
            results.append(result)
    count = Counter(result.status for result in results)
    print(
        f"\n{len(results)} checks: {count['pass']} passed, {count['warn']} warned, {count['fail']} failed,"
        f" {count['skip']} did not apply."
    )
    # ---- Results as JSON, and the exit code ----
    if options.json is not None:
        written = {"num_prompts": options.num_prompts, "checks": [result._asdict() for result in results]}
        options.json.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if count["fail"]:
        raise SystemExit(1)
    return results


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide Lightning's messages about devices and loaders; its warnings still appear."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def format_result(result: Result) -> str:
    """Return the lines of a result: status, name, what was measured, and below it what to do."""
    # "warn  kl_at_start        0.12 nats per token, ..." and below it "-> ..." with what to do
    start, indent = f"{result.status:6}{result.name:{COLUMN}}", " " * (6 + COLUMN)
    lines = textwrap.wrap(
        result.measured, WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False
    )
    if result.fix:
        lines += textwrap.wrap(
            f"-> {result.fix}", WIDTH, initial_indent=indent, subsequent_indent=f"{indent}   ", break_on_hyphens=False
        )
    return "\n".join(lines or [start])
