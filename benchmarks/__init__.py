"""Compares speed, memory and error of fastcl and its peers: ``python -m benchmarks``; see docs/performance.md."""
