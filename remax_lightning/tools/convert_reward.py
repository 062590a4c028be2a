"""`remax convert-reward`: convert a reward model of another project into a sequence classifier of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from remax_lightning.callbacks.export_policy import write_folder_atomically
from remax_lightning.cli_run import silence_library_warnings
from remax_lightning.errors import UserError
from remax_lightning.rewards.classifier import check_template
from remax_lightning.rewards.formats import DeepSpeedChatConfig, PadCutoff
from remax_lightning.rewards.loading import (
    ClassifierSource,
    LoadedClassifier,
    load_classifier,
    load_error,
    saved_template,
    tokenizer_location,
)
from remax_lightning.rewards.pooling import Normalization, fold_into_weights, score_head, score_layers
from remax_lightning.tools.export import check_target
from remax_lightning.tools.parsers import convert_reward_parser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "convert-reward"


def main(args: Sequence[str]) -> None:
    """Convert a reward model of OpenRLHF, DeepSpeed-Chat, TRL or PEFT into a plain sequence classifier.

    The folder loads with transformers' AutoModelForSequenceClassification and scores as the original does. A bias of
    the score head and a saved mean and std go into the weights where these can hold them, and into config.json
    otherwise. Adapters are merged into their base.

    Args:
        args: the arguments after `remax convert-reward`.

    Raises:
        UserError: if the source is not a reward model, or the target cannot be written.
    """
    # ---- Refuse what cannot be written, before gigabytes are read ----
    options = convert_reward_parser().parse_args(args)
    silence_library_warnings()
    out = check_target(options.out, Path(options.source), options.overwrite)
    if options.template is not None:
        check_template(options.template, "--template")
    source = ClassifierSource(
        options.source,
        KEY,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
    )
    # ---- Read, in whatever format ----
    tokenizer = _load_tokenizer(source)
    loaded = load_classifier(source)
    # ---- The template under which a plain classifier reads the same token ----
    template = options.template or saved_template(source)
    if loaded.kind == "deepspeed_chat":
        template = _strip_padding_end(template, options.pad_token, tokenizer, loaded)
    elif options.pad_token is not None:
        raise UserError(
            f"--deepspeed_chat.pad_token: {options.source} was not saved by DeepSpeed-Chat; remove the option"
        )
    # ---- Write ----
    write_folder_atomically(out, lambda folder: save_classifier(loaded, tokenizer, template, folder))
    print(f"Converted the reward model {options.source} ({loaded.kind}) to {options.out}.")


def save_classifier(
    loaded: LoadedClassifier, tokenizer: PreTrainedTokenizerBase, template: str | None, folder: Path
) -> None:
    """Write a reward model and its tokenizer in the format of transformers.

    Args:
        loaded: the reward model.
        tokenizer: the tokenizer to save with it.
        template: how prompt and response become one text; None where the tokenizer's chat template is used.
        folder: an empty folder.
    """
    model: Any = loaded.model
    model.eval()
    # The normalization of the score head goes into the weights. A few tokens show which layer can hold its mean.
    input_ids = torch.arange(4, device=model.device)[None]  # [1, 4]
    weights, remainder = fold_into_weights(
        dict(model.state_dict()), score_layers(model, input_ids), score_head(model), Normalization()
    )
    # OpenRLHF's settings hold no longer: the head is called `score`; weights and `remainder` have the normalization.
    settings = {"value_head_prefix": None, "normalize_reward": None, **remainder, "reward_template": template}
    for name, value in settings.items():
        if value is not None:
            setattr(model.config, name, value)
        elif hasattr(model.config, name):
            delattr(model.config, name)
    # Without a pad token transformers' own forward pass refuses batches.
    text_config = model.config.get_text_config()
    if text_config.pad_token_id is None:
        text_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def _load_tokenizer(source: ClassifierSource) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        home, revision = tokenizer_location(source)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            home, revision=revision, trust_remote_code=source.trust_remote_code
        )
    except UserError:
        raise
    except Exception as error:  # the hub and the libraries have no common base class
        raise load_error(source, "tokenizer", error) from error
    return tokenizer


def _strip_padding_end(
    template: str | None, pad_token: str | None, tokenizer: PreTrainedTokenizerBase, loaded: LoadedClassifier
) -> str | None:
    """Return the template without an end that DeepSpeed-Chat takes for padding.

    DeepSpeed-Chat scores the token before the first pad token, a plain classifier scores the last token of the text.
    Where it pads with the end-of-sequence token, both read the same token of a text without that end.
    """
    cutoff = PadCutoff(DeepSpeedChatConfig(pad_token=pad_token), tokenizer, loaded.model.config, "--deepspeed_chat")
    if cutoff.pad_id != tokenizer.eos_token_id:
        return template
    if template is None:
        print("DeepSpeed-Chat scores the token before the end-of-sequence token: leave {eos} out of the template.")
        return None
    return template.removesuffix("{eos}")
