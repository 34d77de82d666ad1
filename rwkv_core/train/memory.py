"""Memory that one training step frees is kept for the next one."""

import ctypes

__all__ = ["keep_freed_memory"]

# mallopt(3) of glibc; 32 MiB is the largest threshold it takes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD, NEVER = 1 << 25, (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees; return whether its C library can be told so.

    A training step frees all its activations at its end. glibc gives such memory back to the
    system, and the next step waits while the same pages are mapped and zeroed again: some
    hundredths of its time on CPU. A tensor above 32 MiB is given back all the same.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # musl, macOS; Windows
        return False
    return bool(
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, NEVER)
    )
