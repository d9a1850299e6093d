"""A run whatever it trains: the loop, optimisers, several processes, checkpoints, loggers, memory.

Imports `core`, `config`, `networks` and what lies below. Read first: `experiment` (what a run is), `trainer` (the
loop), then `parallel` and `checkpoints`.
"""
