"""Statistics of contrastive logits: the operator, its backends, and what they exchange."""
