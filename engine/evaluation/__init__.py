"""Benchmarks: prompt suites, lanes in worker processes that take turns, statistics and reports."""
