"""Settings of all tests."""

import os
import shutil
import signal
import tempfile

import hypothesis

from tests.xla_flags import FAST_TO_COMPILE

# Compilation makes first examples slow, hence no deadline. A commit is always judged by the same examples.
hypothesis.settings.register_profile('project', deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile('project')

# A shell may start background processes with SIGINT ignored, nohup with SIGHUP, and their children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config):
    """Keep the caches of a session in a temporary folder, which xdist's workers and subprocesses inherit."""
    # JAX does not write its cache atomically; what it cannot read because another process writes it, it compiles.
    config.addinivalue_line('filterwarnings', 'ignore:Error reading persistent compilation cache')
    # After a save that fails, Orbax awaits no coroutine, which Python says during whatever test it collects them in.
    config.addinivalue_line('filterwarnings', r"ignore:coroutine '\w+\._\w+' was never awaited:RuntimeWarning")
    if 'PYTEST_XDIST_WORKER' in os.environ:
        return
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    os.environ.setdefault('MPLCONFIGDIR', os.path.join(cache, 'matplotlib'))  # its list of fonts takes seconds to make
    os.environ['XDG_CACHE_HOME'] = folder = tempfile.mkdtemp(prefix='diffusion-tests-')
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    # Compilation is most of the suite's time: each program is compiled once for all tests, processes included, and
    # without optimization, except for the tests that run their programs longer than they compile them.
    if config.option.markexpr != 'optimized':
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {FAST_TO_COMPILE}'.strip()
    os.environ['JAX_COMPILATION_CACHE_DIR'] = os.path.join(folder, 'compiled')
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
