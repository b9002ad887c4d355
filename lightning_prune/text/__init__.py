"""Train language models on text: a LightningModule and its data."""
