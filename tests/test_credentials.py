"""Names of options whose values are not published."""

from __future__ import annotations

import pytest

from remax_lightning.credentials import has_secret, hide_credentials, is_secret

SECRETS = (
    *("key", "keys", "api_key", "api_keys", "api-key", "apiKey", "APIKey", "OPENAI_API_KEY", "apikey", "secret_key"),
    *("aws_secret_access_key", "AWSAccessKeyId", "private_key", "account_key", "token", "tokens", "hf_token"),
    *("accessToken", "authtoken", "password", "passwd", "db_password", "passphrase", "credential", "headers"),
    *("subscription_key", "clientsecret", "dbpassword", "privatekey", "api_tokens", "prompt_key"),
    *("http_headers", "Authorization", "auth", "bearer", "--model.reward.init_args.api_key", "reward.headers.X-Custom"),
)
PLAIN = (
    *("token_env", "api_key_env", "password_env", "tokenizer", "tokens_per_micro_batch", "max_tokens", "token_ids"),
    *("pad_token", "eos_token", "stop_token", "max_new_tokens", "monkey", "author", "keyboard", "url", ""),
    *("per_token", "model.policy.path", "--trainer.max_steps"),
)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_known_by_its_name(name: str) -> None:
    assert is_secret(name)
    assert has_secret(f"{{path: x, {name.removeprefix('--')}: abc}}")
    assert has_secret(f'{{"{name.removeprefix("--")}": "abc"}}')


@pytest.mark.parametrize("name", PLAIN)
def test_other_options_are_shown(name: str) -> None:
    assert not is_secret(name)
    assert not has_secret(f"{{path: x, {name}: abc}}")


def test_addresses_keep_what_is_no_secret() -> None:
    address = "https://me:pw@host/x?q=a&token=abc&X-Amz-Signature=def&page=2 and http://b/?sig=1&userkey=2"
    assert hide_credentials(address) == (
        "https://***@host/x?q=a&token=***&X-Amz-Signature=***&page=2 and http://b/?sig=***&userkey=***"
    )
