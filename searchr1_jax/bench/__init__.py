"""Benchmarks: one file each, each a command that prints a table and, with --json, one JSON line."""
