"""Executes PTX on a CPU, instruction by instruction, with the checks that a GPU does not make.

`parser` reads a kernel, `instructions` gives each statement its meaning, `machine` runs warps, blocks and clusters with
the asynchronous units beside them (`tensor_memory`: bulk tensor copies, `tensor_cores`: WGMMA), `runtime` puts all that
behind the host code of csrc/cuda. A `Fault` stops the run: an access outside an allocation or misaligned, a barrier
that was not initialised or gets too many arrivals, divergence where a warp has to be together, a deadlock.

Simulated are values and orders, not time: a random number decides which warps go on and when asynchronous copies and
products complete. Assumed is that memory is coherent (a missing fence goes unnoticed) and that approximate functions
are exact to float32.
"""
