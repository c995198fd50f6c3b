"""The values of --mode: one file each, with run(config, workdir) → exit status; compare.run takes two paths."""

import sys

if sys.argv[:1] == ['-m']:  # Python is looking for a module of this package, which would do nothing as a program
    sys.exit('error: a mode is run by `diffusion --mode=NAME` or `python main.py --mode=NAME`; --help lists them')
