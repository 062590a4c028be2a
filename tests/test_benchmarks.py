"""The benchmarks run and write lines that can be read; what they measure at these sizes means nothing."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from helpers.minimal import run_with_only

from remax_lightning.rollout.fused_layers import is_quicker_transposed
from remax_lightning.rollout.row_lengths import flash_takes_lengths

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.slow(4)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark as Python does when it is run: with its own folder on the path, and nothing of it kept."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    # A folder of tests may have lent its name to a module already: tests/rollout, for one.
    others = {name: sys.modules.pop(name) for name in names & set(sys.modules)}
    yield importlib.import_module
    for name in names & set(sys.modules):
        del sys.modules[name]
    sys.modules.update(others)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rollout_compares_every_way_with_two_generate_calls(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "rollout.jsonl"
    command = ["--sizes", "toy", "--geometric", "toy", "--results", str(path), "--warmup", "0"]
    command += ["--repetitions", "2", "--geometric-repetitions", "2"]
    load("rollout").main(command)
    lines = lines_of(path)
    expected = {"two_generate_calls", "one_generate_call", "huggingface_engine", "ours"}
    for kind in ("fixed", "geometric"):
        found = {line["variant"]: line for line in lines if line["lengths"] == kind}
        assert set(found) - {"trl_rloo"} == expected
        assert found["two_generate_calls"]["ratio"] == 1
        assert all(line["seconds"] > 0 and line["versions"]["torch"] for line in found.values())
    assert all(line["mean_length"] == 8 for line in lines if line["lengths"] == "fixed")
    assert all(line["mean_length"] < 5 for line in lines if line["lengths"] == "geometric")


def test_attention_of_shared_prompts_is_measured_against_masked_slots(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "decode_attention.jsonl"
    load("decode_attention").main(["--sizes", "toy", "--repetitions", "1", "--results", str(path)])
    lines = {line["variant"]: line for line in lines_of(path)}
    assert set(lines) == {"masked_slots", "shared_prefix"}
    assert lines["shared_prefix"]["ratio"] == pytest.approx(
        lines["shared_prefix"]["microseconds"] / lines["masked_slots"]["microseconds"], rel=1e-3
    )


def test_top_p_is_measured_against_a_sort(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "top_p.jsonl"
    load("top_p").main(["--vocabularies", "400", "--repetitions", "1", "--results", str(path)])
    for kind in ("peaked", "flat"):
        lines = {line["variant"]: line for line in lines_of(path) if line["lengths"] == kind}
        assert set(lines) == {"sort", "likeliest_then_sort", "digits"}
        assert lines["sort"]["ratio"] == 1
        assert all(line["milliseconds"] > 0 for line in lines.values())


def test_a_new_measurement_takes_the_place_of_the_old_one(load: Any, tmp_path: Path) -> None:
    path, timing = tmp_path / "results.jsonl", load("timing")
    old = {"benchmark": "rollout", "size": "tiny", "variant": "ours", "seconds": 2.0}
    timing.save(path, [old, old | {"size": "small"}])
    timing.save(path, [old | {"seconds": 1.0}])
    assert [(line["size"], line["seconds"]) for line in lines_of(path)] == [("small", 2.0), ("tiny", 1.0)]


def test_variants_run_in_turn_and_warm_up_first(load: Any) -> None:
    calls: list[tuple[str, int]] = []

    def variant(name: str) -> Any:
        return lambda turn: calls.append((name, turn)) or {"seconds": float(turn)}

    found = load("timing").interleaved({"a": variant("a"), "b": variant("b")}, repetitions=2, warmup=1)
    assert calls == [("a", -1), ("b", -1), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert found == {"a": {"seconds": [0.0, 1.0]}, "b": {"seconds": [0.0, 1.0]}}


def test_lengths_are_geometric_with_the_mean_that_was_asked_for(load: Any) -> None:
    shapes, rollout = load("shapes"), load("rollout")
    shape = shapes.SHAPES["toy"]._replace(vocab=2048, response=32, prompts=64)
    model = shapes.llama(shape)
    shapes.set_ending(model, 1 / 8)
    responses = rollout._two_calls(model, shapes.prompts(shape, 0), 0, shape)
    lengths = torch.tensor([float(rollout._length(row)) for row in responses])
    expected = 8 * (1 - (7 / 8) ** 32)
    for half in lengths.split(64):  # sampled, greedy; eight standard deviations of one row make one of the mean
        assert abs(float(half.mean()) - expected) < 3
        assert float(half.std()) > 4


def test_returns_of_the_papers_way_are_those_of_its_formula(load: Any) -> None:
    log_ratio = torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = load("papers_way")._returns(log_ratio, mask, torch.tensor([1.0, -2.0]))
    first = [-0.05 + 0.99**3, 0.1 + 0.99**2, 0.99]
    torch.testing.assert_close(found, torch.tensor([first, [-0.025 - 1.98, 0.0, 0.0]]))


def test_step_measures_phases_and_memory(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "step.jsonl"
    load("step").main(
        ["--sizes", "toy", "--variants", "ours", "--repetitions", "1", "--warmup", "0", "--results", str(path)]
    )
    found = {line["variant"]: line for line in lines_of(path)}
    assert set(found) == {"papers_way", "ours"}
    for line in found.values():
        assert line["seconds"] == pytest.approx(line["rollout"] + line["scoring"] + line["training"], rel=0.01)
        assert min(line["rollout"], line["scoring"], line["training"]) > 0
        assert 0 < line["peak_over_base_gb"] < 1


def test_step_leaves_out_ppo_without_its_environment(load: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "step.jsonl"
    command = ["--sizes", "toy", "--variants", "trl_ppo", "--repetitions", "1", "--warmup", "0"]
    load("step").main([*command, "--ppo-python", str(tmp_path / "python"), "--results", str(path)])
    assert "TRL's PPO is left out" in capsys.readouterr().out
    assert [line["variant"] for line in lines_of(path)] == ["papers_way"]


def test_a_worker_answers_past_what_its_libraries_print(load: Any) -> None:
    lines = [f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})", "from worker import serve", "def make(begin):"]
    lines += ["  print('loading')", "  def step(turn):", "    begin(); print('training'); bytearray(50_000_000)"]
    lines += ["    return {'rollout': turn / 2}", "  return step", "serve(make)"]
    with load("worker").Worker([sys.executable, "-c", "\n".join(lines)]) as worker:
        assert worker.versions["torch"] == version("torch")
        assert [worker.step(turn) for turn in (-1, 3)] == [{"rollout": -0.5}, {"rollout": 1.5}]
        assert 0.045 < worker.peak_over_base_gb < 0.1


def test_a_worker_that_ends_says_how(load: Any) -> None:
    with pytest.raises(RuntimeError, match="ended with 3"):
        load("worker").Worker([sys.executable, "-c", "raise SystemExit(3)"])


def test_rollouts_in_shards_are_compared_with_those_of_a_whole_policy(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "zero3_rollout.jsonl"
    command = ["--sizes", "toy", "--repetitions", "2", "--warmup", "0", "--results", str(path)]
    load("zero3_rollout").main(command)
    found = {line["variant"]: line for line in lines_of(path)}
    sharded = {f"{kind}_{gather}" for kind in ("zero3", "fsdp2") for gather in ("once", "layerwise")}
    assert set(found) == {"zero2", "zero3_hooks"} | sharded
    assert found["zero2"]["ratio"] == 1
    for line in found.values():
        assert 0 < line["fastest"] <= line["seconds"] <= line["slowest"]
        assert (line["repetitions"], line["ranks"], line["response"]) == (2, 2, 8)
        assert line["versions"]["deepspeed"]


GPU_PARTS = {
    *(("device", "limits", ""), ("toy", "step", "")),
    *(("device", "attention", kernel) for kernel in ("cudnn", "efficient", "flash", "math")),
    *(("toy", "decode", variant) for variant in ("graphs", "no graphs")),
    *(("toy", "rollout", way) for way in ("ours", "sampled only", "two generate calls", "vllm")),
}


def parts_of(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(line["size"], line["phase"], line["variant"]): line for line in lines_of(path)}


def check_gpu(path: Path) -> None:
    """Every part has its line, and figures where the CPU can have them."""
    parts = parts_of(path)
    assert set(parts) == GPU_PARTS
    unknown = {variant for (_, phase, variant), line in parts.items() if "error" in line}
    assert unknown == {"cudnn", "efficient"}  # kernels that a CPU does not have
    assert parts["device", "attention", "math"]["nonfinite_gradients_320"] == 0
    assert parts["toy", "decode", "graphs"]["over_bound"] != 0
    ways = [parts["toy", "rollout", way] for way in ("ours", "sampled only", "two generate calls")]
    assert all(0 < way["mean_length"] < 8 for way in ways)  # geometric
    step = parts["toy", "step", ""]
    assert all(0 < step[part] <= 1.01 * step["step_s"] for part in ("rollout_s", "reward_s", "train_s"))
    assert 0 < step["step_mfu"] < 1
    assert step["planned_ppo_extra_gb"] > 0
    assert step["versions"]["torch"] == version("torch")


def test_gpu_runs_its_whole_path_on_a_cpu(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    load("gpu").main(["--shape", "toy", "--device", "cpu", "--seconds", "1000", "--results", str(path)])
    check_gpu(path)


def test_gpu_needs_torch_transformers_and_lightning_alone(tmp_path: Path) -> None:
    """The first machine with a GPU has nothing else, and no network."""
    path, folder = tmp_path / "gpu.jsonl", tmp_path / "packages"
    folder.mkdir()
    names = ("torch", "transformers", "lightning")
    command = ["benchmarks/gpu.py", "--shape", "toy", "--device", "cpu", "--seconds", "1000", "--results", str(path)]
    ended = run_with_only(names, folder, *command)
    assert ended.returncode == 0, ended.stderr[-3000:]
    check_gpu(path)
    assert "deepspeed" not in parts_of(path)["toy", "step", ""]["versions"]


def test_gpu_tests_are_collected_with_torch_transformers_and_lightning_alone(tmp_path: Path) -> None:
    names = ("torch", "transformers", "lightning", "pytest")
    ended = run_with_only(
        names, tmp_path, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert "tests/rollout/test_cuda_graph.py: " in ended.stdout
    assert "tests/distributed/test_sharded.py: " in ended.stdout


def test_gpu_writes_results_at_once_and_counts_warm_ups(load: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path, gpu, written = tmp_path / "gpu.jsonl", load("gpu"), []
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow(*_: Any) -> dict[str, float]:
        written.append(len(lines_of(path)) if path.exists() else 0)
        clock[0] += 0.3
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "device_limits", slow)
    monkeypatch.setattr(gpu, "attention_kernels", slow)
    gpu.main(["--shape", "toy", "--device", "cpu", "--seconds", "0.5", "--results", str(path)])
    parts = parts_of(path)
    assert written == [0, 1]  # the time of the first two parts is all there was
    assert parts["device", "limits", ""]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert {line.get("skipped") for line in list(parts.values())[2:]} == {"no time left"}
    assert ("toy", "all", "") in parts


def test_gpu_goes_on_where_a_model_does_not_fit(load: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path, gpu, kernels = tmp_path / "gpu.jsonl", load("gpu"), list[bool]()

    def too_large(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "choose_attention_kernels", lambda _, cudnn: kernels.append(cudnn))
    monkeypatch.setattr(gpu, "build", too_large)
    for part in ("device_limits", "attention_kernels", "vllm", "step_figures"):
        monkeypatch.setattr(gpu, part, lambda *_: {"seconds": 1.0})
    gpu.main(["--shape", "toy", "--device", "cpu", "--seconds", "100", "--results", str(path)])
    parts = parts_of(path)
    assert parts["toy", "generation", ""]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert parts["toy", "step", ""]["seconds"] == 1.0
    assert kernels == [False]  # in what follows the kernels themselves, as in a run


def test_gpu_asks_the_plan_before_it_saves_models(load: Any, tmp_path: Path, monkeypatch: Any) -> None:
    parts, models = load("gpu_parts"), load("gpu_models")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=10**6))
    budget = parts.Budget(time.monotonic() + 100)
    figures = parts.step_figures(models.WORKS["toy"], tmp_path, torch.device("cuda"), budget, {})
    assert "does not fit into 0 GB" in figures["skipped"]
    assert (tmp_path / "reward" / "config.json").is_file()
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_gpu_keeps_time_for_the_step(load: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """However slow a rollout is; and what only warmed up is told from what was repeated."""
    path, gpu, parts, clock = tmp_path / "gpu.jsonl", load("gpu"), load("gpu_parts"), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow(run: Any, device: Any) -> tuple[float, Any]:
        clock[0] += 4.0
        return 4.0, run()

    monkeypatch.setattr(parts, "seconds", slow)
    monkeypatch.setattr(parts, "_rollout", lambda *_, **__: lambda: torch.zeros(8, 8, dtype=torch.long))
    monkeypatch.setattr(parts, "_two_calls", parts._rollout)
    for part in ("device_limits", "attention_kernels", "vllm"):
        monkeypatch.setattr(gpu, part, lambda *_: {})
    monkeypatch.setattr(gpu, "step_figures", lambda *arguments: {"left": arguments[3].left()})
    gpu.main(["--shape", "toy", "--device", "cpu", "--seconds", "100", "--results", str(path)])
    found = parts_of(path)
    assert found["toy", "step", ""]["left"] >= 25
    assert {line.get("skipped") for line in found.values()} == {None}


def test_gpu_captures_graphs_of_what_it_measures(load: Any, fake_cuda: FakeCuda) -> None:
    """With gradient checkpointing, as the model is trained."""
    models, parts = load("gpu_models"), load("gpu_parts")
    work, budget = models.WORKS["toy"], parts.Budget(time.monotonic() + 600)
    model = models.build(work, torch.device("cpu")).to("cuda")
    assert parts.decode_figures(model, work, True, budget, {})["graphs"] == 2  # of a step, and of top-p
    assert all(graph.replays for graph in fake_cuda.graphs)
    assert parts.decode_figures(model, work, False, budget, {})["graphs"] == 0


def test_products_of_few_rows_are_measured_in_both_orders(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "products.jsonl"
    threads = torch.get_num_threads()
    try:
        load("products").main(
            ["--layers", "3", "--rows", "3", "16", "--threads", "1", "--repetitions", "1", "--results", str(path)]
        )
    finally:
        torch.set_num_threads(threads)
    lines = lines_of(path)
    assert [line["size"] for line in lines[:2]] == ["256 to 256, 3 rows", "256 to 256, 16 rows"]
    assert len(lines) == 6
    for line in lines:
        assert line["ratio"] == pytest.approx(line["transposed"] / line["plain"], rel=1e-3)
        layer = torch.nn.Linear(*(int(number) for number in line["size"].split(",")[0].split(" to ")))
        assert line["is_taken"] == is_quicker_transposed(int(line["size"].split()[-2]), layer)


@pytest.mark.skipif(not flash_takes_lengths(), reason="flash attention of this torch is not told lengths")
def test_operators_are_counted_without_a_device(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "operators.jsonl"
    load("operators").main(["--shape", "toy", "--results", str(path)])
    [line] = lines_of(path)
    assert line["products"] == 2 * 7 + 1  # of two layers, and the output embedding
    assert line["most"]["rms_norm"] == 2 * 2 + 1
    assert line["operators"] == line["products"] + line["attention"] + line["others"]


def test_the_plan_is_held_against_the_memory_of_a_run(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.jsonl"
    load("plan").main(["--only", "llama-85M-single-micro_batches", "--size", "toy", "--results", str(path)])
    lines = lines_of(path)
    assert [line["phase"] for line in lines] == ["rollout", "scoring", "training", "update"]
    for line in lines:
        assert line["predicted_mb"] > 0
        assert line["error"] == pytest.approx(line["predicted_mb"] / line["measured_mb"] - 1, abs=0.01)


def test_gpu_says_so_where_there_is_no_cuda(load: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    load("gpu").main(["--results", str(tmp_path / "gpu.jsonl")])
    assert "no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "gpu.jsonl").exists()


def test_the_picture_of_a_report_is_drawn(load: Any, tmp_path: Path) -> None:
    from PIL import Image
    from tools.browser import chromium
    from tools.report_run import write_run

    from remax_lightning.tools.report import main

    with chromium(tmp_path / "profile"):
        pass  # skips, or fails, where there is none
    page = main([str(write_run(tmp_path / "version_0"))])
    picture = tmp_path / "report.png"
    load("draw_report").main([str(page), "--output", str(picture)])
    with Image.open(picture) as image:
        assert image.width == 1280
        assert len(image.getcolors() or []) > 50


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
def test_memory_does_not_grow_with_the_rows_and_checks_are_cheap(tmp_path: Path) -> None:
    """Twelve thousand rows are 20 MiB of text, and some 90 MiB as objects of Python."""
    output = tmp_path / "figures.jsonl"
    sizes = ("--rows=12000", "--kinds", "PromptDataModule", f"--results={output}")
    subprocess.run([sys.executable, str(BENCHMARKS / "data.py"), *sizes], check=True, capture_output=True)
    cold, warm = (json.loads(line) for line in output.read_text().splitlines())
    assert (cold["variant"], warm["variant"]) == ("cold", "warm")
    assert cold["file_mib"] == pytest.approx(20, abs=2)
    assert warm["held_mib"] < 10
    assert cold["held_mib"] < 70  # the tokenizer's cache of words
    assert warm["seconds"] < cold["seconds"]
    assert 0 < cold["checks_share"] < 0.05
    assert {"processor", "versions", "rows_per_second"} <= set(cold)


def test_steps_of_two_processes_are_compared_with_one(tmp_path: Path) -> None:
    path = tmp_path / "invariance.jsonl"
    command = [str(BENCHMARKS / "invariance.py"), "--strategies", "ddp", "--cases", "budget", "--results", str(path)]
    subprocess.run([sys.executable, *command], check=True, timeout=300, capture_output=True)
    [line] = lines_of(path)
    assert (line["case"], line["strategy"], line["ranks"]) == ("budget", "ddp", 2)
    assert line["largest_difference"] < 1e-5
    assert line["figures"] < 1e-5


def test_packing_compares_passes_with_those_of_padded_rows(load: Any, tmp_path: Path) -> None:
    rows = tmp_path / "lengths.jsonl"
    rows.write_text("".join(json.dumps({"question": "?" * 7 * n, "answer": "!" * 9 * n}) + "\n" for n in range(1, 8)))
    command = ["--sizes", "toy", "--results", str(tmp_path / "packing.jsonl"), "--warmup", "0", "--repetitions", "1"]
    load("packing").main([*command, "--lengths", str(rows)])
    lines = lines_of(tmp_path / "packing.jsonl")
    found = {(line["phase"], line["variant"]): line for line in lines}
    assert {name for phase, name in found if phase == "step"} == {"before", "packed", "budget"}
    real = {name: line["real_over_computed"] for (phase, name), line in found.items() if phase == "training"}
    assert real["packed"] == real["budget"] == 1
    assert real["before"] <= real["padded"] <= 1


def test_the_tables_of_recipes_are_the_results(load: Any) -> None:
    recipes = load("recipes")
    text = recipes.PAGE.read_text()
    assert recipes.page(text) == text, "stale: run python benchmarks/recipes.py --table"
    for recipe in re.findall(r"made by python benchmarks/recipes.py: (\w+)", text):
        seeds = [line.seed for line in recipes.lines(recipe)]
        assert seeds == [0, 1, 2]
        assert all(f"| {seed} | " in recipes.table(recipe) for seed in seeds)


def test_rollouts_of_a_server_are_measured(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small server in place of the real one, which `make test-vllm` runs it with."""
    from conftest import make_tokenizer
    from helpers.training import save_policy
    from helpers.vllm_server import FakeVLLM
    from transformers import AutoModelForCausalLM

    policy, script = save_policy(tmp_path / "policy"), load("vllm_rollout")

    @contextmanager
    def serving(folder: Path, options: Any, *, lora: bool, core: int | None = None) -> Iterator[str]:
        folder.mkdir()
        faults = {"has_lora": lora, "backend": None if lora else "remax", "max_model_len": 512}
        with FakeVLLM(AutoModelForCausalLM.from_pretrained(policy), make_tokenizer(), **faults) as server:
            yield server.url

    made = script.request
    monkeypatch.setattr(script, "serving", serving)
    monkeypatch.setattr(script, "PROMPTS", 2)
    monkeypatch.setattr(
        script,
        "request",
        lambda *arguments: replace(asked := made(*arguments), prompt_ids=asked.prompt_ids % 80 + 5),
    )
    results = tmp_path / "results.jsonl"
    options = ["--policy", policy, "--length", "3", "--repetitions", "1", "--results", str(results)]
    threads = torch.get_num_threads()
    script.main(options)
    assert torch.get_num_threads() == threads
    lines = lines_of(results)
    ways = {(line["variant"], line["lengths"]) for line in lines if "lengths" in line}
    assert ways == {(way, kind) for way in ("vllm", "ours", "two generate calls") for kind in ("fixed", "uneven")}
    assert {line["variant"] for line in lines if line.get("phase") == "update"} == {"all weights", "adapter"}
    [step] = [line for line in lines if line.get("phase") == "step"]
    assert 0 < step["overhead"] < 1
    assert step["proof"] > 0 < step["correction"]
    assert {line["variant"] for line in lines if line.get("phase") == "ahead"} == {"ahead 0", "ahead 1"}
    assert all(line["server"] == "vllm 0.32.0" for line in lines)
