"""Operations compiled for the CPU at hand: written as LLVM IR, compiled by the LLVM in Triton's library.

torch has no operator that multiplies 4-bit weights on AMX. Where the processor or Triton's library cannot
(`machine.supported`), nothing here is used and torch's operators serve.
"""
