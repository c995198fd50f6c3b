"""What `--mode` can be: one file per mode, each with run(config, workdir) → exit status."""
