"""The largest inner products: the operator and its backends."""
