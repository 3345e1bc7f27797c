"""Sums over pairs of functions of the logit or of the distance, with a derivative that depends on the pair alone."""
