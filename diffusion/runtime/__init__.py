"""The machine that a run uses: devices and hosts, checkpoints, logs, signals, random keys, compiled programs."""
