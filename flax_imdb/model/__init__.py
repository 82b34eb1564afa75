"""The classifier, from token ids to logits."""
