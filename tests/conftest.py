"""Settings of all tests."""

import signal

import hypothesis

# Compilation makes first examples slow; and a suite that judges a commit draws the same examples each time.
hypothesis.settings.register_profile('project', deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile('project')

# What a shell starts in the background may ignore Ctrl-C, and so do the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
