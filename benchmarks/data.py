"""How long rows take to be prepared, and the memory that they are held in: `python benchmarks/data.py`.

A file of conversations is read, rendered with a chat template, checked, tokenized and filtered by each data module,
with nothing kept from before (cold) and once more (warm), each in a process of its own. Memory is what the process
holds beyond libraries and tokenizer: `held_mib` is its own afterwards, with the tokenizer's cache of words, `peak_mib`
the most that was resident, mapped files included. `checks_share` is the part of the time that checks of the rendered
text take.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from machine import RESULTS, resident
from timing import save

KINDS = ("PromptDataModule", "SFTDataModule", "PreferenceDataModule")
VOCABULARY = 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MIB = 2**20


def write_rows(path: Path, count: int) -> None:
    """Write conversations of made-up words: a prompt of 80 words, and two responses of 60."""
    generator = random.Random(0)
    syllables = [first + second for first in "bdfgklmnprst" for second in ("a", "en", "i", "or", "u", "est")]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(2000)]

    def text(length: int) -> str:
        return " ".join(generator.choices(words, k=length)) + "."

    with path.open("w") as file:
        for number in range(count):
            chosen, rejected = text(60), text(60)
            row = {"id": number, "prompt": [{"role": "user", "content": text(80)}], "response": chosen}
            file.write(json.dumps({**row, "chosen": chosen, "rejected": rejected}) + "\n")


def make_tokenizer(rows: Path, folder: Path) -> str:
    """Train byte-level BPE on a part of the rows, and save it with a chat template."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>"]
    texts = [json.loads(line)["prompt"][0]["content"] for line in rows.read_text().splitlines()[:2000]]
    model = ByteLevelBPETokenizer()
    model.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model._tokenizer, eos_token=special[1], pad_token=special[1], additional_special_tokens=special
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def timed(owner: Any, name: str, seconds: list[float]) -> None:
    """Add the processor time of each call of a function to `seconds`."""
    function: Callable[..., Any] = getattr(owner, name)

    def measured(*arguments: Any, **options: Any) -> Any:
        started = time.thread_time()
        try:
            return function(*arguments, **options)
        finally:
            seconds[0] += time.thread_time() - started

    setattr(owner, name, measured)


def measure(kind: str, rows: str, tokenizer: str) -> dict[str, float]:
    """Set one data module up in this process and return its figures."""
    from remax_lightning import data
    from remax_lightning.data.chat_templates import ChatRenderer

    checks = [0.0]
    timed(ChatRenderer, "_check", checks)
    timed(ChatRenderer, "_probe", checks)
    with Path(rows).open() as file:
        first = [json.loads(line) for line in islice(file, 2)]
    loading = data.LoadingConfig(cache=False)
    warm_up = getattr(data, kind)(data=first, tokenizer=tokenizer, batch_size=2, loading=loading)
    warm_up.setup("fit")  # imports what preparing needs, so that libraries are no part of the memory
    next(iter(warm_up.train_dataloader()))
    checks[0] = 0.0
    module = getattr(data, kind)(rows, tokenizer, batch_size=64)
    _ = module.tokenizer
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is in use now
    before, own = resident("VmRSS"), resident("RssAnon")
    started = time.perf_counter()
    module.setup("fit")
    seconds = time.perf_counter() - started
    figures = {
        "seconds": seconds,
        "rows_per_second": (module.num_rows - module.num_left_out) / seconds,
        "held_mib": (resident("RssAnon") - own) / MIB,
        "peak_mib": (resident("VmHWM") - before) / MIB,
        "checks_share": checks[0] / seconds,
    }
    batches = iter(module.train_dataloader())
    next(batches)
    started = time.perf_counter()
    count = sum(1 for _ in zip(range(100), batches, strict=False))
    return {**figures, "batch_milliseconds": (time.perf_counter() - started) * 1000 / max(count, 1)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each data module, cold and warm, and write a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--tokenizer", help="folder of a tokenizer with a chat template (default: one trained here)")
    parser.add_argument("--results", type=Path, default=RESULTS / "data.jsonl", help="default: %(default)s")
    parser.add_argument("--one", nargs=3, metavar=("KIND", "ROWS", "TOKENIZER"), help="measure here, and print it")
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = folder / "rows.jsonl"
        write_rows(rows, options.rows)
        tokenizer = options.tokenizer or make_tokenizer(rows, folder / "tokenizer")
        environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "true"}
        for kind in options.kinds:
            command = [sys.executable, __file__, "--one", kind, str(rows), tokenizer]
            for variant in ("cold", "warm"):
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                figures = json.loads(done.stdout.splitlines()[-1])
                sizes = {"size": f"{options.rows} rows", "file_mib": rows.stat().st_size / MIB}
                lines.append({"benchmark": "data", "phase": kind, "variant": variant, **sizes, **figures})
    save(options.results, lines)


if __name__ == "__main__":
    main()
