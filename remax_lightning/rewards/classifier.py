"""A reward model: any sequence classifier of transformers with one label."""

from __future__ import annotations

import inspect
import string
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from torch import Tensor

from remax_lightning.config import WeightDType
from remax_lightning.distributed import agree_on_errors, num_ranks
from remax_lightning.errors import UserError, at_least, check_ranges
from remax_lightning.files import home_path
from remax_lightning.models.frozen import FrozenModel, Placement, check_placement
from remax_lightning.rewards.base import Reward
from remax_lightning.rewards.formats import DeepSpeedChatConfig, PadCutoff
from remax_lightning.rewards.loading import (
    ClassifierSource,
    LoadedClassifier,
    load_classifier,
    load_error,
    saved_template,
    saved_template_kwargs,
    tokenizer_location,
)
from remax_lightning.rewards.pooling import Pooling, choose_pooling, num_positions
from remax_lightning.types import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from remax_lightning.data.chat_templates import ChatRenderer

_KEY = "model.reward.init_args"


class ClassifierReward(Reward):
    r"""Scores the whole conversation with a reward model, read at its last real token.

    Args:
        path: folder or hub name of a reward model with its tokenizer: an `AutoModelForSequenceClassification` with
            one label (TRL's and `RewardModelModule`'s too), a reward model of DeepSpeed-Chat or OpenRLHF, a language
            model with TRL's value head, or a PEFT adapter.
        template: how prompt and response become one text, such as `"{prompt}{response}{eos}"`; `{eos}` is the
            tokenizer's end-of-sequence token. A classifier of pairs (BERT and its like) has its separator between them,
            as in `"{prompt}[SEP]{response}"`, and is given the pair's `token_type_ids`. Left out, it is the one that
            `RewardModelModule` has saved with the model, or else the reward model's own chat template is used: over
            the messages that the policy's prompt was made of, whatever their column, and over a plain prompt as one
            message of the user.
        batch_size: texts scored at once.
        max_length: most tokens of a text; longer ones lose their beginning. Left out, what model and
            tokenizer can hold.
        dtype: of the weights; left out, as they are saved.
        trust_remote_code: whether code that comes with the model is run.
        allow_pickle: whether weights may be read from a `.bin` file (then with `weights_only=True`) where
            there are no safetensors.
        revision: branch, tag or commit on the hub.
        placement: where the model is kept between its passes: `replicate`, whole on every device; `shard`, its
            layers in equal shares over all devices, gathered one at a time; `cpu`, in the host's memory, brought
            to the device whole to score a rollout.
        normalize: whether scores are normalized where the model's configuration has a `mean` and a `std`, as OpenRLHF
            saves them and `RewardModelModule` where the weights cannot hold them.
        deepspeed_chat: what a reward model of DeepSpeed-Chat was trained with.

    Raises:
        UserError: if `template` has other fields than prompt, response and eos, or a number is too small.
    """

    def __init__(
        self,
        path: str,
        template: str | None = None,
        batch_size: Annotated[int, at_least(1)] = 8,
        max_length: Annotated[int | None, at_least(2)] = None,
        dtype: WeightDType | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        revision: str | None = None,
        placement: Placement = "replicate",
        normalize: bool = True,
        deepspeed_chat: DeepSpeedChatConfig | None = None,
    ) -> None:
        if template is not None:
            check_template(template, f"{_KEY}.template")
        check_ranges(ClassifierReward.__init__, locals(), _KEY)
        check_placement(placement, f"{_KEY}.placement")
        self.path = home_path(path)
        self.template = template
        self.batch_size = batch_size
        self.max_length = max_length
        self.dtype = dtype
        self.trust_remote_code = trust_remote_code
        self.allow_pickle = allow_pickle
        self.revision = revision
        self.placement = placement
        self.normalize = normalize
        self.deepspeed_chat = deepspeed_chat
        self.num_truncated = 0
        self.model: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._frozen: FrozenModel | None = None
        self._pooling: Pooling | None = None
        self._cutoff: PadCutoff | None = None
        self._reads_types = False
        self._text_template = template
        self._template_kwargs: dict[str, Any] = {}
        self._renderer: ChatRenderer | None = None

    def load(self, device: torch.device) -> None:
        """Load tokenizer and model, frozen and in eval mode, to run on `device`.

        Raises:
            UserError: if they cannot be loaded or do not fit one another, if the model has no score head or
                more than one label, or if there is neither a template nor a chat template.
        """
        # ---- Tokenizer and model, which must fit one another ----
        source = self._source()
        if self.tokenizer is None:
            self.tokenizer = self._load_tokenizer(source)
        loaded = load_classifier(source)
        model: Any = loaded.model
        self.model = model
        model.config.use_cache = False  # nothing is generated
        num_embeddings, num_tokens = model.get_input_embeddings().num_embeddings, len(self.tokenizer)
        if num_tokens > num_embeddings:
            raise UserError(
                f"{_KEY}.path: expected a tokenizer of at most {num_embeddings} tokens, the model's embeddings, got "
                f"{num_tokens} in {self.path}; save the reward model's own tokenizer there"
            )
        # ---- What can be read: length, padding, types of tokens ----
        if self.max_length is None:
            # Tokenizers without a limit say 10^30; some configurations say nothing.
            limits = (self.tokenizer.model_max_length, num_positions(model, model.config))
            self.max_length = min((n for n in limits if n is not None and 1 < n < 10**9), default=None)
        self._cutoff = self._pad_cutoff(loaded, self.tokenizer)
        if model.config.get_text_config().pad_token_id is None:
            model.config.get_text_config().pad_token_id = self._pad_id  # without one it refuses batches
        # What RewardModelModule trains has never seen token types: it is scored without them as well.
        self._reads_types = reads_token_types(model, self.tokenizer) and saved_template(source) is None
        # ---- Where the score is read, found by a probe ----
        self.waits_for_ranks = self.placement == "shard" and num_ranks() > 1
        self._frozen = FrozenModel(model, self.placement, f"{_KEY}.placement")
        self._frozen.place(device)
        with self._frozen.running():
            self._pooling = choose_pooling(model, self.tokenizer.all_special_ids)

    def _source(self) -> ClassifierSource:
        return ClassifierSource(
            self.path,
            _KEY,
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            allow_pickle=self.allow_pickle,
            normalize=self.normalize,
        )

    def _pad_cutoff(self, loaded: LoadedClassifier, tokenizer: PreTrainedTokenizerBase) -> PadCutoff | None:
        key = f"{_KEY}.deepspeed_chat"
        if loaded.kind == "deepspeed_chat":
            return PadCutoff(self.deepspeed_chat or DeepSpeedChatConfig(), tokenizer, loaded.model.config, key)
        if self.deepspeed_chat is not None:
            raise UserError(f"{key}: {self.path} was not saved by DeepSpeed-Chat; remove the key")
        return None

    @torch.no_grad()
    def score(self, prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict[str, Any]]) -> Tensor:
        """Return the reward model's `[M]` float32 scores, on its device."""
        if self.model is None or self._frozen is None or self._pooling is None:
            raise RuntimeError("ClassifierReward.load(device) must be called before score")
        # In shares, passes are collectives: whatever one rank cannot read ends all of them before.
        with agree_on_errors() if self.waits_for_ranks else nullcontext():
            texts = [self.text(*example) for example in zip(prompts, responses, rows, strict=True)]
            ids = [self._token_ids(text) for text in texts]  # M lists of different lengths
            types = [self._token_types(*pair) for pair in zip(texts, ids, strict=True)] if self._reads_types else None
        # Texts of like length together: less padding. Each score goes back to where its text stood.
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        with self._frozen.running():
            device = cast(torch.device, self._frozen.device)
            scores = torch.zeros(len(ids), dtype=torch.float32, device=device)
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                input_ids, mask = _pad_right([ids[index] for index in batch], self._pad_id, device)  # [b, T]
                batch_types = None if types is None else _pad_right([types[i] for i in batch], 0, device)[0]  # [b, T]
                scores[batch] = self._pooling(self.model, input_ids, mask, batch_types)  # [b]
        return scores

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Render prompts as `score` will; only the tokenizer is loaded for it.

        Raises:
            UserError: if there is neither a template nor a chat template.
            DataError: if the chat template refuses or leaves out a message; the message names line and role.
        """
        if self.tokenizer is None:
            self.tokenizer = self._load_tokenizer(self._source())
        for prompt in prompts:
            self.text(prompt, "a response", {})
            if self._text_template is None:
                # Of what the policy writes later nothing is asked; here the response has to be there, too.
                assert self._renderer is not None
                conversation = self._conversation(prompt)._replace(tools=[])
                self._renderer.whole(conversation, {"role": "assistant", "content": "a response"})

    def text(self, prompt: str, response: str, row: dict[str, Any]) -> str:  # noqa: ARG002 - for subclasses
        """Return what the reward model reads: the conversation that the policy was given, and its response.

        Raises:
            DataError: if the reward model's chat template refuses or leaves out a message of it.
        """
        from remax_lightning.data.chat_templates import ChatRenderer  # late: the folder loads much
        from remax_lightning.data.conversations import with_opened_thought

        assert self.tokenizer is not None
        if self._text_template is not None:
            return self._text_template.format(prompt=prompt, response=response, eos=self.tokenizer.eos_token or "")
        if self._renderer is None:
            self._renderer = ChatRenderer(self.tokenizer, name=f"the chat template of the reward model {self.path}")
        message = {"role": "assistant", "content": with_opened_thought(prompt, response)}
        return self._renderer.whole(self._conversation(prompt), message, is_generated=True)

    def _conversation(self, prompt: str) -> Conversation:
        """Return the messages that the policy was given; no column of the row stands in for them."""
        conversation = getattr(prompt, "conversation", None)
        if conversation is None:
            conversation = Conversation([{"role": "user", "content": str(prompt)}])
        # Variables of the policy's template mean nothing to this one, which has those that it was trained with.
        return conversation._replace(template_kwargs=self._template_kwargs)

    def _token_ids(self, text: str) -> list[int]:
        """Return the ids of `text`, its beginning cut off where it is too long."""
        from remax_lightning.data.conversations import conversation_ids  # late: the folder loads much

        assert self.tokenizer is not None
        (ids,) = conversation_ids(self.tokenizer, [text], is_chat=self._text_template is None)
        if self._cutoff is not None:
            ids = self._cutoff.cut(ids)
        first = (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id)
        if self.max_length is not None and len(ids) > self.max_length:
            self._count_truncated(len(ids))
            # The first token stays if it is a special one: encoders read their score there.
            start = ids[:1] if ids[0] in first else []
            ids = start + ids[len(ids) - self.max_length + len(start) :]
        return ids or [self._pad_id]  # an empty text still has a score: that of its end

    def _token_types(self, text: str, ids: list[int]) -> list[int]:
        """Return which part of a pair each of `ids`, the tokens of `text`, belongs to, as the tokenizer says it.

        Prompt and response are a pair where the template puts the tokenizer's separator between them.
        """
        tokenizer: Any = self.tokenizer
        # "question[SEP]answer" -> types 0 0 0 1 1, as the tokenizer gives them to a pair of texts
        parts = text.split(tokenizer.sep_token, 1) if tokenizer.sep_token else [text]
        # A separator at the very end is the tokenizer's own, and begins no second part.
        for pair in ([part for part in parts if part], [text]):
            encoded = tokenizer(*pair, verbose=False)
            types = list(encoded.get("token_type_ids", ()))
            if len(types) >= len(ids) and encoded["input_ids"][len(types) - len(ids) + 1 :] == ids[1:]:
                # What was cut off stood behind the first token, if that is a special one, and at the start otherwise.
                return [
                    types[0] if ids[0] == encoded["input_ids"][0] else types[-len(ids)],
                    *types[len(types) - len(ids) + 1 :],
                ]
        return [0] * len(ids)

    def _count_truncated(self, length: int) -> None:
        self.num_truncated += 1
        if self.num_truncated == 1:
            warnings.warn(
                f"the reward model {self.path} reads at most {self.max_length} tokens, a text has {length}; "
                "texts that are too long lose their beginning. Shorten prompts or responses, or raise "
                f"{_KEY}.max_length if the model holds more. (Said once; `num_truncated` counts on.)",
                stacklevel=4,
            )

    @property
    def _pad_id(self) -> int:
        """What fills a batch. Any token would do, because only the mask decides what is real."""
        assert self.tokenizer is not None
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in known if token is not None), 0)

    def _load_tokenizer(self, source: ClassifierSource) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        home, revision = tokenizer_location(source)
        options = {"revision": revision, "trust_remote_code": self.trust_remote_code}
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(home, **options)
        except Exception as error:
            raise load_error(source, "tokenizer", error) from error
        # Without tokenizer files some model families get an empty tokenizer and no error.
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise UserError(f"{_KEY}.path: no tokenizer in {self.path}; save the reward model's own there")
        self._text_template = self.template or saved_template(source)
        self._template_kwargs = saved_template_kwargs(source)
        if self._text_template is None and tokenizer.chat_template is None:
            raise UserError(
                f"{_KEY}.template: the tokenizer of {self.path} has no chat template; say how the model "
                'reads a conversation, for example template: "Human: {prompt}\nAssistant: {response}"'
            )
        return tokenizer


def reads_token_types(model: Any, tokenizer: Any) -> bool:
    """Whether a model tells the two parts of a pair apart by `token_type_ids`, and its tokenizer makes them."""
    more_than_one = getattr(model.config, "type_vocab_size", 0) > 1
    return (
        more_than_one
        and "token_type_ids" in tokenizer.model_input_names
        and "token_type_ids" in inspect.signature(model.forward).parameters
    )


def check_template(template: str, key: str) -> None:
    """Refuse a template whose fields are not among prompt, response and eos, or that has no response.

    Args:
        template: the text with its fields in braces.
        key: the configuration key or option, for messages.

    Raises:
        UserError: if it cannot be used.
    """
    expected = f"{key}: expected a text with {{prompt}}, {{response}} and {{eos}}, other braces doubled"
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise UserError(f"{expected}, got {template!r}: {error}") from error
    if "response" not in fields or set(fields) - {"prompt", "response", "eos"}:
        raise UserError(f"{expected}, got {', '.join(map(repr, fields)) or 'no field'} in {template!r}")


def _pad_right(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and mask, `[b, T]` each. On the right: every architecture then counts positions from 0."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask
