"""vLLM's two `generate` calls on the work of benchmarks/gpu.py, which runs this in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams


def main(folder: Path) -> None:
    """Generate sampled and greedy responses twice, and print the seconds of the second time as a line of JSON."""
    request = json.loads((folder / "request.json").read_text())
    engine = LLM(
        str(folder),
        load_format="dummy",  # random weights
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=request["length"],
        gpu_memory_utilization=0.8,
        enable_prefix_caching=False,  # the second time would find the prompts of the first
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    common = {"max_tokens": request["response"], "stop_token_ids": request["eos_ids"], "detokenize": False}
    sampled = SamplingParams(temperature=1.0, top_p=request["top_p"], **common)
    ways = [sampled, SamplingParams(temperature=0.0, **common)]
    for _ in range(2):
        start, tokens, rows = time.perf_counter(), 0, 0
        for way in ways:
            for output in engine.generate(prompts, way, use_tqdm=False):
                tokens, rows = tokens + len(output.outputs[0].token_ids), rows + 1
        taken = time.perf_counter() - start
    figures = {"seconds": taken, "tokens": tokens, "tokens_per_s": tokens / taken, "mean_length": tokens / rows}
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
