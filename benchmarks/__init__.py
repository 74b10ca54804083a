"""Benchmarks: each checks its operation first, prints a table, then one line of JSON."""
