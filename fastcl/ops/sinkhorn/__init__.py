"""Sinkhorn's algorithm: the operators, the solver, and each backend's passes."""
