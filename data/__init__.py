"""What the training scripts feed on: text, tokeniser, tokens, batches."""
