"""A Lightning module and its Trainer."""

import sys

import lightning
import torch
from common import NUM_STEPS, batches, broken, keep, network
from torch import nn


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = network()

    def training_step(self, batch, index):
        x, labels = batch
        loss = nn.functional.cross_entropy(self.network(x), labels)
        self.log("train_loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer):
        broken(optimizer, self.global_step, "break" in sys.argv)

    def on_train_batch_end(self, outputs, batch, index):
        keep(self.state_dict(), index, outputs["loss"].item())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


lightning.seed_everything(0)
rows = list(batches(NUM_STEPS))
trainer = lightning.Trainer(
    max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(Classifier(), torch.utils.data.DataLoader(rows, batch_size=None))
