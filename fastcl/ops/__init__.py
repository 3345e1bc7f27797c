"""Operators: a folder per family, a file per backend."""
