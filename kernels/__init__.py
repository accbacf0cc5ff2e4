"""Triton kernels, one family per file: the maths, a plain reference, and the kernels."""
