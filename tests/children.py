"""Processes of their own, forked from a server that has imported TensorFlow and never used it: they start at once."""

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tapekit"])
