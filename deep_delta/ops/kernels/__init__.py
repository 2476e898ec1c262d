"""Triton kernels. Imported only where they run, so that triton stays optional."""
