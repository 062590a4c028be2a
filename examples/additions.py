# examples/additions.py: prompts made here; a DataModule has to yield PromptBatch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from remax_lightning import PromptBatch
from remax_lightning.data import load_tokenizer


class Additions(LightningDataModule):
    def __init__(self, tokenizer: str, batch_size: int = 32):
        super().__init__()
        self.tokenizer, self.batch_size = load_tokenizer(tokenizer), batch_size

    def train_dataloader(self):
        prompts = [f"{a}+{b}=" for a in range(100) for b in range(100)]
        return DataLoader(prompts, self.batch_size, shuffle=True, collate_fn=self.collate)

    def collate(self, prompts):
        encoded = self.tokenizer(prompts, padding=True, return_tensors="pt")
        return PromptBatch(encoded["input_ids"], encoded["attention_mask"].bool(), prompts, [{} for _ in prompts])
