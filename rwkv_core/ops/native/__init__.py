"""Ops in C++ for CPUs: optional, compiled on this machine, chosen by ``impl="auto"`` once built.

``build`` compiles ``src/`` into a cache with whatever C++ compiler there is, in seconds; ``rwkv
build-native`` calls it. ``library`` loads the result and calls it. Each op's own ``native.py``
makes an operator of torch from it. Nothing is compiled, and no cache is looked at, on import.

The library is plain C functions over pointers and sizes, called through ctypes: it includes no
header of torch, so that it compiles in seconds and no change of torch's C++ can break it. One
symbol of torch's stable C interface is handed to it as a pointer, ``torch_parallel_for``: the
kernels run on torch's own threads, as many as ``torch.set_num_threads`` says. Work is divided over
heads or channels, never within a sum, so that results do not depend on the number of threads.

Every kernel is compiled for several instruction sets; which one runs is decided when the library is
loaded, so that a cache may be shared by machines of one architecture.
"""
