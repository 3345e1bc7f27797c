"""Cross-entropies of scores against prototypes."""
