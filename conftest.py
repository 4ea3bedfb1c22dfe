"""What every test starts from: a quiet TensorFlow, the same random numbers, and processes where they pay."""

import gc
import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as where a shell has started the tests in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest


def pytest_xdist_auto_num_workers(config):
    """Returns 0, pytest's own process, for chosen tests: a worker takes seconds to start. Else xdist counts cores."""
    chosen = config.option.keyword or all(".py" in argument for argument in config.args)
    return 0 if chosen else None


def pytest_configure():
    gc.disable()  # a tenth of the time went into looking for garbage in the midst of tests; see `_collect`


def pytest_collection_finish():
    _collect()


def pytest_runtest_logfinish():
    _collect()


def _collect():
    """Collects what a test has left, and has Python search what stays, TensorFlow above all, never again.

    It is fast, and it ends `tf.data` iterators while they are young: one that dies old may miss, in a race of
    TensorFlow's threads, that it is to end, and keeps whoever deletes it waiting for up to a minute.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    import keras  # not in pytest's own process where workers run the tests

    keras.utils.set_random_seed(0)
