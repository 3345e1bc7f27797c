"""Speed, memory and error of fastcl and of its peers, side by side: ``python -m benchmarks``; docs/performance.md."""
