"""The values of --mode: one file each, with run(config, workdir) → exit status; compare.run takes two paths."""

import sys

# `python -m diffusion.modes.train` imports this package first; the module itself would do nothing as a program.
if sys.argv[:1] == ['-m'] and any(name.startswith('diffusion.modes') for name in sys.orig_argv):
    sys.exit('error: a mode is run by `diffusion --mode=NAME` or `python main.py --mode=NAME`; --help lists them')
