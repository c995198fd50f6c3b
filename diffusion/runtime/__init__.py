"""What a run stands on: devices, checkpoints, logs, signals."""
