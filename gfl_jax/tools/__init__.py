"""Programs besides training: the paper's tables, the claims behind them, and preflight."""
