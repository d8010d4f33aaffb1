"""Calls of each operator's kernels: those that reach every kernel, and random ones.

A module has `COVERING`, the cases by name for each of "cuda" and "triton", `random_case`, and `check`, which runs a
case and compares it with the operator's reference or with torch.
"""
