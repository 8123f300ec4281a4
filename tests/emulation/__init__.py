"""A CUDA device that is none, for tests on machines without a GPU: see :mod:`emulation.device`."""
