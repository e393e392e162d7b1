"""The operations of a step on a GPU, one a file, as Triton kernels.

A GPU step fuses what a CPU step does in turn, so its operations are its own and not the CPU's under another
name. Both keep the rule of rows; what each computes is the same function up to the rounding that `numerics`
names. Under Triton's interpreter (TRITON_INTERPRET=1) every kernel runs on CPU tensors, which is how they are
tested where there is no GPU. Imports torch and triton alone.
"""
