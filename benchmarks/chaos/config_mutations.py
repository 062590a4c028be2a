"""Random mutations of a valid configuration, as typos, editors and strangers make them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.chaos.runs import ENOUGH, PROMPTS, Fixtures, stop_after
from benchmarks.chaos.warm import CODE, RIGHT, UNCLEAR, Outcome, Trial, command, judge

CONFIG = """\
# A run of two steps.
seed_everything: 0
trainer:
  accelerator: cpu
  devices: 1
  precision: 32-true
  max_steps: 2
  max_epochs: 3
  accumulate_grad_batches: 2
  gradient_clip_val: 1.0
  val_check_interval: 2
  limit_val_batches: 1.0
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
  deterministic: false
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args:
      save_dir: runs
      name: remax
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        every_n_train_steps: 1
        save_top_k: 1
        filename: "{step}"
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
model:
  class_path: ReMaxModule
  init_args:
    policy:
      path: POLICY # a folder
      dtype: float32
      gradient_checkpointing: false
      disable_dropout: true
      attn_implementation: sdpa
    reference:
      path: POLICY
      placement: replicate
    reward:
      class_path: WeightedReward
      init_args:
        parts:
          length:
            class_path: FunctionReward
            init_args:
              function: remax_lightning.rewards.verifiers.length_penalty
              arguments: {target: 2, coef: 0.5}
          right:
            class_path: FunctionReward
            init_args: {function: remax_lightning.rewards.verifiers.exact_match}
        weights: {right: 2.0, length: 0.5}
    sampling:
      max_response_length: 6
      min_response_length: 1
      num_samples: 2
      temperature: 1.0
      top_k: 0
      top_p: 1.0
      stop_strings: ["0"]
    kl_coef: 0.05
    kl:
      estimator: k1
      credit: to_go
      clamp: 10.0
      loss_coef: 0.01
    advantage:
      baseline: greedy
      gamma: 1.0
      reward_clip: 5
      whiten: false
      overlong: penalize
    loss:
      kind: clipped
      normalizer: tokens
      clip_range: 0.2
    rollout:
      class_path: remax_lightning.rollout.PairedEngine
    optimizer:
      class_path: torch.optim.AdamW
      init_args:
        lr: 1.0e-3
        betas: [0.9, 0.95]
        weight_decay: 0.1
    lr_scheduler:
      class_path: WarmupCosine
      init_args:
        warmup_steps: 1
        min_ratio: 0.1
    max_skipped_steps: 5
data:
  class_path: PromptDataModule
  init_args:
    path: ROWS
    prompt_column: prompt
    template: "{prompt}"
    val_size: 4
    batch_size: 4
    micro_batch_size: 2
    max_prompt_length: 16
    seed: 0
    loading:
      long_prompts: drop
      on_bad_row: error
      cache: true
      num_workers: 0
samples: {every_n_steps: 1, num_samples: 2}
kl_monitor:
  target_kl: 1.0
  adaptive: true
  horizon: 1000
collapse:
  window: 20
  action: warn
  max_kl: 100.0
export:
  best: true
  last: true
  monitor: val/reward
  mode: max
evaluation:
  at_start: true
  num_resamples: 20
tensorboard: {every_n_steps: 1}
"""

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 0.5, -0.5, 1e-30, 1e30, 2**31, 2**63, 10**40, float("nan"), float("inf"),
    float("-inf"), "", " ", "auto", "none", "null", "two", "1,2", "1e-3", "-1", "nan", "0x10", "1_000", "12:30:45",
    "2020-01-01", "yes", "x" * 5000, "é", "日本", "\x00", "\ud83d", "\u202e", "../..", "/nowhere/x", "/dev/null",
    "/dev/full", "/proc/self/mem", "{prompt}", "{nothing}", "{prompt", "{0}", "{prompt.__class__}", "%s", "${HOME}",
    "$(id)", "os.system", "nowhere.Mine", "torch.nn.Linear", "remax_lightning", "torch.optim.SGD", "SFTModule",
    "PreferenceDataModule", "HuggingFaceEngine", "AutoEngine", "ClassifierReward", "bf16-mixed", "16-true", "gpu",
    "tpu", "last", "best", "fsdp", "ddp", "deepspeed", "eager", "flash_attention_2", "k2", "k3", "full", "mean",
    "group_mean", "leave_one_out", "one_step", [], {}, [None], [1, [2, [3]]], {"a": 1}, {1: 2}, {"": ""},
    {"class_path": "torch.nn.Linear"}, {"init_args": {}}, {"class_path": None, "init_args": None}, [1, 2, 3],
    ["a"] * 50, [-1], [float("nan")],
)  # fmt: skip
"""What a value is replaced by."""

TEXTS = (
    "&a [*a]", "*nothing", "!!python/object/apply:os.system ['touch MARK']", "!!python/name:os.system", "!!binary x",
    "!!timestamp 2001-12-14", "!!set {a, b}", "!!omap [a: 1]", "!local x", "&a {<<: *a}", "<<: {a: 1}", "? x",
    "|\n      text", ">", "|", "@x", "`x`", "%YAML 9.9", "---", "...", "- - - -", "{", "[", "]", "}", "'", '"', ":",
    "\t", "\u2028", "\x85", "\ufeff", "\x07", "# no", "=", "~", "1__0", "0o17", "1e3", "-.inf", ".nan", "+1", "0b11",
    "[" * 2000, "{a: " * 500, "&x [a, a, a, a, a, a, a, a, a]", "'it''s'", '"\\ud800"', '"\\x00"', "12e03", "on", "No",
)  # fmt: skip
"""Text that is put where a value stands."""

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
)


def trials(fixtures: Fixtures, seed: int, count: int) -> Iterator[Trial]:
    """Yield trials of mutated configurations."""
    for index in range(count):
        yield Trial("yaml", index, seed, partial(mutate_config, fixtures))


def mutate_config(fixtures: Fixtures, folder: Path, rng: random.Random) -> Outcome:
    """Mutate the configuration once or a few times, and begin a run with it."""
    rows = [{"prompt": f"{n}+{n}=", "response": str(2 * n)} for n in range(PROMPTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = CONFIG.replace("POLICY", str(fixtures.policy)).replace("ROWS", str(folder / "rows.jsonl"))
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutation = rng.choice(CONFIG_MUTATIONS)
        text = mutation(text, rng)
        names.append(mutation.__name__.strip("_"))
    text = text.replace("MARK", str(folder / "mark"))
    path = folder / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return begin(folder, ["fit", "--config", str(path)], ", ".join(names))


def begin(folder: Path, arguments: list[str], case: str) -> Outcome:
    """Begin a run and judge how that ended: it trains, or it says what is wrong."""
    ended = command(folder, *arguments, prepare=stop_after(3))
    outcome = judge(ended._replace(code=0) if ended.code == ENOUGH else ended)
    if (folder / "mark").exists():
        return Outcome(CODE, outcome.detail, case)
    if outcome.outcome == RIGHT and "remax: error:" in ended.text:
        return Outcome(UNCLEAR, "it goes on after an error", case)
    return outcome._replace(case=case)


def _spans(text: str) -> list[re.Match[str]]:
    """Return the values of a YAML text with a key before them."""
    return list(re.finditer(r"(?<=: )[^\n#{\[][^\n#,}]*", text))


def value(text: str, rng: random.Random) -> str:
    """Replace a value by one of another kind."""
    spans = _spans(text)
    if not spans:
        return text  # an earlier mutation left none
    place, chosen = rng.choice(spans), rng.choice(VALUES)
    try:
        new = yaml.safe_dump(chosen, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
    except ValueError:
        new = json.dumps(chosen)
    return text[: place.start()] + new + text[place.end() :]


def raw_text(text: str, rng: random.Random) -> str:
    """Replace a value by a piece of YAML, valid or not."""
    spans = _spans(text)
    if not spans:
        return text
    place, piece = rng.choice(spans), rng.choice(TEXTS)
    return text[: place.start()] + piece + text[place.end() :]


def node(text: str, rng: random.Random) -> str:
    """Replace any node of the tree, a group, too; or remove it, or move it to another key."""
    try:
        tree = yaml.safe_load(text)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError):
        return text
    places = list(nodes(tree))
    if not places:
        return text
    parent, key = rng.choice(places)
    action = rng.randrange(3)
    if action == 0:
        parent[key] = rng.choice(VALUES)
    elif action == 1:
        del parent[key]
    else:
        other, name = rng.choice(places)
        if isinstance(other, dict):
            other[name] = json.loads(json.dumps(parent[key], default=str))
    try:
        return yaml.safe_dump(tree, sort_keys=False)
    except (ValueError, yaml.YAMLError):
        return json.dumps(tree, default=str)


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the container and the key of every value in nested dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in list(items):
        yield tree, key
        yield from nodes(child)


def key_name(text: str, rng: random.Random) -> str:
    """Misspell a key, or give it another one's name."""
    keys = list(re.finditer(r"[A-Za-z_]+(?=:)", text))
    if not keys:
        return text
    place = rng.choice(keys)
    word = place[0]
    i = rng.randrange(len(word))
    changed = rng.choice(
        (word[:i] + word[i + 1 :], word[:i] + rng.choice("abcxyz_.-") + word[i:], word.upper(), rng.choice(keys)[0],
         f"{word} ", f"'{word}'", f"{word}.{word}", "init_args", "class_path", "1", "null", "? " + word, "__class__")
    )  # fmt: skip
    return text[: place.start()] + changed + text[place.end() :]


def line(text: str, rng: random.Random) -> str:
    """Remove, double, swap or indent a line."""
    lines = text.splitlines(keepends=True) or [""]
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    action = rng.randrange(6)
    if action == 0:
        del lines[i]
    elif action == 1:
        lines.insert(i, lines[i])
    elif action == 2:
        lines[i], lines[j] = lines[j], lines[i]
    elif action == 3:
        lines[i] = rng.choice(("  ", " ", "\t", "      ")) + lines[i]
    elif action == 4:
        lines[i] = lines[i][rng.choice((1, 2, 4)) :]
    else:
        lines.insert(j, lines[i])
    return "".join(lines)


def character(text: str, rng: random.Random) -> str:
    """Remove, insert or replace a character."""
    i = rng.randrange(max(len(text), 1))
    new = rng.choice((":", "-", "{", "}", "[", "'", '"', "\n", "\t", " ", "#", "&", "*", "!", "|", "%", "@", "0", "e",
                      "\x00", "\ud800", "é", chr(rng.randrange(32, 1000)), ""))  # fmt: skip
    return text[:i] + new + text[i + rng.randrange(2) :]


def cut(text: str, rng: random.Random) -> str:
    """End the file early, or leave a piece out."""
    i, j = sorted(rng.randrange(max(len(text), 1)) for _ in range(2))
    return text[:j] if rng.random() < 0.5 else text[:i] + text[min(j, i + 300) :]


def whole(text: str, rng: random.Random) -> str:
    """Make something else of the whole file."""
    return rng.choice(
        (f"{BOMB}\n{text}", f"{text}{BOMB}\n", f"--- {{}}\n---\n{text}", text.replace("\n", "\r\n"), f"\ufeff{text}",
         text.replace("  ", "\t"), f"- {text}", "", "null", "[]", "text", "%TAG ! tag:x\n---\n" + text, text * 2,
         text.replace(": ", ":"), json.dumps(text), "\x00" * 100, "&a " + text, text.encode("utf-16").decode("latin-1"),
         f"base: &base\n  a: 1\n{text}<<: *base\n", text.replace("model:", "model: &m", 1) + "copy: *m\n")
    )  # fmt: skip


CONFIG_MUTATIONS: tuple[Callable[[str, random.Random], str], ...] = (
    value, value, value, value, node, node, raw_text, raw_text, key_name, key_name, line, line, character, cut, whole,
)  # fmt: skip
