"""A small stand-in for lm-eval: the calls of it that this package makes, and what they do to a model and a process."""

from __future__ import annotations

import logging
import os
import random
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

NAMES = ("arc_easy", "arc_challenge", "hellaswag", "writes_code")


class FakeTask:
    """A task with its options."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.options: dict[str, Any] = {"num_fewshot": 0 if name == "hellaswag" else None}
        self.seed: int | None = None

    def get_config(self, key: str) -> Any:
        return self.options[key]

    def set_config(self, key: str, value: Any) -> None:
        self.options[key] = value

    def set_fewshot_seed(self, seed: int) -> None:
        self.seed = seed


class FakeHarness:
    """What was asked of lm-eval; `value` of the policy is the figure of every task."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.managers: list[bool] = []
        self.failure: Exception | None = None

    def value(self, model: Any) -> float:
        return float(model.get_input_embeddings().weight[0, 0].detach())

    # ---- lm_eval.tasks ----

    def task_manager(self, include_defaults: bool = True) -> Any:
        self.managers.append(include_defaults)
        manager = ModuleType("manager")
        manager.all_tasks = list(NAMES) if include_defaults else []  # type: ignore[attr-defined]
        manager.load = self.load  # type: ignore[attr-defined]
        return manager

    def load(self, specs: list[str]) -> dict[str, Any]:
        if "arc_challenge" in specs:
            raise ConnectionError("cannot reach the hub\nsecond line")
        return {"tasks": {name.split("/")[-1]: FakeTask(name) for name in specs}, "groups": {}, "group_map": {}}

    # ---- lm_eval.models.huggingface and lm_eval ----

    def hflm(self, **arguments: Any) -> Any:
        model = arguments["pretrained"]
        model.eval()
        model.tie_weights()
        arguments["tokenizer"].pad_token = "<unk>"
        logging.getLogger("lm_eval.models").warning("many words about the model")
        return arguments

    def evaluate(self, *, lm: dict[str, Any], task_dict: dict[str, Any], **options: Any) -> dict[str, Any]:
        if self.failure is not None:
            raise self.failure
        if "writes_code" in task_dict["tasks"] and not options["confirm_run_unsafe_code"]:
            raise ValueError("Attempted to run task: writes_code which is marked as unsafe.")
        draws = [float(torch.rand(())), random.random(), float(np.random.rand())]
        model = lm["pretrained"]
        assert not model.training
        model(torch.tensor([[5, 6]], device=model.device))
        tasks = task_dict["tasks"].values()
        call = {
            **lm,
            **options,
            "draws": draws,
            "fewshot": [(task.options["num_fewshot"], task.seed) for task in tasks],
        }
        self.calls.append(call | {"environment": os.environ.get("DISABLE_MULTIPROC")})
        results = {
            name: {
                "name": name,
                "alias": name,
                "sample_len": 4,
                "acc,none": np.float64(self.value(model)),
                "acc_stderr,none": 0.25,
                "exact_match,strict-match": 0,
                "exact_match_stderr,strict-match": "N/A",
                "note,none": "no number",
            }
            for name in task_dict["tasks"]
        }
        return {"results": results, "versions": dict.fromkeys(results, 1.0), "n-shot": dict.fromkeys(results, 0)}


def install(patch: pytest.MonkeyPatch) -> FakeHarness:
    """Put the stand-in in the place of lm-eval, whether that is installed or not."""
    fake = FakeHarness()
    contents: dict[str, dict[str, Any]] = {
        "lm_eval": {"evaluate": fake.evaluate},
        "lm_eval.tasks": {"TaskManager": fake.task_manager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": fake.hflm},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(attributes)
        patch.setitem(sys.modules, name, module)
    return fake
