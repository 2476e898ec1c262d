"""Benchmarks of single operations (`op`) and of whole models (`model`), each checked first."""
