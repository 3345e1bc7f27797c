"""The losses that people call: formulas of statistics, and what they share."""
