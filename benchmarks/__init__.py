"""Side-by-side benchmarks: ``pytest benchmarks/ --benchmark-only``, then ``python -m benchmarks.report``."""
