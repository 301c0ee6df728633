"""Training the hybrid and its baselines: the loop is that of every stage, hrm_model/training/loop.py."""
