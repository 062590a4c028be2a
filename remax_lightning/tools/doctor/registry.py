"""All checks in their order, and running them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from remax_lightning.errors import UserError
from remax_lightning.modules import ReMaxModule, RewardModelModule, SFTModule
from remax_lightning.tools.doctor import memory, policy, prompts, responses, rewards
from remax_lightning.tools.doctor.context import DoctorContext
from remax_lightning.tools.doctor.finding import Finding, NotApplicable, Status

ALIGNED, SUPERVISED, PREFERRED = ReMaxModule, SFTModule, RewardModelModule
EVERY = (ALIGNED, SUPERVISED, PREFERRED)
"""The stages, by what trains them."""


class Check(NamedTuple):
    """One question about a run.

    Args:
        name: as it is printed.
        run: answers it.
        stages: of which modules it can be asked.
        needs: checks of the loading that have to pass before.
    """

    name: str
    run: Callable[[DoctorContext], Finding]
    stages: tuple[type, ...] = (ALIGNED,)
    needs: tuple[str, ...] = ("data", "models")


class Result(NamedTuple):
    """What came of a check; see `Finding`."""

    name: str
    status: Status
    measured: str
    fix: str
    values: dict[str, float]


def data(subject: DoctorContext) -> Finding:
    """Load the data."""
    subject.load_data()
    kind, path = type(subject.data).__name__, getattr(subject.data, "path", "")
    return Finding("pass", f"{kind} reads {path or 'its rows'}")


def models(subject: DoctorContext) -> Finding:
    """Load the models and let the module check itself."""
    subject.load_models()
    model = subject.module.trained_model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype, device = str(model.dtype).removeprefix("torch."), subject.module.device
    return Finding("pass", f"{type(model).__name__}, {parameters:,} parameters in {dtype}, on {device}{subject.note}")


def reward(subject: DoctorContext) -> Finding:
    """Load the reward."""
    if subject.reward is None:
        raise NotApplicable("there is no model.reward")
    subject.load_reward()
    return Finding("pass", f"{subject.reward!r} is loaded")


CHECKS = (
    Check("data", data, EVERY, ()),
    Check("models", models, EVERY, ()),
    Check("reward", reward, (ALIGNED, SUPERVISED), ("models",)),
    Check("prompts", prompts.prompts, EVERY),
    Check("bos", prompts.bos, EVERY),
    Check("prompt_eos", prompts.prompt_eos, EVERY),
    Check("pad_token", responses.pad_token, EVERY),
    Check("prompt_padding", policy.prompt_padding, (ALIGNED, SUPERVISED)),
    Check("eos", responses.eos, (ALIGNED, SUPERVISED)),
    Check("eos_trained", responses.eos_trained, (ALIGNED, SUPERVISED)),
    Check("truncation", responses.truncation),
    Check("generation_config", responses.generation_config),
    Check("greedy", policy.greedy),
    Check("log_probs", policy.log_probs),
    Check("on_policy", policy.on_policy),
    Check("kl_at_start", policy.kl_at_start),
    Check("reward_template", rewards.reward_template, (ALIGNED,), ("data", "models", "reward")),
    Check("reward_truncation", rewards.reward_truncation, (ALIGNED,), ("data", "models", "reward")),
    Check("reward_padding", rewards.reward_padding, (ALIGNED, PREFERRED), ("data", "models", "reward")),
    Check("reward_spread", rewards.reward_spread, (ALIGNED,), ("data", "models", "reward")),
    Check("memory", memory.memory, EVERY, ()),
)
"""In the order in which they run: what later ones need is loaded first."""


def examine(subject: DoctorContext) -> Iterator[Result]:
    """Yield what comes of each check; one that raises has failed, and the others go on."""
    failed: set[str] = set()
    for check in CHECKS:
        finding = answer(check, subject, failed)
        if finding.status == "fail":
            failed.add(check.name)
        yield Result(check.name, *finding)


def answer(check: Check, subject: DoctorContext, failed: set[str]) -> Finding:
    """Return what comes of one check.

    Args:
        check: which.
        subject: the run.
        failed: names of checks that have failed before.
    """
    if not isinstance(subject.module, check.stages):
        return Finding("skip", f"does not apply to {type(subject.module).__name__}")
    lacking = [name for name in check.needs if name in failed]
    if lacking:
        return Finding("skip", f"needs {' and '.join(lacking)}")
    try:
        with torch.no_grad(), subject.trainer.precision_plugin.forward_context():
            return check.run(subject)
    except NotApplicable as reason:
        return Finding("skip", str(reason))
    except torch.OutOfMemoryError:
        fix = "a run over several devices may still fit: check it with --trainer.accelerator cpu, and see `memory`"
        return Finding("fail", "this device has not enough memory for one process with all of it", fix)
    except UserError as error:
        return Finding("fail", str(error), "correct what the message names")
    except Exception as error:
        return Finding("fail", f"{type(error).__name__}: {error}", "the check itself failed; the message is its own")
