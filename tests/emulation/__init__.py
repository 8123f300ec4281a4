"""A GPU that is none, for tests: :mod:`.build` and the headers run CUDA kernels, :mod:`.device` torch's tensors."""
