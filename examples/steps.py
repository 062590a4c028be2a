# examples/steps.py: pays every line that has an equals sign, at the token that ends the line
from remax_lightning import Reward
from remax_lightning.data import load_tokenizer


class Steps(Reward):
    def __init__(self, tokenizer: str):
        self.tokenizer = load_tokenizer(tokenizer)

    def score(self, prompts, responses, rows):
        return [self.per_token(response.token_ids) for response in responses]

    def per_token(self, token_ids):
        rewards, line = [], ""
        for token_id in token_ids:
            line += self.tokenizer.decode([token_id])
            rewards.append(float("\n" in line and "=" in line))
            line = line.rpartition("\n")[2]
        return rewards
