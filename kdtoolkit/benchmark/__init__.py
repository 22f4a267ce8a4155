"""Benchmarks: a suite is trained in worker processes and compared on a leaderboard; `benchmarks/` measures speed."""
