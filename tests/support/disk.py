"""A disk on which nothing more than a few bytes of a file can be written."""

import resource
from contextlib import contextmanager


@contextmanager
def full_disk(n_bytes=16):
    """Let every write beyond a file's first bytes fail with an OSError, as the kernel does it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
