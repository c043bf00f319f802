"""Align two frozen encoders with few, noisy pairs: the reference program of modest_align_kernels."""
