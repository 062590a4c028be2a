"""Responses for people to read, one JSON object per line: samples of training, and what `remax predict` made."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from remax_lightning.callbacks.monitors import (
    is_dry_run,
    response_advantage,
    response_baseline,
    response_kl,
    response_length,
    response_reward,
    rollout_output,
)
from remax_lightning.data.tokenizers import special_ids
from remax_lightning.distributed import gather_objects, max_over_ranks, sum_over_ranks
from remax_lightning.errors import UserError, at_least, check_ranges
from remax_lightning.files import (
    append_lines,
    describe_disk_error,
    home_path,
    load_json,
    tolerate_disk_errors,
    write_json,
)
from remax_lightning.loggers import logger_adapters
from remax_lightning.run_folder import run_folder
from remax_lightning.types import StepOutput

# ---- Samples of training, token by token: JSONL, and tables or texts in every logger ----


def token_texts(tokenizer: Any, ids: Sequence[int], text: str, context: Sequence[int] = ()) -> list[str]:
    """Return one string per token; together they are `text`.

    A character of several tokens, as byte-level tokenizers make them, stands at the last of these and the ones before
    it are empty, like special tokens that the text leaves out.

    Args:
        tokenizer: the tokenizer that decoded the text.
        ids: the response's tokens, `[R]`.
        text: the response, as `response_texts` gives it.
        context: the last few tokens of its prompt.
    """
    special = special_ids(tokenizer)
    tokens, pieces = list(context), [""] * len(ids)
    written, start, stop = 0, 0, len(tokens)  # characters dealt out; tokens from `start` to `stop` are the context
    for i, token in enumerate(ids):
        if token in special and not text.startswith(tokenizer.decode([token], skip_special_tokens=False), written):
            continue  # the text leaves it out
        tokens.append(token)
        # Some tokenizers decode a token otherwise at the start of a text, so what wrote the last piece comes along. The
        # whole beginning instead would make the time quadratic in the length.
        before = len(tokenizer.decode(tokens[start:stop], skip_special_tokens=False))
        piece = tokenizer.decode(tokens[start:], skip_special_tokens=False)[before:]
        if piece and text.startswith(piece, written):  # half a character is none of the text's
            pieces[i] = piece
            written, start, stop = written + len(piece), stop, len(tokens)
    if pieces:
        pieces[-1] += text[written:]
    return pieces


Stage = Literal["train", "validation"]
# columns of the table in TensorBoard
_COLUMNS = (
    "prompt",
    "response",
    "greedy_response",
    "reward",
    "baseline_reward",
    "advantage",
    "kl",
    "response_length",
)


CONTEXT_TOKENS = 16
"""Tokens of the prompt behind which the tokens of a response are read."""


class SampleDump(Callback):
    """Writes a few sampled responses with their scores, at every k-th optimizer step and at each validation.

    One JSON object per line in `train.jsonl` and `validation.jsonl`, with the keys `step` (optimizer steps
    done), `stage`, `prompt`, `response`, `greedy_response`, `reward`, `baseline_reward`, `advantage` (mean
    over the response's tokens), `kl` (nats per response), `response_length` (tokens), `truncated`, `parts`
    (of the reward), and one entry per token of the response in `tokens` (its text; the concatenation is
    `response`), `token_kl` (nats) and `token_advantages`, with six digits. Missing and non-finite values are null.
    Loggers show the same without the tokens: a table in those with tables, in TensorBoard one text per sample.

    Files are appended to. A resumed run first removes the lines of steps that it will repeat. The samples are
    those of rank 0.

    Args:
        every_n_steps: optimizer steps between dumps in training; 0 turns them off.
        num_samples: sampled responses per dump: the first ones of the step or of the validation.
        folder: folder of the files; `samples` in the run's folder by default. Use another one for each run.

    Raises:
        UserError: if a value is out of its range.
    """

    folder_key = "samples.folder"

    def __init__(
        self,
        every_n_steps: Annotated[int, at_least(0, zero="off")] = 50,
        num_samples: Annotated[int, at_least(1)] = 8,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        check_ranges(SampleDump.__init__, locals(), "samples")
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.folder = folder
        self._directory: Path | None = None
        self._samples: dict[Stage, list[dict[str, Any]]] = {"train": [], "validation": []}
        self._resumed = False
        self._warned: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder. Every rank has to call this, because rank 0 broadcasts the folder."""
        folder = Path(home_path(self.folder)) if self.folder is not None else run_folder(trainer) / "samples"
        self._directory = None if is_dry_run(trainer) else folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the lines of steps that will be repeated."""
        step = trainer.global_step
        self._samples = {"train": [], "validation": []}
        self._resumed = step > 0
        if self._resumed and trainer.is_global_zero:
            self._filter_lines("train", lambda line_step: line_step <= step)
            self._filter_lines("validation", lambda line_step: line_step <= step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect samples of a step; write them at its end."""
        output = rollout_output(outputs)
        if output is None or self.every_n_steps == 0 or not trainer.is_global_zero:
            return
        # `global_step` is already increased if this micro-batch ended the step.
        step = trainer.global_step if output["closes_step"] else trainer.global_step + 1
        if step % self.every_n_steps:
            return
        self._collect("train", output, step, pl_module)
        if output["closes_step"]:
            self._write("train", trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the first samples of a validation."""
        output = rollout_output(outputs)
        if output is not None and trainer.is_global_zero and not trainer.sanity_checking:
            self._collect("validation", output, trainer.global_step, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the samples of the validation."""
        if trainer.sanity_checking or not self._samples["validation"]:
            return
        if self._resumed:  # the checkpoint may be older than the validation at the same step
            step = trainer.global_step
            self._filter_lines("validation", lambda line_step: line_step < step)
            self._resumed = False
        self._write("validation", trainer)

    def _collect(self, stage: Stage, output: StepOutput, step: int, pl_module: LightningModule) -> None:
        missing = self.num_samples - len(self._samples[stage])
        if missing > 0:
            tokenizer = getattr(pl_module, "tokenizer", None)
            self._samples[stage] += _sample_rows(output, step, stage, missing, tokenizer)

    def _write(self, stage: Stage, trainer: Trainer) -> None:
        samples, self._samples[stage] = self._samples[stage], []
        if self._directory is None:
            return
        path = self._directory / f"{stage}.jsonl"
        with tolerate_disk_errors(path, self._warned, "Training goes on, and samples are tried again."):
            append_lines(path, (json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
        with tolerate_disk_errors(run_folder(trainer), self._warned, "Training goes on without this log."):
            rows = [[_cell(sample[name]) for name in _COLUMNS] for sample in samples]
            for adapter in logger_adapters(trainer):
                adapter.log_samples(f"samples/{stage}", list(_COLUMNS), rows, samples[0]["step"])

    def _filter_lines(self, stage: Stage, keeps: Callable[[int], bool]) -> None:
        if self._directory is None or not (path := self._directory / f"{stage}.jsonl").exists():
            return
        rewritten = path.with_suffix(".tmp")
        with tolerate_disk_errors(path, self._warned, "Lines of steps that are repeated stay in it."):
            # Bytes, because a crash may have cut the last line inside a character.
            with path.open("rb") as old, rewritten.open("wb") as new:
                new.writelines(line for line in old if keeps(_step_of(line)))
            rewritten.replace(path)


def _step_of(line: bytes) -> int:
    """Return the step of a line. A line that a crash truncated counts as later than any step, so it is removed."""
    try:
        return int(load_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return 2**63


def _sample_rows(
    output: StepOutput, step: int, stage: Stage, limit: int, tokenizer: Any | None
) -> Iterator[dict[str, Any]]:
    """Yield the first `limit` sampled responses as JSON objects."""
    rollout = output["rollout"]
    reward, baseline, kl = response_reward(output), response_baseline(output), response_kl(output)  # [S] each
    advantage, length = response_advantage(output), response_length(output)  # [S] each
    truncated = rollout.sampled.truncated.cpu()
    parts = {name: value.detach().double().cpu() for name, value in rollout.reward_parts.items()}
    for i in range(min(limit, reward.shape[0])):
        row = i // rollout.num_samples  # the n responses to a prompt are next to each other
        yield {
            "step": step,
            "stage": stage,
            "prompt": rollout.prompt.prompts[row],
            "response": rollout.sampled.texts[i],
            "greedy_response": None if rollout.greedy is None else rollout.greedy.texts[row],
            "reward": _finite_or_none(reward, i),
            "baseline_reward": _finite_or_none(baseline, i),
            "advantage": _finite_or_none(advantage, i),
            "kl": _finite_or_none(kl, i),
            "response_length": int(length[i]),
            "truncated": bool(truncated[i]),
            "parts": {name: _finite_or_none(value, i) for name, value in parts.items()},
            **_token_fields(output, i, tokenizer),
        }


def _token_fields(output: StepOutput, i: int, tokenizer: Any | None) -> dict[str, Any]:
    """Return the per-token fields of response `i`."""
    rollout = output["rollout"]
    responses = rollout.sampled
    mask = responses.response_mask[i]  # [R]
    ids = responses.response_ids[i][mask].tolist()  # without padding
    prompt = i // rollout.num_samples
    context = rollout.prompt.prompt_ids[prompt][rollout.prompt.prompt_mask[prompt]][-CONTEXT_TOKENS:].tolist()
    figures = {"token_kl": output["kl"], "token_advantages": output["advantages"]}
    return {
        "tokens": None if tokenizer is None else token_texts(tokenizer, ids, responses.texts[i], context),
        **{name: None if values is None else _finite_values(values[i][mask]) for name, values in figures.items()},
    }


def _finite_values(values: Tensor) -> list[float | None]:
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.detach().double().tolist()]


def _finite_or_none(values: Tensor | None, i: int) -> float | None:
    """Return a finite value or None: JSON has no NaN."""
    value = math.nan if values is None else float(values[i])
    return value if math.isfinite(value) else None


def _cell(value: Any) -> Any:
    """Return a value as loggers can encode it: half an emoji in a text is written as its code."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value


# ---- Predictions ----


class PredictionWriter(Callback):
    """Writes the dictionaries that `predict_step` returns to a JSONL file, batch by batch.

    With several ranks, each rank writes a file: `predictions.rank0.jsonl` and so on.

    Args:
        path: the file; `predictions.jsonl` in the run's folder by default. It must not exist.

    Raises:
        UserError: if the file exists when prediction starts, or cannot be written.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.path = path
        self._lines = 0
        self._pending: list[str] = []
        self._warned: set[str] = set()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to overwrite or extend the file of another run."""
        # ---- The file must be new on every rank ----
        self._lines, self._pending = 0, []
        path = self._file(trainer)
        # All ranks decide the same, or the others would wait for the rank that stopped.
        if max_over_ranks(trainer, [float(path.exists())])[0] > 0:
            raise UserError(
                f"predictions.path must be a file that does not exist yet, got {path}; "
                "move it away or give another path"
            )
        # ---- It must be possible to write it: now, before anything is generated ----
        problem = ""
        try:
            append_lines(path, [])
            path.unlink()
        except OSError as error:
            problem = f"predictions.path: {describe_disk_error(error, path)}; give another path"
        if problems := [text for text in gather_objects(problem) if text]:
            raise UserError(problems[0])

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Append the predictions of a batch, but for a row that is only there to fill up this rank."""
        if not isinstance(outputs, list) or not all(isinstance(line, dict) for line in outputs):
            return
        if _is_repeated(trainer, batch_idx, dataloader_idx):
            return
        self._pending += [write_json(line) + "\n" for line in outputs]
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        path = self._file(trainer)
        with tolerate_disk_errors(path, self._warned, "Predictions are kept in memory and tried again."):
            append_lines(path, self._pending)
            # Not reached if the write failed: the lines are tried again with the next batch.
            self._lines += len(self._pending)
            self._pending = []

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log where the predictions are.

        Raises:
            UserError: if some of them could not be written.
        """
        missing = sum(gather_objects(len(self._pending)))
        if missing:
            raise UserError(f"predictions.path: {missing} predictions could not be written to {self._file(trainer)}")
        total = int(sum_over_ranks(trainer, [float(self._lines)])[0])
        if total:
            others = "" if trainer.world_size == 1 else f" and the files of the {trainer.world_size - 1} other ranks"
            rank_zero_info(f"Wrote {total} predictions to {self._file(trainer)}{others}.")

    def _file(self, trainer: Trainer) -> Path:
        path = Path(home_path(self.path)) if self.path is not None else run_folder(trainer) / "predictions.jsonl"
        if trainer.world_size == 1:
            return path
        return path.with_name(f"{path.stem}.rank{trainer.global_rank}{path.suffix}")


def _is_repeated(trainer: Trainer, batch_idx: int, dataloader_idx: int) -> bool:
    """Whether a batch has only the row that gives this rank as many batches as the others; rank 0 predicts it, too."""
    loaders: Any = trainer.predict_dataloaders
    loader = loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders
    batches = getattr(loader, "batch_sampler", None)  # Lightning's own in predictions, which has the loader's sampler
    repeats_row = getattr(getattr(batches, "sampler", None), "repeats_row", False)  # of `MicroBatchSampler`
    return repeats_row and batch_idx + 1 == len(loader)
