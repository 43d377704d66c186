"""How well the planner predicts what others measured: `python -m benchmarks.planner`."""
