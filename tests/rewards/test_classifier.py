"""The oracle throughout: one text at a time, no padding, hidden state of the last token times the score weight."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_config, tiny_model
from helpers.reward_models import (
    CHAT,
    PLAIN,
    PROMPTS,
    RESPONSES,
    ROWS,
    Harmful,
    encoder_config,
    loaded,
    save_classifier,
)
from torch import Tensor

from remax_lightning.errors import DataError, UserError
from remax_lightning.rewards import ClassifierReward, WeightedReward, checked_scores
from remax_lightning.rewards.pooling import pool_by_model, pool_last_token, pool_unpadded
from remax_lightning.training.config_checks import check_text_length
from remax_lightning.types import Conversation, Prompt


def last_token_score(model: Any, ids: list[int]) -> Tensor:
    """Batch of one, hidden state of the last token times the weight of the head."""
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
    return (hidden.double() * model.score.weight[0].double()).sum().float()


def expected_scores(reward: ClassifierReward, texts: list[str], *, special: bool = True) -> Tensor:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(reward.path).eval()
    ids = [reward.tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]  # type: ignore[misc]
    return torch.stack([last_token_score(model, each) for each in ids])


def plain_texts() -> list[str]:
    return [f"Human: {p}\nAssistant: {r}</s>" for p, r in zip(PROMPTS, RESPONSES, strict=True)]


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["pad", "eos", "none"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "opt", "opt projected"])
def test_scores_are_those_of_the_unpadded_text(tmp_path: Path, family: str, pad: str, side: str) -> None:
    config = tiny_config(family.split()[0])
    config.pad_token_id = {"pad": 3, "eos": 2, "none": None}[pad]
    if family == "opt projected":  # hidden states leave the model with another width than they have in it
        config.word_embed_proj_dim = 16
    tokenizer = make_tokenizer(pad_is_eos=pad == "eos")
    tokenizer.padding_side = side
    if pad == "none":
        tokenizer.pad_token = None
    path = save_classifier(tmp_path, config, tokenizer)

    reward = loaded(path, template=PLAIN, batch_size=4)
    scores = reward.score(PROMPTS, RESPONSES, ROWS)
    expected = expected_scores(reward, plain_texts())
    assert reward._pooling is pool_last_token
    assert scores.dtype == torch.float32
    assert expected.std() > 0.05
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_transformers_own_pooling_would_differ_with_pad_as_eos(tmp_path: Path) -> None:
    """Why the score is not left to transformers: if this fails one day, `pooling.py` can go."""
    config = tiny_config("llama")
    config.pad_token_id = 2
    reward = loaded(save_classifier(tmp_path, config, make_tokenizer(pad_is_eos=True)), template=PLAIN)
    ids = torch.tensor([reward.tokenizer(plain_texts()[0])["input_ids"]])  # type: ignore[misc]
    with torch.no_grad():
        theirs = reward.model(ids).logits[0, 0]  # type: ignore[misc]
    ours = reward.score(PROMPTS[:1], RESPONSES[:1], ROWS[:1])[0]
    assert (theirs - ours).abs() > 1e-2


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_the_order_of_the_batch_is_restored(tmp_path: Path, batch_size: int) -> None:
    reward = loaded(save_classifier(tmp_path, tiny_config("llama")), template=PLAIN, batch_size=batch_size)
    order = torch.tensor([3, 0, 5, 2, 1, 4])
    first = reward.score(PROMPTS, RESPONSES, ROWS)
    second = reward.score([PROMPTS[i] for i in order], [RESPONSES[i] for i in order], ROWS)
    torch.testing.assert_close(second, first[order], rtol=1e-5, atol=1e-5)
    assert reward.score([], [], []).shape == (0,)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("name", ["bert", "roberta", "deberta"])
def test_encoders_score_as_their_own_forward_does_without_padding(tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForSequenceClassification

    path = save_classifier(tmp_path, encoder_config(name))
    reward = loaded(path, template=PLAIN, batch_size=3)
    assert reward._pooling is pool_by_model
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    ids = [reward.tokenizer(text)["input_ids"] for text in plain_texts()]  # type: ignore[misc]
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([each])).logits[0, 0] for each in ids])
    assert expected.std() > 1e-3
    torch.testing.assert_close(reward.score(PROMPTS, RESPONSES, ROWS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("pad_id", [2, 3])
def test_a_decoder_whose_head_has_another_name_is_scored_like_the_others(tmp_path: Path, pad_id: int) -> None:
    """CTRL pools by the pad id and calls its head `classifier`."""
    from transformers import AutoModelForSequenceClassification, CTRLConfig

    config = CTRLConfig(vocab_size=96, n_embd=32, dff=64, n_layer=2, n_head=2, n_positions=256)
    config.pad_token_id = pad_id
    path = save_classifier(tmp_path, config, make_tokenizer(pad_is_eos=pad_id == 2))
    reward = loaded(path, template=PLAIN)
    assert reward._pooling is pool_last_token
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    expected = []
    for text in plain_texts():
        ids = torch.tensor([reward.tokenizer(text)["input_ids"]])  # type: ignore[misc]
        with torch.no_grad():
            expected.append(model.classifier(model.transformer(ids).last_hidden_state)[0, -1, 0])
    torch.testing.assert_close(reward.score(PROMPTS, RESPONSES, ROWS), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.slow(0.3)
def test_a_model_that_reads_its_last_column_is_scored_row_by_row(tmp_path: Path) -> None:
    """XLNet wants its padding on the left; its head sees one token of each row."""
    from transformers import AutoModelForSequenceClassification, XLNetConfig

    config = XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=2, d_inner=64, pad_token_id=3)
    path = save_classifier(tmp_path, config)
    reward = loaded(path, template=PLAIN)
    assert reward._pooling is pool_unpadded
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    expected = []
    for text in plain_texts():
        ids = torch.tensor([reward.tokenizer(text)["input_ids"]])  # type: ignore[misc]
        with torch.no_grad():
            expected.append(model.logits_proj(model.sequence_summary(model.transformer(ids)[0]))[0, 0])
    torch.testing.assert_close(reward.score(PROMPTS, RESPONSES, ROWS), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.slow(0.3)
def test_scores_have_32_bits_in_a_run_of_16(tmp_path: Path) -> None:
    """In `bf16-true` Lightning runs a step with bfloat16 as the default dtype."""
    reward = loaded(save_classifier(tmp_path, tiny_config("llama")))
    expected = reward.score(PROMPTS, RESPONSES, ROWS)
    torch.set_default_dtype(torch.bfloat16)
    try:
        given = reward.score(PROMPTS, RESPONSES, ROWS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(given, expected)


@pytest.mark.slow(0.3)
def test_the_chat_template_is_used_without_a_template_and_writes_the_only_bos(tmp_path: Path) -> None:
    reward = loaded(save_classifier(tmp_path, tiny_config("llama")))
    text = reward.text("2+2=", "4", {})
    assert text == "<s>user: 2+2=\nassistant: 4\n</s>"
    assert reward._token_ids(text).count(1) == 1
    torch.testing.assert_close(reward.score(["2+2="], ["4"], [{}]), expected_scores(reward, [text], special=False))


def test_the_messages_of_the_prompt_are_read_and_no_column_of_the_row(tmp_path: Path) -> None:
    reward = loaded(save_classifier(tmp_path, tiny_config("llama")))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    prompt = Prompt("as the policy reads it", Conversation(messages))
    other = [{"role": "user", "content": "another question"}]
    wanted = "<s>system: be brief\nuser: hi\nassistant: yo\n</s>"
    for row in ({}, {"messages": other}, {"prompt": other}):
        assert reward.text(prompt, "yo", row) == wanted
        assert reward.text("hi", "yo", row) == "<s>user: hi\nassistant: yo\n</s>"
    assert len(messages) == 2


@pytest.mark.parametrize(
    ("end", "response", "content"),
    [
        ("<think>\n", "hm</think>4", "<think>\nhm</think>4"),
        ("<think>\n", "<think>hm</think>4", "<think>hm</think>4"),
        ("<think>\n", "4", "4"),
        ("<think>\n\n</think>\n\n", "4", "4"),
        ("[THINK]", "hm[/THINK]4", "[THINK]hm[/THINK]4"),
        ("", "hm</think>4", "hm</think>4"),
    ],
)
def test_a_thought_that_the_prompt_opens_is_part_of_the_message(
    tmp_path: Path, end: str, response: str, content: str
) -> None:
    make_tokenizer(chat_template=CHAT).save_pretrained(tmp_path)
    tiny_config("llama").save_pretrained(tmp_path)
    reward = ClassifierReward(str(tmp_path))
    prompt = Prompt(f"user: hi\nassistant: {end}", Conversation([{"role": "user", "content": "hi"}]))
    reward.check_prompts([prompt])
    assert reward.text(prompt, response, {}) == f"<s>user: hi\nassistant: {content}\n</s>"


@pytest.mark.slow(0.3)
def test_the_chat_template_has_the_variables_of_training_and_not_the_policys(tmp_path: Path) -> None:
    template = CHAT.replace("<s>", "<s>{{ style }} ")
    path = Path(save_classifier(tmp_path, tiny_config("llama"), make_tokenizer(chat_template=template)))
    prompt = Prompt("x", Conversation([{"role": "user", "content": "hi"}], template_kwargs={"style": "policy"}))
    assert loaded(path).text(prompt, "yo", {}).startswith("<s> user")
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"reward_chat_template_kwargs": {"style": "trained"}}))
    assert loaded(path).text(prompt, "yo", {}).startswith("<s>trained user")


def test_prompts_are_checked_with_the_tokenizer_alone(tmp_path: Path) -> None:
    """A role that the reward model's template refuses or skips is found before the model is loaded."""
    refusing = CHAT.replace(
        "{{ m['role'] }}", "{{ m['role'] if m['role'] != 'tool' else raise_exception('no tools') }}"
    )
    skipping = CHAT.replace("endfor", "endif %}{% endfor").replace("%}{{", "%}{% if m['role'] != 'tool' %}{{", 1)
    raising = CHAT.replace("{{ m['role'] }}", "{{ {'user': 'U', 'assistant': 'A'}[m['role']] + ': ' }}")
    prompt = Prompt("x", Conversation([*[{"role": role, "content": "hi"} for role in ("user", "tool")]], where="a, 7"))
    for name, template, message in (
        ("refusing", refusing, r"a, 7: the chat template of .* refuses message 1 \(role 'tool'\): no tools"),
        ("skipping", skipping, r"a, 7: the chat template of .* leaves out message 1 \(role 'tool'\)"),
        ("raising", raising, r"a, 7: the chat template of .* refuses message 1 \(role 'tool'\): .*'tool'"),
    ):
        make_tokenizer(chat_template=template).save_pretrained(tmp_path / name)
        tiny_config("llama").save_pretrained(tmp_path / name)
        reward = WeightedReward({"model": ClassifierReward(str(tmp_path / name))})
        reward.check_prompts(["plain", Prompt("x", Conversation(prompt.conversation.messages[:1]))])  # type: ignore[union-attr]
        with pytest.raises(DataError, match=message):
            reward.check_prompts([prompt])


@pytest.mark.slow(0.3)
def test_a_template_gets_one_bos_whether_it_writes_it_or_not(tmp_path: Path) -> None:
    path = save_classifier(tmp_path, tiny_config("llama"))
    without, with_bos = loaded(path, template="Q: {prompt} A: {response}"), loaded(path, template="<s>Q: {response}")
    assert without.text("p {x}", "r {y}", {"messages": []}) == "Q: p {x} A: r {y}"
    for reward in (without, with_bos):
        ids = reward._token_ids(reward.text("p", "r", {}))
        assert ids[0] == 1
        assert ids.count(1) == 1


def test_an_empty_text_has_a_score(tmp_path: Path) -> None:
    path = save_classifier(tmp_path, tiny_config("llama"), make_tokenizer(bos=False))
    scores = checked_scores(loaded(path, template="{response}"), ["p", "p"], ["", "a"], [{}, {}])
    assert scores.reward.isfinite().all()


@pytest.mark.slow(0.3)
def test_long_texts_lose_their_beginning_but_not_the_first_token(tmp_path: Path) -> None:
    reward = loaded(save_classifier(tmp_path, tiny_config("llama")), template=PLAIN, max_length=20)
    whole = reward.tokenizer(plain_texts()[3])["input_ids"]  # type: ignore[misc]
    with pytest.warns(UserWarning, match=r"at most 20 tokens, a text has \d+"):
        ids = reward._token_ids(plain_texts()[3])
    assert ids == [1, *whole[-19:]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        reward.score(PROMPTS[:2], RESPONSES[:2], ROWS[:2])
    assert reward.num_truncated == 3


def test_positions_that_are_counted_from_the_pad_token_are_fewer(tmp_path: Path) -> None:
    """RoBERTa's: 256 rows with pad token 3 hold 252 tokens, and a longer text ended the run."""
    reward = loaded(save_classifier(tmp_path, encoder_config("roberta")), template="{prompt}{response}")
    assert reward.max_length == 252
    with pytest.warns(UserWarning, match="reads at most 252 tokens"):
        assert reward.score(["a"], ["4 " * 300], [{}]).isfinite().all()
    assert reward.model is not None
    with pytest.raises(UserError, match="max_length 253 is more than the 252 positions that the reward model has"):
        check_text_length(reward.model, 253)
    check_text_length(reward.model, 252)


@pytest.mark.slow(0.3)
def test_the_default_limit_is_the_smaller_of_model_and_tokenizer(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=CHAT)
    assert loaded(save_classifier(tmp_path / "a", tiny_config("gpt2"), tokenizer)).max_length == 256
    tokenizer.model_max_length = 100
    assert loaded(save_classifier(tmp_path / "b", tiny_config("gpt2"), tokenizer)).max_length == 100


@pytest.mark.slow(0.3)
def test_the_model_is_frozen_in_eval_mode_and_of_the_wished_dtype(tmp_path: Path) -> None:
    path = save_classifier(tmp_path, tiny_config("llama"))
    reward = loaded(path)
    model: Any = reward.model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not reward.score(["p"], ["r"], [{}]).requires_grad
    half = loaded(path, dtype="bfloat16")
    assert half.model is not None
    assert half.model.dtype == torch.bfloat16
    assert half._pooling is pool_last_token
    scores = half.score(PROMPTS, RESPONSES, ROWS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward.score(PROMPTS, RESPONSES, ROWS), rtol=0.1, atol=0.3)


def test_score_before_load_is_refused() -> None:
    with pytest.raises(RuntimeError, match="load"):
        ClassifierReward("anywhere").score(["p"], ["r"], [{}])


@pytest.mark.parametrize("template", ["{prompt}", "{response} {x}", "{response.x}", "{}", "{response", "no field"])
def test_a_template_with_other_fields_is_refused_when_constructed(template: str) -> None:
    with pytest.raises(UserError, match=r"^model\.reward\.init_args\.template: expected a text with \{prompt\}"):
        ClassifierReward("anywhere", template=template)


@pytest.mark.parametrize("name", ["batch_size", "max_length"])
def test_numbers_that_are_too_small_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"init_args\.{name} must be (null or )?at least ., got 0"):
        ClassifierReward("anywhere", **{name: 0})


def test_more_than_one_label_is_refused(tmp_path: Path) -> None:
    path = save_classifier(tmp_path, tiny_config("llama"), num_labels=3)
    with pytest.raises(UserError, match=r"init_args\.path: expected .*one label, got .* with 3 labels"):
        loaded(path)


def test_a_language_model_is_refused(policy_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 labels"):
        loaded(policy_path, template=PLAIN)
    model = tiny_model("llama")
    model.config.num_labels = 1
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"init_args\.path: .* without score\.weight"):
        loaded(tmp_path, template=PLAIN)


def test_a_path_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"init_args\.path: .* cannot be loaded"):
            loaded(path, template=PLAIN)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # transformers makes up an empty tokenizer for GPT-2
def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, family: str) -> None:
    path = save_classifier(tmp_path, tiny_config(family))
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"init_args\.path: .*tokenizer"):
        loaded(path, template=PLAIN)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = save_classifier(tmp_path, tiny_config("llama", vocab_size=40))
    with pytest.raises(UserError, match=r"at most 40 tokens, .* got \d+"):
        loaded(path, template=PLAIN)


def test_neither_template_nor_chat_template_is_refused(tmp_path: Path) -> None:
    path = save_classifier(tmp_path, tiny_config("llama"), make_tokenizer())
    with pytest.raises(UserError, match=r"init_args\.template: the tokenizer .* has no chat template"):
        loaded(path)


def test_pickled_weights_are_read_only_if_allowed(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = save_classifier(tmp_path, tiny_config("llama"))
    expected = loaded(path).score(PROMPTS, RESPONSES, ROWS)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"convert the weights to safetensors, or set .*\.allow_pickle"):
        loaded(path)
    torch.testing.assert_close(loaded(path, allow_pickle=True).score(PROMPTS, RESPONSES, ROWS), expected)


def test_pickled_weights_that_run_code_are_refused_even_then(tmp_path: Path) -> None:
    path = save_classifier(tmp_path, tiny_config("llama"))
    (tmp_path / "model.safetensors").unlink()
    torch.save({"score.weight": Harmful(tmp_path / "touched")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        loaded(path, allow_pickle=True)
    assert not (tmp_path / "touched").exists()


def save_pair_classifier(path: Path) -> Any:
    """Save a BERT that reads pairs, and return its tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz?."
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    (path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast.from_pretrained(path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), max_position_embeddings=64, num_labels=1, initializer_range=0.5, **sizes
    )
    BertForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return tokenizer


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("max_length", [None, 12])
def test_a_classifier_of_pairs_is_told_which_part_is_the_response(tmp_path: Path, max_length: int | None) -> None:
    from transformers import AutoModelForSequenceClassification

    tokenizer = save_pair_classifier(tmp_path)
    reward = loaded(tmp_path, template="{prompt}" + tokenizer.sep_token + "{response}", max_length=max_length)
    pairs = [("who?", "me."), ("what was it", "a"), ("a", "that is so.")]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    expected, without = [], []
    for pair in pairs:
        encoded = tokenizer(*pair, return_tensors="pt")
        if max_length is not None and encoded["input_ids"].shape[1] > max_length:
            cut = encoded["input_ids"].shape[1] - max_length
            encoded = {name: torch.cat([value[:, :1], value[:, 1 + cut :]], 1) for name, value in encoded.items()}
        with torch.no_grad():
            expected.append(model(**encoded).logits[0, 0])
            without.append(model(encoded["input_ids"]).logits[0, 0])
    scores = reward.score([prompt for prompt, _ in pairs], [response for _, response in pairs], [{}] * 3)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert (torch.stack(expected) - torch.stack(without)).abs().min() > 1e-3
