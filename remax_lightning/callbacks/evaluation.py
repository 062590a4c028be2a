"""Writes the results of `remax test`: figures with intervals as a table and as JSON, and the records behind them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.utilities import _reset_progress
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng

from remax_lightning.callbacks.monitors import check_monitored, is_dry_run, rollout_output
from remax_lightning.config import EvalConfig
from remax_lightning.distributed import broadcast, gather_objects
from remax_lightning.errors import UserError, at_least, check_ranges
from remax_lightning.evaluation.evaluator import Evaluator, answer_function
from remax_lightning.evaluation.intervals import (
    CONFIDENCE,
    Figure,
    figures,
    format_interval,
    format_number,
    format_table,
    intervals_are,
    meaning_of,
)
from remax_lightning.files import PromptRecord, describe_disk_error, home_path, tolerate_disk_errors
from remax_lightning.loggers import logger_adapters, run_config
from remax_lightning.run_folder import run_folder

Measure = Literal["win_rate_reference", "win_rate_chosen", "perplexity"]
MEASURES: tuple[Measure, ...] = ("win_rate_reference", "win_rate_chosen", "perplexity")
MAX_RESAMPLES = 10**6


class Evaluation(Callback):
    """Evaluates a policy: rewards, win rates, KL, entropy, lengths and perplexities, each with a 95 % interval.

    `remax test` prints a table, logs it where a logger has tables, and writes `evaluation.json` and `evaluation.jsonl`,
    which has one record per prompt for `remax compare`. Intervals are exact (Clopper-Pearson) for shares, win rates and
    rewards of two values, and from a bootstrap over prompts otherwise. Three measures need more than the responses of
    the policy: `win_rate_reference` (the reference answers the prompts too), `win_rate_chosen` (the reward scores the
    data set's responses) and `perplexity` (passes of policy and reference over held-out text).

    Args:
        path: the JSON file; by default `evaluation.json` in the run's folder, numbered if that exists. A file that is
            set here must not exist.
        test: the extra measures of `remax test`; None takes all of the three that are possible.
        validation: the extra measures of validation. None by default, because each costs time.
        at_start: whether fit also evaluates before its first optimizer step, so that the curves start with the policy
            as it was: `val/*` at step 0. Nothing happens without validation data, in a `fast_dev_run` and when a run is
            resumed; training draws the same random numbers either way. Lightning's sanity check, which would run the
            first of the same batches once more, is left out then.
        response_column: column of the data set's response: text, or messages that end with it. Rows without a response
            are left out of these figures.
        text: a text file for the perplexity, instead of the data set's responses.
        max_length: tokens per pass over held-out text: responses are truncated to it, a text file is split into
            pieces of it.
        num_samples: sampled responses per prompt in `remax test`; None takes `model.sampling.num_samples`. All of them
            and the greedy ones are generated at once, so lower `data.batch_size` as far as this is higher.
        pass_at_k: for each number `k`, how often at least one of `k` responses passes (arXiv 2107.03374), over all
            subsets of `num_samples` responses. In `remax test`, as the next two.
        maj_at_k: for each number `k`, how often the most frequent answer of `k` responses passes (self-consistency,
            arXiv 2203.11171), over the disjoint groups of `k` responses; answers that are equally frequent share it.
        best_of_k: for each number `k`, the highest reward of `k` responses, over all subsets.
        pass_threshold: the least reward of a response that passes; 1.0, because verifiers pay 1 for a right answer.
        answer: dotted path of a function that returns the answer of a response for `maj_at_k`, as text or a number, or
            None for no vote. By default the formula or number that `math_answer` reads, else the last line.
        num_resamples: resamples of the bootstrap.
        seed: seed of the bootstrap. `seed_everything` is the seed of the responses.

    Raises:
        UserError: if a value is out of its range, the file exists, or a requested measure is not possible.
    """

    def __init__(
        self,
        path: str | None = None,
        test: tuple[Measure, ...] | None = None,
        validation: tuple[Measure, ...] = (),
        at_start: bool = True,
        response_column: str = "chosen",
        text: str | None = None,
        max_length: Annotated[int, at_least(1)] = 1024,
        num_samples: Annotated[int | None, at_least(1)] = None,
        pass_at_k: Annotated[tuple[int, ...], at_least(1)] = (),
        maj_at_k: Annotated[tuple[int, ...], at_least(1)] = (),
        best_of_k: Annotated[tuple[int, ...], at_least(1)] = (),
        pass_threshold: float = 1.0,
        answer: str | None = None,
        num_resamples: Annotated[int, at_least(1, at_most=MAX_RESAMPLES)] = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_ranges(Evaluation.__init__, locals(), "evaluation")
        for key, holds, expected, got in (
            ("path", path is None or path.endswith(".json"), "null or a name that ends in .json", path),
            ("test", set(test or ()) <= set(MEASURES), f"null or some of {', '.join(MEASURES)}", test),
            ("validation", set(validation) <= set(MEASURES), f"some of {', '.join(MEASURES)}", validation),
            ("pass_threshold", math.isfinite(pass_threshold), "a finite number", pass_threshold),
        ):
            if not holds:
                raise UserError(f"evaluation.{key} must be {expected}, got {got!r}")
        # ---- Options ----
        self.path, self.test, self.validation, self.at_start = path, test, validation, at_start
        self.response_column, self.text, self.max_length = response_column, text, max_length
        self.num_resamples, self.seed = num_resamples, seed
        self.repeated = {
            "num_samples": num_samples,
            "pass_at_k": tuple(pass_at_k),
            "maj_at_k": tuple(maj_at_k),
            "best_of_k": tuple(best_of_k),
            "pass_threshold": pass_threshold,
            "answer": answer,
        }
        """The settings of figures that are made of several responses to a prompt."""
        # ---- State of one evaluation ----
        self._target: Path | None = None
        self._text = ""
        self._requested: tuple[Measure, ...] | None = None  # None: all that are possible
        self._active = self._prints = self._needs_responses = False
        self._records: list[PromptRecord] = []

    # ---- Before the evaluation ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the text file and choose the output file, before models are loaded."""
        if stage == "fit" and self.at_start:
            trainer.num_sanity_val_steps = 0
        self._active = isinstance(getattr(pl_module, "evaluator", None), Evaluator)
        if not self._active:
            return
        if self.text is not None:
            self._text = _read_text(self.text)
        self._target = self._find_target(trainer) if stage == "test" else None

    def _find_target(self, trainer: Trainer) -> Path | None:
        if is_dry_run(trainer):
            return None
        if self.path is None:
            folder = run_folder(trainer)
            # The first of evaluation.json, evaluation_1.json, ... that is free, with the .jsonl beside it.
            names = ("evaluation.json", *(f"evaluation_{count}.json" for count in range(1, 10_000)))
            targets = [folder / name for name in names]
        else:
            targets = [Path(home_path(self.path))]
        free = next((path for path in targets if not path.exists() and not _records_file(path).exists()), None)
        free = broadcast(trainer.strategy, free)  # rank 0 writes the file
        if free is None:
            raise UserError(
                f"evaluation.path must be a file that does not exist yet, got {self.path}, which exists or has an"
                f" {_records_file(targets[0]).name} beside it; move it away or give another path"
            )
        if trainer.is_global_zero:
            try:
                free.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"evaluation.path: cannot create the folder {free.parent} ({error})") from error
        return free

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate before the first optimizer step: here, when all callbacks and the module have started to train."""
        starts = trainer.global_step == 0 and trainer.current_epoch == 0
        if self.at_start and starts and trainer.enable_validation and not is_dry_run(trainer):
            run_validation(trainer)
            check_monitored(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the module what to measure."""
        self._configure_evaluator(pl_module, self.validation, "validation")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the module what to measure, and turn off Lightning's table."""
        self._configure_evaluator(pl_module, self.test, "test")
        if self._active:
            self._configure_repeated(cast("Any", pl_module))
            self._prints, trainer.test_loop.verbose = trainer.test_loop.verbose, False

    def _configure_evaluator(
        self, pl_module: LightningModule, requested: tuple[Measure, ...] | None, stage: str
    ) -> None:
        if not self._active:
            return
        module = cast("Any", pl_module)
        if "win_rate_reference" in (requested or ()) and module.reference is None:
            raise UserError(
                f"evaluation.{stage} has win_rate_reference, but there is no model.reference; set it or remove the"
                " measure"
            )
        self._records, self._requested = [], requested
        # ---- What is measured; the perplexity of a text file is measured once, at the end ----
        wanted: dict[str, Any] = {name: True for name in MEASURES if requested is None or name in requested}
        wanted["perplexity"] = "perplexity" in wanted and self.text is None
        # Explicitly requested: if the first batch has no responses, stop at once and not after hours.
        explicit = requested is not None or self.response_column != "chosen"
        self._needs_responses = explicit and (wanted["perplexity"] or "win_rate_chosen" in wanted)
        module.evaluator.config = EvalConfig(**wanted, response_column=self.response_column, max_length=self.max_length)

    def _configure_repeated(self, module: Any) -> None:
        """Tell the module how many responses to draw, and which figures to make of them.

        Raises:
            UserError: if a figure needs more of them, or there is no function at `evaluation.answer`.
        """
        config = module.evaluator.config = replace(module.evaluator.config, **self.repeated)
        answer_function(config.answer)
        count = module.sampling.num_samples if config.num_samples is None else config.num_samples
        for name in ("pass_at_k", "maj_at_k", "best_of_k"):
            if (k := max(getattr(config, name), default=1)) > count:
                raise UserError(
                    f"evaluation.{name}: {k} responses per prompt are needed, got {count}; set evaluation.num_samples"
                    f" to {k} or more"
                )

    # ---- During the evaluation ----

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Check that the first batch has the requested responses."""
        self._checked_records(outputs, batch_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the records of the batch."""
        self._records += self._checked_records(outputs, batch_idx)

    def _checked_records(self, outputs: Any, batch_idx: int) -> list[PromptRecord]:
        output = rollout_output(outputs)
        if not self._active or output is None:
            return []
        records = output.get("records", [])
        if batch_idx == 0 and self._needs_responses:
            self._check_responses(records, output["rollout"].prompt.rows)
        return records

    def _check_responses(self, records: Sequence[PromptRecord], rows: Sequence[dict[str, Any]]) -> None:
        if any("chosen" in record.responses or "perplexity" in record.sums for record in records):
            return
        columns = ", ".join(map(repr, rows[0])) or "none"
        raise UserError(
            f"evaluation.response_column: no row of the first batch has a response in column {self.response_column!r};"
            f" the columns are {columns}"
        )

    # ---- After the evaluation ----

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the perplexity of the text."""
        self._log_text_perplexity(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the perplexity of the text; print the table and write the files."""
        pieces = self._log_text_perplexity(trainer, pl_module, "test")
        records = gather_records(self._records)
        self._records = []
        if not records or not trainer.is_global_zero:
            return
        # ---- Figures with intervals, and the measures that were not possible ----
        measured = figures(records, self.num_resamples, self.seed) | figures(pieces, self.num_resamples, self.seed)
        left_out = self._missing_measures(measured, cast("Any", pl_module))
        table = [[name, *figure._asdict().values()] for name, figure in measured.items()]
        for adapter in logger_adapters(trainer):
            with tolerate_disk_errors(run_folder(trainer), set(), "The table is in the files of the evaluation."):
                adapter.log_table("evaluation", ["figure", *Figure._fields], table, trainer.global_step)
        # ---- Table ----
        if self._prints:
            _print_table(trainer.ckpt_path, len(records), measured, left_out, self.num_resamples)
        # ---- Files ----
        if self._target is not None:
            answer = {
                "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
                "num_prompts": len(records),
                "figures": {name: figure._asdict() for name, figure in measured.items()},
                "left_out": left_out,
                "settings": self._settings(trainer, cast("Any", pl_module)),
            }
            _write_files(self._target, answer, [*records, *pieces])
            rank_zero_info(f"Wrote {self._target} and {_records_file(self._target)}.")

    def _log_text_perplexity(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> list[PromptRecord]:
        wanted = self._active and (self._requested is None or "perplexity" in self._requested)
        if not wanted or self.text is None or trainer.sanity_checking:
            return []
        pieces = gather_records(cast("Any", pl_module).evaluator.text_records(self._text))
        for name, figure in figures(pieces, 1, self.seed).items():
            if figure.value is not None:
                pl_module.log(f"{stage}/{name}", figure.value)  # the same on every rank already
        return pieces

    def _missing_measures(self, measured: dict[str, Figure], module: Any) -> dict[str, str]:
        requested = MEASURES if self._requested is None else self._requested
        missing = [name for name in requested if name not in measured]
        no_rows = f"no row has a response in column {self.response_column!r} (evaluation.response_column)"
        why = {"win_rate_reference": "there is no model.reference"}
        return {name: why.get(name, no_rows) for name in missing}

    def _settings(self, trainer: Trainer, module: Any) -> dict[str, Any]:
        """Return the settings that the figures depend on; the command line adds the arguments of the reward."""
        # ---- Of module and callback ----
        options = {
            name: getattr(self, name) for name in ("response_column", "text", "max_length", "num_resamples", "seed")
        } | self.repeated
        reference = None if module.reference_source is None else module.reference_source.path
        settings: dict[str, Any] = module.evaluator.settings(module.policy_source.path, reference)
        settings["evaluation"] = {**options, "confidence": CONFIDENCE}
        # ---- As the user has set them, which only the command line knows ----
        config = run_config(trainer)
        if config is not None:
            arguments = config["model"].get("init_args", config["model"])
            settings |= {"data": config["data"], "seed_everything": config.get("seed_everything")}
            settings["reward"] = arguments.get("reward", settings["reward"])
        return settings


def run_validation(trainer: Trainer) -> None:
    """Run validation inside fit, before the first batch; training goes on as if there had been none.

    Raises:
        SIGTERMException: if the run was told to end meanwhile.
    """
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    first_iteration = connector._first_loop_iter
    with isolate_rng():  # training draws the same random numbers with and without it
        trainer.validating = True
        loop.run()
        trainer.training = True
    connector._first_loop_iter = first_iteration
    _reset_progress(loop)  # as Lightning does after its sanity check: a checkpoint holds no trace of it
    if trainer.received_sigterm:
        raise SIGTERMException


def gather_records(local: Sequence[PromptRecord]) -> list[PromptRecord]:
    """Return the records of all ranks in the order of the data set, without repeated rows."""
    all_records = [record for part in gather_objects(list(local)) for record in part]
    # Ranks repeat rows so that all have equally many batches: each number counts once.
    known: dict[int, PromptRecord] = {}
    for record in all_records:
        if record.number is not None:
            known.setdefault(record.number, record)
    return [*(known[prompt] for prompt in sorted(known)), *(record for record in all_records if record.number is None)]


def _read_text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluation.text must be a text file in UTF-8, got {path!r}: {error}") from error
    if not text.strip():
        raise UserError(f"evaluation.text: {path!r} is empty; give a file with text, or leave the key out")
    return text


def _records_file(path: Path) -> Path:
    return path.with_suffix(".jsonl")


def _print_table(
    checkpoint: Any, num_prompts: int, measured: dict[str, Figure], left_out: dict[str, str], num_resamples: int
) -> None:
    rows = [("", "value", f"{CONFIDENCE:.0%} interval", "n", "")]
    rows += [(name, format_number(figure.value), format_interval(figure), str(figure.n), meaning_of(name))
             for name, figure in measured.items()]  # fmt: skip
    what = "the loaded policy" if checkpoint is None else checkpoint
    notes = [f"Left out: {name}, because {why}." for name, why in left_out.items()]
    heading = f"Evaluation of {what} on {num_prompts} prompts; {intervals_are(num_resamples)}."
    print("\n".join(["", heading, "", format_table(rows), "", *notes]))  # noqa: T201


def _write_files(path: Path, answer: dict[str, Any], records: Sequence[PromptRecord]) -> None:
    """Write the records first, so that an existing JSON file means that both are complete."""
    lines = (json.dumps(record._asdict(), ensure_ascii=False) + "\n" for record in records)
    try:
        for file, text in (
            (_records_file(path), "".join(lines)),
            (path, json.dumps(answer, ensure_ascii=False, indent=2, default=str) + "\n"),
        ):
            new = file.with_name(f".{file.name}.new")
            # A lone surrogate (half an emoji in the data set) cannot be encoded; \udXXX is valid JSON.
            new.write_text(text, encoding="utf-8", errors="backslashreplace")
            new.replace(file)
    except OSError as error:
        raise UserError(
            f"evaluation.path: {describe_disk_error(error, path)}. The table above shows the figures"
        ) from error
