from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from callbacks.collapse_ranks import main, outputs_of
from callbacks.fakes import scalars
from helpers.ranks import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collapse")
    printed = launch(main, folder)
    assert printed.count("above collapse.max_truncation_rate = 0.35") == 1
    return folder


def test_both_ranks_stop_at_the_same_step_for_what_one_saw(run: Path) -> None:
    """The sixth is the second step of the first whole window of them."""
    for rank in (0, 1):
        assert json.loads((run / f"rank{rank}.json").read_text()) == {"steps": 6, "stopped": True}


def test_figures_are_those_of_both_ranks(run: Path) -> None:
    ranks = [outputs_of(0), outputs_of(1)]
    for step in range(6):
        parts = [outputs[step] for outputs in ranks]
        texts = [text for part in parts for text in part["rollout"].sampled.texts]
        rewards = [value for part in parts for value in part["rollout"].reward.tolist()]
        lengths = [int(row.sum()) for part in parts for row in part["rollout"].sampled.response_mask]
        assert len(texts) == 10
        assert scalars(run, "train/eos_rate")[step] == pytest.approx(0.6 if step >= 4 else 1.0)
        assert scalars(run, "train/distinct_share")[step] == pytest.approx(len(set(texts)) / 10) == 0.9
        correlation = statistics.correlation(rewards, lengths)
        assert scalars(run, "train/length_correlation")[step] == pytest.approx(correlation, rel=1e-5)
    kls = [
        statistics.fmean([sum(row) for outputs in ranks for row in outputs[step]["kl"].tolist()]) for step in range(6)
    ]
    assert scalars(run, "train/kl_slope")[1:] == pytest.approx([b - a for a, b in pairwise(kls)], rel=1e-4)
