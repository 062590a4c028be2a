"""The list of what `make test` leaves out."""

from __future__ import annotations

from exhaustive import EXHAUSTIVE, is_exhaustive, unmatched, without_representative


def test_a_representative_stays() -> None:
    name = "test_a_resumed_run_repeats_the_uninterrupted_one"
    path = "distributed/test_resume.py"
    assert is_exhaustive(path, f"{name}[zero1]")
    assert not is_exhaustive(path, f"{name}[ddp]")
    assert not is_exhaustive("distributed/test_failures.py", f"{name}[zero1]")


def test_a_row_that_matches_nothing_is_noticed() -> None:
    path, pattern = EXHAUSTIVE[0]
    assert f"{path} {pattern}" in unmatched([(path, "test_of_another_name")])
    assert unmatched([("test_of_another_file.py", "test")]) == []


def test_a_file_of_which_nothing_would_run_is_named() -> None:
    path = "distributed/test_lora.py"
    assert without_representative([(path, "test[ddp]"), (path, "test[fsdp2]")]) == []
    assert without_representative([(path, "test[ddp]"), (path, "test[zero1]")]) == [path]
    assert without_representative([("tools/test_pipeline.py", "test")]) == []  # its row says where the parts are tested
