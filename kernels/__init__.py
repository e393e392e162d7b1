"""The operations of the model, one a file: what each computes and how, on the device at hand.

Every operation keeps the rule of rows: an output row depends on its own input row alone, bit for bit,
whatever the number of rows, of threads, or the share of the tensor that a rank holds.
Imports torch and triton alone.
"""
