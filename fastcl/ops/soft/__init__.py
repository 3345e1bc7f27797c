"""Statistics over soft assignments: the operator and its backends."""
