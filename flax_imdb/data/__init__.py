"""Texts to batches: sources, the tokenizer, ragged ids."""
