"""The command, however it is started: `diffusion` once installed, `python main.py`, or `python -m diffusion`."""

import os
import signal


def main() -> None:
    """Run the command in sys.argv, and exit; from the first line on, a signal ends it in one line."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they wait until something listens
    for stream in (0, 1, 2):  # a standard stream that is closed: the next file to be opened would take its place
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    from diffusion.runtime import interrupt

    interrupt.listen()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    from diffusion import cli

    cli.main()


if __name__ == '__main__':
    main()
