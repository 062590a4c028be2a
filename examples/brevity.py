# examples/brevity.py: a reward as a class
from remax_lightning import Reward, UserError


class Brevity(Reward):
    def __init__(self, words: int = 50):
        if words < 1:
            raise UserError(f"model.reward.init_args.words must be at least 1, got {words}")
        self.words = words

    def score(self, prompts, responses, rows):
        return [-max(0.0, len(response.split()) / self.words - 1) for response in responses]
