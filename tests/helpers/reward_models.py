"""Tiny reward models as transformers, DeepSpeed-Chat, OpenRLHF and PEFT save them, and texts for them to score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import make_tokenizer, tiny_config, tiny_model
from safetensors.torch import save_file
from torch import Tensor

from remax_lightning.rewards import ClassifierReward

PLAIN = "Human: {prompt}\nAssistant: {response}</s>"
CHAT = (
    "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}</s>"
)
TEMPLATE = "Human: {prompt}\nAssistant: {response}{eos}"
PROMPTS = ["2+2=", "what is the sum of 123 and 456", "hi", "a much longer prompt " * 3, "x", "2+2="]
RESPONSES = ["4", "579", "hello there, you", "no", "", "five"]
ROWS: list[dict[str, Any]] = [{} for _ in PROMPTS]
EOS = 2
CPU = torch.device("cpu")


def encoder_config(name: str) -> Any:
    from transformers import BertConfig, DebertaV2Config, RobertaConfig

    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    rest = {"intermediate_size": 64, "max_position_embeddings": 256, "pad_token_id": 3}
    kinds = {"bert": BertConfig, "roberta": RobertaConfig, "deberta": DebertaV2Config}
    return kinds[name](**sizes, **rest)


def save_classifier(path: Path, config: Any, tokenizer: Any = None, num_labels: int = 1) -> str:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    config.num_labels = num_labels
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)  # scores far enough apart to tell tokens from one another
    model.save_pretrained(path)
    (tokenizer or make_tokenizer(chat_template=CHAT)).save_pretrained(path)
    return str(path)


def loaded(path: str | Path, **options: Any) -> ClassifierReward:
    reward = ClassifierReward(str(path), **options)
    reward.load(CPU)
    return reward


def body_of(family: str, seed: int = 0, **options: Any) -> Any:
    """A random transformer without a head, in the words of `AutoModel`."""
    from transformers import AutoModel

    config = tiny_config(family)
    for name, value in options.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    body = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in body.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return body


def opts_tokenizer() -> Any:
    """As OPT's: every text begins with the end-of-sequence token, which DeepSpeed-Chat pads with, too."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(pad_is_eos=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", EOS)])
    return tokenizer


def save_deepspeed_chat(
    folder: Path, body: Any, v_head: Tensor, tokenizer: Any, *, name: str = "rwtranrsformer", pickled: bool = True
) -> str:
    """What its `save_hf_format` writes: the state of its module in a `.bin` file, and the body's configuration."""
    folder.mkdir(exist_ok=True)
    body.config.pad_token_id = EOS
    body.config.save_pretrained(folder)
    state = {"v_head.weight": v_head, **{f"{name}.{key}": value for key, value in body.state_dict().items()}}
    if pickled:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file({key: value.clone() for key, value in state.items()}, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_openrlhf(folder: Path, body: Any, head: Tensor, prefix: str, **config: Any) -> str:
    body.config.architectures = ["RewardModel"]
    for name, value in config.items():
        setattr(body.config, name, value)
    body.config.save_pretrained(folder)
    state = {f"model.{key}": value.clone() for key, value in body.state_dict().items()}
    save_file({**state, f"{prefix}.weight": head}, folder / "model.safetensors", {"format": "pt"})
    make_tokenizer(chat_template=CHAT).save_pretrained(folder)
    return str(folder)


def save_adapter(tmp_path: Path, *, base_is_classifier: bool, with_head: bool = True, tokenizer: bool = True) -> str:
    """A LoRA adapter as PEFT saves it, of a base that is a language model or a reward model already."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = tmp_path / "base"
    if base_is_classifier:
        save_classifier(base, tiny_config("llama"))
    else:
        tiny_model("llama").save_pretrained(base)
        make_tokenizer().save_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    options = {"task_type": TaskType.SEQ_CLS, "modules_to_save": ["score"]} if with_head else {}
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    wrapped = get_peft_model(model, config)
    if with_head:
        torch.nn.init.normal_(wrapped.base_model.model.score.modules_to_save["default"].weight)
    wrapped.save_pretrained(tmp_path / "adapter")
    if tokenizer:
        make_tokenizer(chat_template=CHAT).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)
