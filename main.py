"""Train a diffusion model, sample it, or compute its likelihood: `python main.py --help`.

The same as the installed command `diffusion`; diffusion/cli.py has it all.
"""

from diffusion.__main__ import main

if __name__ == '__main__':
    main()
