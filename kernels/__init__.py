"""Triton kernels, one family per file; each file holds its maths, its plain reference and its kernels."""
