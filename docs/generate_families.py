"""Write `families.md`, beside this file, from what the checks of the test suite find.

`python docs/generate_families.py`; a test refuses a page that is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from rollout.families import FAMILIES, Family, check_cells, engine_cells  # noqa: E402

PAGE = Path(__file__).with_name("families.md")

INTRODUCTION = """\
# Model families

<!-- Written by `python docs/generate_families.py` from what it measures: run it after a change. -->

Which rollout engine `AutoEngine` chooses, and that its responses are right, measured on tiny random models on a CPU.
Every check is made of the engine that is chosen and of `HuggingFaceEngine`, which can be set for any model; *yes* holds
for both. The choice looks at what the model keeps while decoding, not at its name.

- *greedy*: greedy responses equal `model.generate(do_sample=False)` token for token, on prompts of unequal lengths,
  padded on the left, some of whose responses end early. In bf16 each row is compared up to its first near-tie: rounding
  depends on how many rows a batch has, and may swap two tokens whose logits are closer than 0.1.
- *sampled*: first tokens, and second tokens given the first, follow the distribution that the model computes for the
  prompt without padding or cache: chi-square below its 99.9 % quantile, in fp32 and in bf16.
- *LoRA*: all of this again with a random adapter of PEFT on the attention, or on a projection of the state-space layer.
"""

HEADING = """\
| family | engine | why: the model | greedy, fp32 | greedy, bf16 | sampled | LoRA |
|---|---|---|---|---|---|---|
"""


def row(family: Family) -> str:
    """Return the line of the table that tells of `family`."""
    return "| " + " | ".join([family.name, *engine_cells(family), *check_cells(family)]) + " |"


def page(rows: list[str]) -> str:
    """Return the whole page."""
    return INTRODUCTION + "\n" + HEADING + "\n".join(rows) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page([row(family) for family in FAMILIES]), encoding="utf-8")


if __name__ == "__main__":
    main()
