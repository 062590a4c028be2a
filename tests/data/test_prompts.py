from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from conftest import make_tokenizer
from lightning.pytorch.callbacks import ModelCheckpoint

from remax_lightning.data import LoadingConfig, PromptDataModule
from remax_lightning.errors import DataError, UserError
from remax_lightning.types import PromptBatch

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


def write(path: Path, prompts: Iterable[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt, "n": n}) + "\n" for n, prompt in enumerate(prompts)))
    return str(path)


@pytest.fixture
def train(tmp_path: Path) -> str:
    return write(tmp_path / "train.jsonl", (f"{n}+{n}=" for n in range(23)))


@pytest.fixture
def val(tmp_path: Path) -> str:
    return write(tmp_path / "val.jsonl", (f"{n}-{n}=" for n in range(7)))


@pytest.fixture
def tokenizer_path(policy_path: Path) -> str:
    return str(policy_path)


def numbers(batches: Iterable[PromptBatch]) -> list[list[int]]:
    return [[row["n"] for row in batch.rows] for batch in batches]


def flat(batches: Iterable[PromptBatch]) -> list[int]:
    return [number for batch in numbers(batches) for number in batch]


class Recorder(lightning.LightningModule):
    """Trains one number and remembers which rows it was given, where."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained: list[tuple[int, int, list[int]]] = []
        self.validated: list[list[int]] = []
        self.predicted: list[list[int]] = []

    def training_step(self, batch: PromptBatch) -> torch.Tensor:
        self.trained.append((self.current_epoch, batch.micro_batch_index, [row["n"] for row in batch.rows]))
        return self.weight.sum() * batch.prompt_mask.sum()

    def validation_step(self, batch: PromptBatch) -> None:
        self.validated.append([row["n"] for row in batch.rows])

    def predict_step(self, batch: PromptBatch) -> list[int]:
        self.predicted.append([row["n"] for row in batch.rows])
        return self.predicted[-1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_batches(train: str, val: str, tokenizer_path: str) -> None:
    data = PromptDataModule(
        train, tokenizer_path, val_path=val, batch_size=6, micro_batch_size=2, template="Q {prompt}"
    )
    data.setup()
    batches = list(data.train_dataloader())
    assert [(batch.micro_batch_index, batch.num_micro_batches) for batch in batches] == [(0, 3), (1, 3), (2, 3)] * 3
    first = batches[0]
    assert first.prompts == [f"Q {n}+{n}=" for n in numbers([first])[0]]
    tokenizer = make_tokenizer()
    for ids, mask, prompt in zip(first.prompt_ids, first.prompt_mask, first.prompts, strict=True):
        assert ids[mask].tolist() == tokenizer(prompt).input_ids
        assert set(ids[~mask].tolist()) <= {tokenizer.pad_token_id}
    assert first.prompt_mask[:, -1].all(), "padding is on the left"
    assert numbers(data.val_dataloader()) == [[0, 1, 2, 3, 4, 5], [6]]
    assert {(batch.micro_batch_index, batch.num_micro_batches) for batch in data.val_dataloader()} == {(0, 1)}
    assert numbers(data.test_dataloader()) == numbers(data.predict_dataloader()) == numbers(data.val_dataloader())


def test_held_out_rows_are_drawn_by_seed(train: str, tokenizer_path: str) -> None:
    def halves(seed: int, max_prompt_length: int = 512) -> tuple[list[int], list[int]]:
        data = PromptDataModule(
            train, tokenizer_path, val_size=5, batch_size=1, seed=seed, max_prompt_length=max_prompt_length
        )
        data.setup()
        return flat(data.train_dataloader()), flat(data.val_dataloader())

    train_rows, val_rows = halves(0)
    assert len(val_rows) == 5
    assert sorted(train_rows + val_rows) == list(range(23))
    assert val_rows == sorted(val_rows)
    assert halves(0) == (train_rows, val_rows)
    assert halves(1)[1] != val_rows
    # a limit that drops two-digit prompts takes rows away on both sides and moves none
    assert halves(0, max_prompt_length=5)[1] == [n for n in val_rows if n < 10]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 6, "micro_batch_size": 4}, UserError, r"data\.micro_batch_size must divide data\.batch_size 6"),
        (
            {"micro_batch_size": 2, "tokens_per_micro_batch": 64},
            UserError,
            r"data\.tokens_per_micro_batch must be null beside data\.micro_batch_size 2, got 64",
        ),
        ({"tokens_per_micro_batch": 0}, UserError, r"data\.tokens_per_micro_batch must be null or at least 1, got 0"),
        ({"micro_batch_size": 0}, UserError, r"data\.micro_batch_size must be null or at least 1, got 0"),
        ({"batch_size": 0}, UserError, r"data\.batch_size must be at least 1, got 0"),
        ({"max_prompt_length": 0}, UserError, r"data\.max_prompt_length must be at least 1"),
        ({"val_size": -1}, UserError, r"data\.val_size must be null or 0 or more, got -1"),
        ({"val_size": 1, "val_path": "x.jsonl"}, UserError, r"data\.val_size must be 0 beside data\.val_path"),
        ({"template": "none"}, UserError, r"data\.template has no field"),
        ({"val_path": "no.jsonl", "batch_size": 2}, DataError, r"data\.val_path: there is no file 'no\.jsonl'"),
        ({"val_size": 23}, DataError, r"data\.val_size must be below the 23 rows of .*train\.jsonl, got 23"),
        ({"batch_size": 24}, DataError, r"data\.batch_size=24 .* needs 24 .* data\.path .*has 23 to use"),
        ({"prompt_column": "question"}, DataError, r"train\.jsonl, line 1: there is no column 'question'"),
        ({"max_prompt_length": 2}, DataError, r"23 of 23 rows.*data\.max_prompt_length=2.*shortest has 5"),
        ({"max_prompt_length": 5, "loading": LoadingConfig(long_prompts="error")}, DataError,
         r"train\.jsonl, line 11: 7 tokens, over data\.max_prompt_length=5, and so are 13 of 23"),
    ],
)  # fmt: skip
def test_bad_settings(
    train: str, tokenizer_path: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PromptDataModule(train, tokenizer_path, **options).setup("fit")


def test_errors_of_files_and_tokenizers_name_their_keys(train: str, tokenizer_path: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path: there is no file"):
        PromptDataModule(str(tmp_path / "no.jsonl"), tokenizer_path).setup()
    with pytest.raises(UserError, match=r"data\.tokenizer: no tokenizer"):
        PromptDataModule(train, str(tmp_path)).setup()
    unpadded = make_tokenizer()
    unpadded.pad_token = None
    unpadded.save_pretrained(tmp_path / "unpadded")
    with pytest.raises(UserError, match=r"set data\.loading.pad_token: eos"):
        PromptDataModule(train, str(tmp_path / "unpadded")).setup()
    data = PromptDataModule(train, str(tmp_path / "unpadded"), batch_size=2, loading=LoadingConfig(pad_token="eos"))
    data.setup()
    assert data.tokenizer.pad_token_id == 2


def test_length_filter_says_how_many(
    train: str, tokenizer_path: str, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        PromptDataModule(train, tokenizer_path, val_size=0, batch_size=2, max_prompt_length=7).setup()
        assert "dropped 0 of 23 rows, longer than data.max_prompt_length=7 tokens" in caplog.text
    assert not [w for w in recwarn if "dropped" in str(w.message)]
    with pytest.warns(UserWarning, match=r"dropped 13 of 23 rows.*more than half"):
        PromptDataModule(train, tokenizer_path, val_size=0, batch_size=2, max_prompt_length=5).setup()


def test_files_are_read_once_and_only_where_needed(train: str, val: str, tokenizer_path: str) -> None:
    data = PromptDataModule(train, tokenizer_path, val_path=val, batch_size=4)
    data.setup("fit")
    Path(train).unlink()
    Path(val).unlink()
    data.setup("fit")
    data.setup("validate")
    assert len(data.val_dataloader()) == 2


def test_validation_file_alone_is_enough_to_validate(val: str, tokenizer_path: str) -> None:
    data = PromptDataModule("gone.jsonl", tokenizer_path, val_path=val, batch_size=4)
    data.setup("validate")
    assert numbers(data.val_dataloader()) == [[0, 1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_without_rows_names_the_key(train: str, tokenizer_path: str, stage: str) -> None:
    with pytest.raises(UserError, match=rf"data\.val_path must name the rows to {stage} on"):
        PromptDataModule(train, tokenizer_path, val_size=0).setup(stage)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize(("count", "batch_size", "held_out"), [(19, 4, 0), (23, 4, 1), (23, 23, 0), (4000, 4, 64)])
def test_a_share_of_the_rows_is_held_out_by_default(
    count: int, batch_size: int, held_out: int, tokenizer_path: str
) -> None:
    rows = [{"prompt": f"{number}"} for number in range(count)]
    data = PromptDataModule(data=rows, tokenizer=tokenizer_path, batch_size=batch_size)
    data.setup("fit")
    validated = [row["prompt"] for batch in data.val_dataloader() for row in batch.rows]
    trained = [row["prompt"] for batch in data.train_dataloader() for row in batch.rows]
    assert len(validated) == held_out
    assert not set(validated) & set(trained)


def test_too_few_rows_to_hold_any_out_name_the_key(tokenizer_path: str) -> None:
    data = PromptDataModule(data=[{"prompt": "a"}] * 8, tokenizer=tokenizer_path, batch_size=2)
    with pytest.raises(UserError, match=r"data\.val_path must name the rows to validate on"):
        data.setup("validate")


def test_lightning_sets_the_epoch(train: str, tokenizer_path: str) -> None:
    data = PromptDataModule(train, tokenizer_path, val_size=0, batch_size=6, micro_batch_size=3)
    module = Recorder()
    lightning.Trainer(max_epochs=3, accumulate_grad_batches=2, enable_checkpointing=False, **QUIET).fit(module, data)
    assert not module.validated, "without validation rows there is no validation"
    epochs = [[rows for epoch, _, rows in module.trained if epoch == e] for e in range(3)]
    assert [len(batches) for batches in epochs] == [6, 6, 6]
    for batches in epochs:
        assert batches[0::2] == batches[1::2]
    assert len({str(batches) for batches in epochs}) == 3, "each epoch has its own order"
    assert [split for _, split, _ in module.trained] == [0, 1] * 9


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stop_after", [2, 4, 6, 8, 12])
def test_lightning_resumes_where_it_stopped(
    train: str, val: str, tokenizer_path: str, tmp_path: Path, num_workers: int, stop_after: int
) -> None:
    def run(max_steps: int, ckpt_path: str | None = None) -> tuple[Recorder, str]:
        data = PromptDataModule(
            train,
            tokenizer_path,
            val_path=val,
            batch_size=6,
            micro_batch_size=3,
            loading=LoadingConfig(num_workers=num_workers),
        )
        module = Recorder()
        checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop_after, save_top_k=-1)
        trainer = lightning.Trainer(
            max_steps=max_steps, max_epochs=3, num_sanity_val_steps=0, callbacks=[checkpoint], **QUIET
        )
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return module, str(tmp_path / f"step={stop_after}.ckpt")

    whole, path = run(18)
    resumed, _ = run(18, path)
    assert len(whole.trained) == 18
    assert [rest[1:] for rest in resumed.trained] == [rest[1:] for rest in whole.trained[stop_after:]]


@pytest.mark.slow(0.3)
def test_lightning_resumes_from_the_end_of_a_finished_run(train: str, tokenizer_path: str, tmp_path: Path) -> None:
    def run(max_epochs: int, ckpt_path: str | None = None) -> Recorder:
        module = Recorder()
        trainer = lightning.Trainer(max_epochs=max_epochs, enable_checkpointing=False, **QUIET)
        trainer.fit(module, PromptDataModule(train, tokenizer_path, batch_size=6), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        return module

    whole = run(3)
    run(1)
    assert run(3, str(tmp_path / "end.ckpt")).trained == whole.trained[3:]


@pytest.mark.parametrize("distributed_sampler", [True, False])
def test_lightning_predicts_and_validates_every_row(val: str, tokenizer_path: str, distributed_sampler: bool) -> None:
    data = PromptDataModule("gone.jsonl", tokenizer_path, val_path=val, batch_size=4)
    module = Recorder()
    trainer = lightning.Trainer(enable_checkpointing=False, **{**QUIET, "use_distributed_sampler": distributed_sampler})
    trainer.validate(module, data, verbose=False)
    assert trainer.predict(module, data) == module.validated == [[0, 1, 2, 3], [4, 5, 6]]


def test_overfit_batches_and_splits_are_refused_together(train: str, tokenizer_path: str) -> None:
    trainer = lightning.Trainer(max_epochs=1, overfit_batches=2, enable_checkpointing=False, **QUIET)
    with pytest.raises(UserError, match=r"data\.micro_batch_size must equal data\.batch_size where trainer\.overfit"):
        trainer.fit(Recorder(), PromptDataModule(train, tokenizer_path, batch_size=6, micro_batch_size=3))


def test_ranks_of_the_trainer_share_the_rows(train: str, tokenizer_path: str) -> None:
    class Trainer:
        world_size = 2
        global_rank = 0

    seen = []
    for rank in range(2):
        data = PromptDataModule(train, tokenizer_path, batch_size=5)
        data.trainer = Trainer()  # type: ignore[assignment]
        data.trainer.global_rank = rank  # type: ignore[misc, union-attr]
        data.setup("fit")
        seen.append(set(flat(data.train_dataloader())))
    assert len(seen[0]) == len(seen[1]) == 10
    assert not seen[0] & seen[1]
    data = PromptDataModule(train, tokenizer_path, batch_size=12)
    data.trainer = Trainer()  # type: ignore[assignment]
    with pytest.raises(DataError, match=r"data\.batch_size=12 on 2 process\(es\) needs 24"):
        data.setup("fit")


def test_messages_column(tmp_path: Path) -> None:
    make_tokenizer(chat_template="{{ bos_token }}{{ messages[0].content }}|").save_pretrained(tmp_path / "chat")
    rows = [{"messages": [{"role": "user", "content": f"{n}"}], "n": n} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = PromptDataModule(str(tmp_path / "rows.json"), str(tmp_path / "chat"), prompt_column="messages", batch_size=4)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch.prompts == [f"<s>{n}|" for n in numbers([batch])[0]]
    assert (batch.prompt_ids == 1).sum(1).tolist() == [1, 1, 1, 1], "one BOS each"
