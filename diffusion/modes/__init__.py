"""The values of --mode: one file each, with run(config, workdir) → exit status; compare.run takes two paths."""
