from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.fakes import FakeModule, make_output, make_trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from remax_lightning.callbacks import RunProgress, Throughput, run_progress
from remax_lightning.callbacks.run_progress import RunBar
from remax_lightning.cli_run import progress_bar_options
from remax_lightning.types import SupervisedBatch


class Terminal(io.StringIO):
    """Text that a terminal would show."""

    def isatty(self) -> bool:
        return True


class LoggingModule(FakeModule):
    """Logs what ReMaxModule does, and loss and perplexity of a supervised stage."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        values = {"reward": 0.5 + batch_idx, "kl": 0.25, "loss": 2.0, "entropy": 1.0}
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=1)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log_dict({"val/reward": 0.75, "val/perplexity": 12.5}, batch_size=1)
        return super().validation_step(batch, batch_idx)


def module(steps: int = 4, validations: int = 0) -> LoggingModule:
    outputs = [make_output(seed) for seed in range(steps)]
    return LoggingModule(outputs, [make_output(seed) for seed in range(validations)])


def test_a_log_file_gets_a_line_per_logged_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, [Throughput(), RunProgress()], log_every_n_steps=2).fit(module(4, validations=1))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/4", "step 4/4", "validation at step 4"]
    assert re.fullmatch(
        r"step 2/4  reward 1\.5000  kl 0\.2500  loss 2\.0000  [\d,]+ tokens/s  [\d.e-]+ s/step  0:00:0\d left", lines[0]
    )
    assert lines[1].endswith("0:00:00 left")
    assert lines[2] == "validation at step 4  reward 0.7500  perplexity 12.50"


def test_micro_batches_of_a_step_make_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, [RunProgress()], accumulate_grad_batches=2).fit(module(4))
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["step 1/2", "step 2/2"]


@pytest.mark.slow
def test_a_run_without_an_end_has_no_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, [RunProgress()], max_epochs=-1, max_time="00:00:00:01").fit(module(2))
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("step 1  reward")
    assert "left" not in first


class Supervised(LoggingModule):
    def train_dataloader(self) -> Any:
        ids = torch.ones(2, 50, dtype=torch.long)
        batch = SupervisedBatch(*(ids, ids.bool()) * 2, ["a", "b"], [{}, {}])
        return torch.utils.data.DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]


def test_tokens_of_a_supervised_stage_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, [RunProgress()]).fit(Supervised([{}, {}]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        tokens, seconds = (
            float(re.search(rf"([\d,.e-]+) {unit}", line)[1].replace(",", "")) for unit in ("tokens", "s/")
        )
        assert tokens * seconds == pytest.approx(200, rel=0.02)


@pytest.mark.parametrize("fit", [True, False])
def test_a_long_evaluation_says_how_far_it_is(
    fit: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_progress, "EVALUATION_INTERVAL", 0.0)
    trainer = make_trainer(tmp_path, [RunProgress()])
    trainer.fit(module(1, validations=2)) if fit else trainer.validate(module(1, validations=2), verbose=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if "batch" in line]
    assert re.fullmatch(r"validation batch 1/2  0:00:0\d left", lines[0])
    assert lines[1] == "validation batch 2/2  0:00:00 left"


@pytest.mark.parametrize(("lines", "terminal", "expected"), [(None, True, 0), (True, True, 2), (False, False, 0)])
def test_a_terminal_gets_none_unless_asked(
    lines: bool | None, terminal: bool, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    make_trainer(tmp_path, [RunProgress(lines=lines)]).fit(module(2))
    assert screen.getvalue().count("step") == expected * 2  # and seconds per step


# Bars


def screen_rows(text: str) -> list[str]:
    """What a terminal shows of a text in the end: carriage returns, new lines, and a cursor that is moved up."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|\r|\n|[^\x1b\r\n]+", text):
        if part == "\x1b[A":
            row -= 1
        elif part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        else:
            line = rows[row].ljust(column)
            rows[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in rows if line.strip()]


def test_messages_and_warnings_stand_above_the_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")  # a bar that is wider would be cut, and 100 steps a second need a column more
    logger = logging.getLogger("test_run_progress")
    handler = logging.StreamHandler(screen)
    monkeypatch.setattr(logger, "handlers", [handler])
    silent = logging.getLogger("test_run_progress_silent")  # as those of libraries
    monkeypatch.setattr(silent, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(silent, "propagate", False)
    silent.setLevel(logging.DEBUG)
    shown = warnings.showwarning

    class Speaks(LoggingModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("val/reward", 0.25, prog_bar=True, batch_size=1)
            self.log("train/reward", 0.5, prog_bar=True, batch_size=1)
            with run_progress.token_bar(64) as advance:
                advance(16)
                logger.warning("exported to runs/policy")
                silent.debug("parsed object")
                warnings.warn("it is late", UserWarning, stacklevel=1)
            return FakeModule.training_step(self, batch, batch_idx)

    monkeypatch.setattr(run_progress, "BAR_DELAY", 0.0)
    with run_progress.messages_above_bars(), warnings.catch_warnings():
        warnings.simplefilter("always")
        make_trainer(tmp_path, [RunProgress(lines=True), RunBar()], enable_progress_bar=True).fit(
            Speaks([make_output(0)])
        )
    rows = screen_rows(screen.getvalue())
    assert "exported to runs/policy" in rows
    assert not any("parsed object" in row for row in rows)
    assert any(row.startswith(__file__) and row.endswith("UserWarning: it is late") for row in rows)
    assert any(row.startswith("step 1/1  reward 0.5000") for row in rows)
    [bar] = [row for row in rows if row.startswith("Epoch 0: 100%")]
    assert bar.endswith("train/reward=0.500, val/reward=0.250]")
    assert logger.handlers == [handler]
    assert warnings.showwarning is shown


def test_a_rollout_has_a_bar_below_that_of_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(run_progress, "BAR_DELAY", 0.0)

    class Worker:
        progress_bar: Any = None

    class WithWorker(LoggingModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with self.worker.progress_bar(64) as advance:
                for tokens in (16, 32, 48):
                    advance(tokens)
            return super().training_step(batch, batch_idx)

    made = WithWorker([make_output(0)])
    made.worker = Worker()  # type: ignore[assignment]
    make_trainer(tmp_path, [RunProgress(), TQDMProgressBar()], enable_progress_bar=True).fit(made)
    assert "Rollout" in screen.getvalue()
    assert "/64" in screen.getvalue()
    assert made.worker.progress_bar is None  # taken back at the end


def test_a_short_rollout_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    with run_progress.token_bar(64) as advance:
        advance(16)
    assert screen.getvalue() == ""


def test_the_command_takes_tqdms_bar_on_a_terminal_and_none_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress_bar_options({}) == {"enable_progress_bar": False}
    assert progress_bar_options({"enable_progress_bar": True}) == {}
    rich = [RichProgressBar()]
    assert progress_bar_options({"callbacks": rich}) == {}
    monkeypatch.setattr(sys, "stdout", Terminal())
    options = progress_bar_options({"callbacks": [RunProgress()]})
    assert [type(callback) for callback in options["callbacks"]] == [RunProgress, RunBar]
    assert progress_bar_options({"callbacks": rich}) == {}
    assert progress_bar_options({"enable_progress_bar": False}) == {}
