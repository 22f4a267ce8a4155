"""The runner of `kd benchmark run`: trains a suite in worker processes and compares its rows on a leaderboard.

The top-level folder `benchmarks/` is something else: scripts that measure speed, and suites that each answer one
question.
"""
