"""`auto`: which baseline it takes on streams of made rollouts, that a step stays unbiased, and how a run feeds it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from io import BytesIO
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.ranks import launch
from helpers.training import CharacterReward, fit, prompt_data, remax_module, save_policy
from torch import Tensor

from remax_lightning.baselines import Auto, Baseline, BaselineInputs, Measurement, comparison
from remax_lightning.baselines import auto as auto_module
from remax_lightning.config import AdvantageConfig, LossConfig, SamplingConfig, config_from_dict
from remax_lightning.errors import UserError
from remax_lightning.modules import ReMaxModule
from remax_lightning.training import metrics
from remax_lightning.training.metrics import TrainingMeter

PROMPTS = 32


class Stream:
    """Rollouts whose sampled and greedy rewards have a correlation that may change, and steps that take seconds."""

    def __init__(self, agreement: Callable[[int], float], added_seconds: float = 0.25, seed: int = 0) -> None:
        self.agreement, self.added_seconds, self.seed = agreement, added_seconds, seed
        self.offset = 0.0

    def inputs(self, number: int, *, greedy: bool) -> BaselineInputs:
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        greedy_reward, noise = torch.randn(2, PROMPTS, generator=generator, dtype=torch.float64)
        share = self.agreement(number)
        reward = share * greedy_reward + (1 - share**2) ** 0.5 * noise
        reward, greedy_reward = reward + self.offset, greedy_reward + self.offset
        return BaselineInputs(reward, 1, greedy_reward if greedy else None, torch.ones_like(reward), [*range(PROMPTS)])

    def feed(self, auto: Auto, start: int, stop: int) -> list[tuple[bool, str, str | None]]:
        """Whether each rollout had greedy responses, the choice it was valued by, and what was logged after it."""
        seen = []
        for number in range(start, stop):
            greedy = auto.needs_greedy([*range(PROMPTS)])
            inputs, chosen = self.inputs(number, greedy=greedy), auto.chosen
            assert auto.values(inputs).shape == (PROMPTS,)
            auto.observe(inputs)
            seen.append((greedy, chosen, self.train(auto, number, greedy)))
        return seen

    def train(self, auto: Auto, number: int, greedy: bool) -> str | None:
        generator = torch.Generator().manual_seed(number)
        norms = 1 + torch.rand(PROMPTS, generator=generator, dtype=torch.float64)
        slow = 30.0 if number == 5 else 0.0  # a checkpoint, say
        measured = auto.needs_norms(is_free=True)
        return auto.observe_training(
            Measurement(norms if measured else None, 1 + self.added_seconds * greedy, 1 + slow)
        )


def test_it_moves_to_what_is_clearly_cheaper() -> None:
    auto = Auto(["greedy", "batch_mean", "none"])
    seen = Stream(lambda _: 0.0).feed(auto, 0, 16)
    assert seen[0][1] == "greedy"
    lines = [line for _, _, line in seen if line is not None]
    # Var(r - g) is twice Var(r), and greedy responses take 0.25 of 2.25 seconds: 1 / 2 * 2 / 2.25
    assert lines[0].startswith("model.advantage.baseline auto: from greedy to ")
    assert 0.3 < float(lines[0].split("needs at most ")[1].split()[0]) < 0.7
    assert auto.chosen in ("batch_mean", "none")
    # At the first look: no seconds of a rollout without greedy responses were known, nor any were needed.
    assert [line is not None for _, _, line in seen[:2]] == [False, True]
    assert [number for number, (greedy, _, _) in enumerate(seen) if greedy] == [0, 1, 15]


def test_the_first_looks_ask_for_more_than_later_ones() -> None:
    """A stream that is clear by a 95 % interval after two rollouts, and not by one of 99 %."""
    for seed in range(40):
        auto = Auto(["greedy", "none"])
        Stream(lambda _: 0.25, seed=seed).feed(auto, 0, 2)
        looked = (auto.comparison.figures("greedy", confidence)["none"].variance for confidence in (0.95, 0.99))
        if [ends[2] < 1 for ends in looked] == [True, False]:
            break
    else:
        pytest.fail("no stream lies between the two intervals")
    assert auto.chosen == "greedy"


def test_a_choice_needs_prompts_enough() -> None:
    """Of two prompts a rollout, all draws are on one side by chance too often."""
    auto, reward = Auto(["greedy", "none"], greedy_price=9.0), torch.tensor([0.5, 1.0]).double()
    lines = []
    for _ in range(16):
        auto.observe(BaselineInputs(reward, 1, torch.tensor([-1.0, -1.0]).double(), torch.ones(2), [0, 1]))
        lines.append(auto.observe_training(Measurement(torch.ones(2).double(), 1.0, 1.0)))
    # 16 groups of prompts, of 8 rollouts
    assert [number for number, line in enumerate(lines) if line is not None] == [7]


def test_a_baseline_that_nothing_differs_from_is_not_taken_for_the_best() -> None:
    """Of a policy that is nearly always right, the rare wrong responses may be missing from a window."""
    auto, reward = Auto(["greedy", "none"], greedy_price=0.0), torch.ones(PROMPTS).double()
    auto.chosen = "none"
    for _ in range(16):
        auto.observe(BaselineInputs(reward, 1, reward, torch.ones(PROMPTS), [*range(PROMPTS)]))
        assert auto.observe_training(Measurement(reward, 1.0, 1.0)) is None
    assert auto.figures["greedy"].variance[2] == 0.0
    assert auto.figures["greedy"].cost is None


def test_baselines_without_greedy_responses_are_compared_on_every_rollout() -> None:
    """Rewards move away from 0, where `none` is as good as `batch_mean`, and no rollout has greedy responses then."""
    auto, stream = Auto(["greedy", "batch_mean", "none"]), Stream(lambda _: 0.0)
    stream.feed(auto, 0, 2)
    auto.chosen = "none"
    stream.offset = 2.0
    lines = [line for _, _, line in stream.feed(auto, 2, 8) if line is not None]
    assert [line.split("0.")[0].split("auto: ")[1] for line in lines] == ["from none to batch_mean, which needs "]
    figures = auto.comparison.figures("batch_mean")
    assert (figures["none"].num_groups, figures["greedy"].num_groups) == (8 * 8, 2 * 8)
    sums = [row.sums for row in auto.comparison._moments]
    for name, rows in (("none", sums), ("greedy", sums[:2])):
        expected = sum(row[name].sum() for row in rows) / sum(row["batch_mean"].sum() for row in rows)
        assert figures[name].variance[0] == pytest.approx(float(expected))


def test_it_looks_once_every_few_rollouts() -> None:
    auto = Auto(["greedy", "batch_mean", "none"], window=16, compare_every=4, greedy_price=0.0)
    shown = []
    for number in range(12):
        Stream(lambda _: 0.5).feed(auto, number, number + 1)  # nothing is clear
        shown.append(auto.figures)
    assert [number for number in range(1, 12) if shown[number] is not shown[number - 1]] == [3, 7, 11]
    assert shown[-1] == auto.comparison.figures(auto.chosen)


def test_it_stays_while_nothing_is_clear() -> None:
    # Var(r - g) = 2 - 2 / 2 = Var(r), and greedy responses take no time.
    auto = Auto(["greedy", "none"])
    assert {line for _, _, line in Stream(lambda _: 0.5, 0.0).feed(auto, 0, 48)} == {None}
    assert auto.chosen == "greedy"


@pytest.mark.slow(0.3)
def test_it_goes_back_when_the_answer_turns() -> None:
    auto = Auto(["greedy", "batch_mean"])
    seen = Stream(lambda number: 0.0 if number < 24 else 0.98).feed(auto, 0, 160)
    lines = [line for _, _, line in seen if line is not None]
    assert [line.split(",")[0].split("auto: ")[1] for line in lines] == [
        "from greedy to batch_mean",
        "from batch_mean to greedy",
    ]


@pytest.mark.slow(0.3)
def test_the_price_of_greedy_responses_counts() -> None:
    """Greedy rewards take a third of the variance, and all that they save, and more, at ten times the seconds."""
    cheap, dear = (Auto(["greedy", "batch_mean"]) for _ in range(2))
    for auto, added in ((cheap, 0.01), (dear, 9.0)):
        Stream(lambda _: 0.8, added).feed(auto, 0, 48)  # one slow step among few is no clear answer
    assert (cheap.chosen, dear.chosen) == ("greedy", "batch_mean")
    fixed = Auto(["greedy", "batch_mean"], greedy_price=4.5)  # 9 seconds on 2, whatever the clock says
    Stream(lambda _: 0.8, 0.01).feed(fixed, 0, 24)
    assert fixed.chosen == "batch_mean"


@pytest.mark.slow(0.3)
def test_now_and_then_a_rollout_is_the_other_way_round() -> None:
    stay, go = Auto(["greedy", "batch_mean"]), Auto(["greedy", "batch_mean"])
    stayed = [greedy for greedy, _, _ in Stream(lambda _: 0.98).feed(stay, 0, 32)]
    gone = [greedy for greedy, _, _ in Stream(lambda _: 0.0).feed(go, 0, 48)]
    assert [number for number, greedy in enumerate(stayed) if not greedy] == [5, 7, 15, 23, 31]
    assert [number for number, greedy in enumerate(gone) if greedy and number >= 16] == [23, 31, 39, 47]
    assert go.greedy_share == 1 / 8
    assert stay.greedy_share == 7 / 8
    never = Auto(["batch_mean", "none"])  # nothing to compare with greedy responses
    assert {greedy for greedy, _, _ in Stream(lambda _: 0.0).feed(never, 0, 16)} == {False}


def test_a_measurement_that_costs_is_made_now_and_then() -> None:
    auto, stream = Auto(["greedy", "batch_mean"]), Stream(lambda _: 0.98)
    asked = []
    for number in range(32):
        greedy = auto.needs_greedy(None)
        auto.observe(stream.inputs(number, greedy=greedy))
        asked.append(auto.needs_norms(is_free=False))
        assert auto.needs_norms(is_free=True) == greedy  # without greedy rewards there is nothing to compare
        stream.train(auto, number, greedy)
    assert [number for number, asks in enumerate(asked) if asks] == [0, 1, 2, 3, 4, 6, 8, 16, 24]


def test_measurements_that_are_free_are_fewer_once_a_baseline_without_greedy_responses_is_in_use() -> None:
    auto, stream = Auto(["greedy", "batch_mean"]), Stream(lambda _: 0.0)
    asked: dict[bool, list[int]] = {True: [], False: []}
    for number in range(48):
        greedy = auto.needs_greedy(None)
        auto.observe(stream.inputs(number, greedy=greedy))
        for is_free, numbers in asked.items():
            if auto.needs_norms(is_free=is_free):
                numbers.append(number)
        stream.train(auto, number, greedy)
    assert auto.chosen == "batch_mean"
    assert asked == {True: [*range(32), 39, 47], False: [*range(8), 15, 23, 31, 39, 47]}


def saved(auto: Auto) -> dict[str, Any]:
    """Its state, as a checkpoint has it."""
    file = BytesIO()
    torch.save(auto.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def plain(state: Any) -> Any:
    """The state with lists in place of tensors, for a comparison of every bit."""
    if isinstance(state, Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {name: plain(value) for name, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, list | tuple) else state


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 13, 30])
def test_a_resumed_choice_is_the_same(at: int) -> None:
    stream = Stream(lambda number: 0.0 if number < 20 else 0.98)
    whole = Auto()
    expected = stream.feed(whole, 0, 60)
    first = Auto()
    stream.feed(first, 0, at)
    # Saved between a rollout and the end of training on it.
    greedy = first.needs_greedy([*range(PROMPTS)])
    first.observe(stream.inputs(at, greedy=greedy))
    rest = Auto()
    rest.load_state_dict(saved(first))
    line = stream.train(rest, at, greedy)
    assert [line, *(line for _, _, line in stream.feed(rest, at + 1, 60))] == [line for _, _, line in expected[at:]]
    assert plain(saved(rest)) == plain(saved(whole))
    assert rest.chosen == whole.chosen


@pytest.mark.slow
def test_every_step_is_unbiased_given_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """All draws of a step, after each draw of the step before: the choice differs, the expected gradient does not."""
    for module in (auto_module, comparison):  # so few prompts would choose nothing
        monkeypatch.setattr(module, "MIN_GROUPS", 8)
    generator = torch.Generator().manual_seed(1)
    logits, rewards = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)  # 3 prompts, 2 answers
    probs, prompts = logits.softmax(1), torch.arange(3)
    greedy_reward = rewards[prompts, logits.argmax(1)]
    (exact,) = torch.autograd.grad((logits.requires_grad_().softmax(1) * rewards).sum(1).mean(), logits)

    def inputs_of(answers: Tensor, *, greedy: bool) -> BaselineInputs:
        reward = rewards[prompts, answers]
        return BaselineInputs(reward, 1, greedy_reward if greedy else None, torch.ones(3).double(), [0, 1, 2])

    auto = Auto(["greedy", "batch_mean", "tracker"], greedy_price=0.05)
    draws = [torch.tensor(draw) for draw in product(range(2), repeat=3)]

    def step(auto: Auto, answers: Tensor) -> None:
        auto.observe(inputs_of(answers, greedy=auto.needs_greedy([0, 1, 2])))
        norms = 2 * (1 - probs[prompts, answers]).square()
        auto.observe_training(Measurement(norms if auto.needs_norms(is_free=True) else None, 1.0, 1.0))

    for number in range(7):
        step(auto, draws[(5 * number) % 8])
    choices = set()
    for earlier in draws:
        past = copy.deepcopy(auto)
        step(past, earlier)
        choices.add(past.chosen)
        for greedy in (True, False):
            expected = torch.zeros_like(probs)
            for answers in draws:
                inputs = inputs_of(answers, greedy=greedy)
                advantages = inputs.reward - copy.deepcopy(past).values(inputs)
                score = torch.nn.functional.one_hot(answers, 2) - probs  # d log pi / d logits
                expected += advantages[:, None] * score / 3 * probs[prompts, answers].prod()
            torch.testing.assert_close(expected, exact, rtol=1e-9, atol=1e-12)
    assert len(choices) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": ["greedy", "gredy"]}, "candidates must be of greedy, none, .*, once each, got 'gredy'"),
        ({"candidates": ["greedy", "group_mean"]}, "got 'group_mean'"),
        ({"candidates": ["greedy"]}, "candidates must be at least two baselines"),
        ({"compare_every": 1}, "compare_every must be at least 2"),
        ({"window": 31}, "window must be at least 4 times compare_every, 32, got 31"),
        ({"greedy_price": -0.1}, "greedy_price must be null or 0 or more, got -0.1"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Auto(**arguments)


def test_a_checkpoint_holds_its_arguments() -> None:
    config = AdvantageConfig(baseline=Auto(["greedy", "none"], window=40, greedy_price=0.2))
    restored: Any = config_from_dict(AdvantageConfig, config.as_dict()).baseline
    assert (restored.candidates, restored.window, restored.greedy_price) == (["greedy", "none"], 40, 0.2)


# In a run


class Told(Baseline):
    """Subtracts a share of the reward itself, and keeps what it is told."""

    learns_from_training = True

    def __init__(self, share: float = 0.0) -> None:
        self.share, self.told, self.free = share, [], []  # type: ignore[var-annotated]

    def values(self, inputs: BaselineInputs) -> Tensor:
        return self.share * inputs.reward

    def needs_norms(self, *, is_free: bool) -> bool:
        self.free.append(is_free)
        return True

    def observe_training(self, measurement: Measurement) -> str | None:
        self.told.append(measurement)
        return "told"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


def told(policy: str, folder: Path, baseline: Told, *, loss: Any = None, steps: int = 1, **options: Any) -> Told:
    """What a baseline learns of the first rollout of a run; another one that it stops at tells it."""
    reference, data = options.pop("reference", None), options.pop("data", {})
    chosen = {"loss": loss} if loss is not None else {}
    module = remax_module(policy, reference, advantage=AdvantageConfig(baseline=baseline), **chosen)
    fit(module, prompt_data(folder, policy, **data), folder, max_steps=steps + 1, **options)
    return module.objective.baseline


@pytest.mark.slow
def test_norms_of_all_responses_are_measured_however_they_are_trained(policy: str, tmp_path: Path) -> None:
    plain = told(policy, tmp_path, Told())  # all have an advantage
    (first,) = plain.told
    assert first.squared_norms.shape == (8,)
    assert (first.squared_norms > 0).all()
    assert first.rollout_seconds > 0
    assert first.training_seconds > 0
    assert plain.free == [False, False]
    # None has an advantage, and so none is run in training.
    (second,) = told(policy, tmp_path, Told(share=1.0)).told
    torch.testing.assert_close(second.squared_norms, first.squared_norms, rtol=1e-4, atol=1e-4)
    # In two parts of two updates, and in four of one.
    clipped = {"loss": LossConfig(kind="clipped"), "steps": 2, "data": {"micro_batch_size": 4}}
    (third,) = told(policy, tmp_path, Told(), **clipped).told
    torch.testing.assert_close(third.squared_norms[:4], first.squared_norms[:4], rtol=1e-4, atol=1e-4)
    parts = {"data": {"micro_batch_size": 2}, "accumulate_grad_batches": 4}
    (fourth,) = told(policy, tmp_path, Told(share=1.0), **parts).told
    torch.testing.assert_close(fourth.squared_norms, first.squared_norms, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("has_kl", [True, False])
def test_seconds_of_training_hold_the_reference_and_not_what_measuring_takes(
    has_kl: bool, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock.now, monotonic=time.monotonic))

    class Timed(ReMaxModule):
        """Passes that need no gradient take 100 seconds, training passes one."""

        def token_statistics(self, rollout: Any, active: Any = None, passes: Any = None, norm: bool = False) -> Any:
            clock.now += 1 if passes is None else 100
            return super().token_statistics(rollout, active, passes, norm)

    reference = save_policy(tmp_path / "reference", noise=0.02) if has_kl else None
    # Without a KL no response has an advantage, and all norms are measured apart.
    module = Timed(
        policy,
        CharacterReward(),
        reference,
        sampling=SamplingConfig(max_response_length=6),
        kl_coef=0.05 if has_kl else 0.0,
        advantage=AdvantageConfig(baseline=Told(share=1.0)),
    )
    with_reference = module.worker.with_reference

    def slow_reference(*arguments: Any) -> Any:
        clock.now += 10
        return with_reference(*arguments)

    module.worker.with_reference = slow_reference  # type: ignore[method-assign]
    fit(module, prompt_data(tmp_path, policy), tmp_path, max_steps=2)
    (first,) = module.objective.baseline.told  # type: ignore[attr-defined]
    assert first.training_seconds == (11 if has_kl else 1)


@pytest.mark.slow(0.3)
def test_responses_that_are_masked_have_no_gradient(policy: str, tmp_path: Path) -> None:
    """Of `overlong: mask`: a response at the length limit is not trained on, so that no baseline changes its part."""
    advantage = AdvantageConfig(baseline=Told(share=0.5), overlong="mask")
    module = remax_module(policy, advantage=advantage, sampling=SamplingConfig(max_response_length=3))
    recorder = fit(module, prompt_data(tmp_path, policy), tmp_path, max_steps=2)
    truncated = recorder.outputs[0]["rollout"].sampled.truncated
    assert 0 < truncated.sum() < len(truncated)
    (first,) = module.objective.baseline.told  # type: ignore[attr-defined]
    assert ((first.squared_norms > 0) == ~truncated).all()


def test_a_step_that_overflows_does_not_blind_the_comparison() -> None:
    auto, stream = Auto(["greedy", "batch_mean"], greedy_price=0.2), Stream(lambda _: 0.5)
    for number in range(16):
        auto.observe(stream.inputs(number, greedy=True))
        norms = torch.ones(PROMPTS, dtype=torch.float64)
        norms[3] = torch.nan if number == 9 else torch.inf if number == 10 else 1.0
        auto.observe_training(Measurement(norms, 1.0, 1.0))
    figure = auto.figures["batch_mean"]
    assert 0.2 < figure.variance[0] < 5
    assert figure.num_groups == 14 * 8


@pytest.mark.slow
def test_a_run_moves_logs_and_prints_its_baseline(
    policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Four times the seconds: hardly worth it.
    baseline = Auto(["greedy", "batch_mean"], window=16, compare_every=4, greedy_price=3.0)
    module = remax_module(policy, advantage=AdvantageConfig(baseline=baseline))
    with caplog.at_level("INFO"):
        recorder = fit(module, prompt_data(tmp_path, policy), tmp_path, max_steps=6)
    assert "model.advantage.baseline auto: from greedy to batch_mean, which needs 0." in caplog.text
    numbers = [logged["train/baseline"] for logged in recorder.logged]
    assert (numbers[0], numbers[-1]) == (0.0, 2.0)
    used = module.objective.baseline.chosen
    assert used == "batch_mean"


def test_the_meter_of_another_number_of_ranks_is_left() -> None:
    state = [{"norms": [torch.ones(2)], "rollout": 1.0, "training": 1.0}]
    trainer: Any = type("Trainer", (), {"global_rank": 0, "world_size": 2})()
    meter = TrainingMeter()
    meter.load_state_dict(state, trainer)
    assert meter.state_dict()[0] == {"norms": None, "rollout": None, "training": None}
    trainer.world_size = 1
    meter.load_state_dict(state, trainer)
    assert meter.state_dict()[0] == state[0]


def run_on_ranks(policy: str, folder: Path, ranks: int) -> None:
    from modules.two_ranks import own_folder

    baseline = Auto(["greedy", "batch_mean", "calibrated_greedy"], window=8, compare_every=2, greedy_price=0.5)
    module = remax_module(
        policy,
        advantage=AdvantageConfig(baseline=baseline),
        reward=CharacterReward(),
        sampling=SamplingConfig(max_response_length=6, num_samples=2),
    )
    ddp = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    own = own_folder(folder)
    recorder = fit(module, prompt_data(own, policy, batch_size=8 // ranks), folder, max_steps=8, **ddp)
    state = module.objective.baseline.state_dict()
    torch.save({"state": state, "chosen": [row["train/baseline"] for row in recorder.logged]}, own / "state.pt")


@pytest.mark.slow
def test_ranks_agree(policy: str, tmp_path: Path) -> None:
    launch(run_on_ranks, policy, tmp_path, 2)
    first, second = (torch.load(tmp_path / f"rank{rank}" / "state.pt", weights_only=True) for rank in (0, 1))
    assert plain(first) == plain(second)
    assert first["state"]["comparison"]["number"] == 8
    assert len(first["state"]["comparison"]["moments"]) > 2
    sums = next(iter(first["state"]["comparison"]["moments"][-1]["sums"].values()))
    assert len(sums) == 8  # of the prompts of both ranks
