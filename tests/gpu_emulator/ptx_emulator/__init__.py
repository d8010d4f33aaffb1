"""An emulated GPU for the tests: it runs the PTX of the CUDA and Triton kernels on the CPU.

The code under test is what a GPU would run, down to the virtual instructions. nvcc compiles
``csrc/<operator>/cuda.cu`` to PTX and to host code, and the host code's own launches go to a stand-in for the CUDA
runtime. Triton's compiler makes PTX for sm_90 (or another architecture) of each launch, and a stand-in for Triton's
driver runs it. Memory of the GPU is memory of the CPU.

It checks every access and every barrier:

- bounds: global memory within the tensors of the call, shared and local memory within what the kernel has;
- alignment of vectors, and writes to inputs;
- races: accesses of two threads to one byte of which one is a write, and that no barrier orders, in shared memory and,
  between all threads of a launch, in global memory (threads may write the same value, as Triton's replicas do);
- read-only loads (``ld.global.nc``) of what the launch writes;
- shared memory that nobody has written, which is NaN, and registers likewise;
- thread-block clusters: races in another block's shared memory, which only a barrier of the cluster orders; accesses
  to it beyond its bounds, before its block must have started, or after its block may have ended;
- copies (``cp.async``) and matrix products (``wgmma``) that run beside the program: use of their destination, or a
  change of what a product reads, before the wait; registers written after the last ``wgmma.fence``; stores that a
  tensor core reads without ``fence.proxy.async``; warps of a group that run different products;
- barriers that threads of a block reach at different places or not at all, and lanes that a shuffle names but lacks;
- limits: threads per block, launch bounds, shared memory, and whether the host asked for more than 48 KB of it.

It also counts instructions, and the sectors and lines of global memory that a warp's request touches.

It does not see: ptxas, so neither SASS nor registers nor spills; time; streams, graphs and concurrent kernels; caches
and the memory model beyond barriers. It refuses atomics, bulk copies, and matrix products of other types than float16
and bfloat16, as unknown. Sums of tensor cores are those of Ampere, which are the least exact. Approximate instructions
(``ex2.approx``, ``rcp.approx``) are as exact as the CPU's, where a GPU loses up to two units in the last place.

The C++ files: `ptx.h` has the instructions, `parser` reads a module, `arithmetic` computes, `memory` holds and checks
memory, `warp` runs the threads of a warp in lock step, `tensor_core` has the arithmetic and the layouts of matrices,
`asynchronous` runs copies and products, `grid` runs blocks and barriers, `cluster` those of a cluster, `emulator` has
the C interface, and `cuda_runtime` is the stand-in for the CUDA runtime. In Python, `build` compiles them, `emulator`
loads them, and `cuda` and `triton_driver` run the functions of `litevae_kernels/<operator>/native.py` and
``triton.py``.
"""
