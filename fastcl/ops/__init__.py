"""Operators: a folder for each family, a file for each backend."""
