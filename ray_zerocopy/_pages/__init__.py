"""Memory mappings of the process, and the files behind them. Linux only; imports neither torch nor Ray."""
