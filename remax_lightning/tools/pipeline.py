"""`remax pipeline`: run all three stages on generated preferences, and evaluate the result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from remax_lightning.errors import UserError
from remax_lightning.evaluation.intervals import Figure, format_interval, format_number, format_table, mean_figure
from remax_lightning.run_folder import run_folder
from remax_lightning.tasks.dialogues import read_pairs, true_score, write_dialogue_task
from remax_lightning.tools.parsers import pipeline_parser

FOLDER = Path("runs/pipeline")
"""Folder that the configurations `pipeline*.yaml` read and write."""

HELD_OUT = FOLDER / "task" / "held_out.jsonl"
NUM_RESAMPLES = 10_000

ROWS = {
    "true score, sampled": "true_score",
    "true score, greedy": "greedy_true_score",
    "learned reward, sampled": "reward",
    "learned reward, greedy": "baseline_reward",
    "win rate over the first stage": "win_rate_reference",
    "win rate over chosen responses": "win_rate_chosen",
    "KL to it, nats per response": "kl_per_response",
    "response length, tokens": "response_length",
    "perplexity of chosen responses": "perplexity",
}
"""The rows of the table, with the names of their figures."""


def main(args: Sequence[str]) -> dict[str, Any]:
    """Write preferences, run the three stages on them, evaluate before and after, and make a report.

    Args:
        args: the arguments after `remax pipeline`.

    Returns:
        `before` and `after` with figures by name (`value`, `low`, `high`, `n`), `reward_model_accuracy` as such a
        figure, `rule_accuracy`, and `seconds` by stage.
    """
    # ---- The task ----
    options = pipeline_parser().parse_args(args)
    steps = _StageRunner([f"--seed_everything={options.seed}"])
    write_dialogue_task(FOLDER / "task")
    print(f"Wrote dialogues with preferences to {FOLDER / 'task'}.")
    # ---- Stages 1 and 2, and the reward model's accuracy ----
    steps.run("supervised", "fit", "pipeline_sft.yaml")
    steps.run("reward model", "fit", "pipeline_reward_model.yaml")
    accuracy = _reward_model_accuracy(steps)
    # ---- Stage 3: evaluate the first stage, align it, evaluate again ----
    first = ["--model.policy.path", str(FOLDER / "sft/last"), "--trainer.logger.init_args.name", "before"]
    before = _evaluate(steps, "evaluation before", first)
    aligned = run_folder(steps.run("ReMax", "fit", "pipeline.yaml"))
    last = ["--model.policy.path", str(FOLDER / "policy/last"), "--trainer.logger.init_args.name", "after"]
    after = _evaluate(steps, "evaluation after", [*last, "--evaluation.path", str(aligned / "evaluation.json")])
    # ---- Report, table and figures.json ----
    report = steps.measure_time("report", lambda: _report(aligned))
    rule = _rule_accuracy()
    print(_format_results(before, after, accuracy, rule, steps.seconds, report, aligned))
    figures = {
        "before": {name: figure._asdict() for name, figure in before.items()},
        "after": {name: figure._asdict() for name, figure in after.items()},
        "reward_model_accuracy": accuracy._asdict(),
        "rule_accuracy": rule,
        "seconds": steps.seconds | {"all": sum(steps.seconds.values())},
    }
    (FOLDER / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


class _StageRunner:
    """Runs subcommands and records the seconds of each."""

    def __init__(self, common: list[str]) -> None:
        self.common = common
        self.seconds: dict[str, float] = {}

    def run(self, name: str, subcommand: str, config: str, more: Sequence[str] = ()) -> Any:
        """Run a subcommand and return its trainer."""
        from remax_lightning.cli_run import run
        from remax_lightning.shipped_configs import config_folder

        path = config_folder() / config
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        arguments = [*self.common, *more]
        print(f"\n$ remax {subcommand} --config {shown} {' '.join(arguments)}", flush=True)
        # in this process, which has loaded PyTorch and transformers already
        trainer: Any = self.measure_time(name, lambda: run([subcommand, "--config", str(path), *arguments]).trainer)
        if trainer.interrupted:
            raise UserError("remax pipeline was interrupted")
        return trainer

    def measure_time(self, name: str, step: Callable[[], Any]) -> Any:
        """Run a step and record its seconds."""
        started = time.perf_counter()
        result = step()
        self.seconds[name] = time.perf_counter() - started
        return result


def _reward_model_accuracy(steps: _StageRunner) -> Figure:
    """Return the accuracy of the reward model on the held-out pairs."""
    more = ["--model.reward_model.path", str(FOLDER / "reward_model/best"), "--data.val_path", str(HELD_OUT)]
    more += ["--trainer.logger.init_args.name", "reward_model_test"]
    trainer = steps.run("reward model's test", "test", "pipeline_reward_model.yaml", more)
    pairs = len(read_pairs(HELD_OUT))
    # The interval is one of single outcomes; which pairs were right does not change it.
    right = round(float(trainer.callback_metrics["test/accuracy"]) * pairs)
    return mean_figure([[float(index < right)] for index in range(pairs)], NUM_RESAMPLES)


def _rule_accuracy() -> float:
    """Return how often the rule agrees with the held-out labels, the upper limit of any scorer; ties count one half."""
    pairs, num_agreed = read_pairs(HELD_OUT), 0.0
    for pair in pairs:
        chosen, rejected = true_score([pair.prompt] * 2, [pair.chosen, pair.rejected], [{}, {}])
        # 1 if the rule prefers the chosen response, 0.5 for a tie, 0 otherwise
        num_agreed += 0.5 + 0.5 * ((chosen > rejected) - (chosen < rejected))
    return num_agreed / len(pairs)


def _evaluate(steps: _StageRunner, name: str, more: Sequence[str]) -> dict[str, Figure]:
    """Evaluate a policy on the held-out prompts, and also score its responses with the rule."""
    from remax_lightning.tools.compare import read_evaluation

    trainer = steps.run(name, "test", "pipeline.yaml", ["--data.val_path", str(HELD_OUT), *more])
    # ---- Figures of `remax test` ----
    path = Path(more[-1]) if more[-2] == "--evaluation.path" else run_folder(trainer)
    evaluation = read_evaluation(path)
    figures = {name: Figure(**figure) for name, figure in evaluation.answer["figures"].items()}
    # ---- Scores by the rule, which no stage has seen ----
    for figure_name, whose in (("true_score", "sampled"), ("greedy_true_score", "greedy")):
        records = [(record.prompt, record.responses[whose]) for record in evaluation.prompts.values()]
        figures[figure_name] = mean_figure(
            [true_score([prompt] * len(texts), texts, [{}]) for prompt, texts in records], NUM_RESAMPLES
        )
    return figures


def _report(run: Path) -> Path:
    from remax_lightning.tools.report import main as report

    return report([str(run), "--out", str(FOLDER / "report.html")])


def _format_results(
    before: dict[str, Figure],
    after: dict[str, Figure],
    accuracy: Figure,
    rule: float,
    seconds: dict[str, float],
    report: Path,
    run: Path,
) -> str:
    count = before["true_score"].n
    rows: list[tuple[str, ...]] = [
        (f"on {count} held-out prompts", "before", "95 % interval", "after ReMax", "95 % interval", "")
    ]
    for label, name in ROWS.items():
        # two columns for each evaluation: value and interval
        cells = [
            cell
            for figure in (before[name], after[name])
            for cell in (format_number(figure.value), format_interval(figure))
        ]
        rows.append((label, *cells, ""))
    return "\n".join(
        [
            "",
            format_table(rows),
            "",
            f"reward model        accuracy {accuracy.value:.1%} on {accuracy.n} held-out pairs, 95 % interval"
            f" {format_interval(accuracy)}; accuracy of the hidden rule {rule:.1%}",
            f"seconds             {', '.join(f'{name} {duration:.0f}' for name, duration in seconds.items())};"
            f" {sum(seconds.values()):.0f} in all",
            f"aligned policy      {FOLDER / 'policy' / 'last'}",
            f"reward model        {FOLDER / 'reward_model' / 'best'}",
            f"run                 {run}",
            f"figures             {FOLDER / 'figures.json'}",
            f"report              {report}, for any browser",
        ]
    )
