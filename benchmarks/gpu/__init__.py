"""What to run first wherever there is an NVIDIA GPU: proof of correctness, then speed, in calls of ten minutes.

The machine may be bare and without a network:

1. Where there is a network, ``python -m benchmarks.gpu.wheels FOLDER`` downloads the Python packages that the machine
   lacks. There, ``python -m pip install --no-index --no-deps --target SITE FOLDER/*.whl`` and ``PYTHONPATH=SITE``.
2. ``python -m benchmarks.gpu.validate 1`` builds the kernels and runs the CUDA kernels' tests and NVIDIA's checkers;
   ``2`` runs the Triton kernels' and the models' tests; ``3`` measures what decides the next work. These three are
   half an hour. ``4`` measures the rest and ``5`` trains, for which that half hour has no room. Each call ends within
   ten minutes, the build included, and may be repeated: it runs what has not passed with the present code. If the
   build fails, only the steps that need the CUDA kernels are skipped. A fresh machine with a GPU of the same name goes
   on from the results file (JSON) of the last one if that lies in its folder of results; a training starts anew there.
3. ``python -m benchmarks.report`` turns the results into REPORT.md and the README's tables.

``--dry-run`` rehearses a stage on a CPU: the tests are collected and not run, and the readings take tiny images. Its
results are marked and never reported.

``python -m benchmarks.gpu.traffic`` predicts the encoder's bytes and time from its shapes, ``python -m
benchmarks.gpu.clusters`` says which norms run in thread-block clusters, and ``python -m benchmarks.gpu.resources``
prints the registers and shared memory of the Triton convolution.
"""

GPU_ENCODERS = "encoders on a GPU"  # beginning of the subjects of the README's table of GPUs
