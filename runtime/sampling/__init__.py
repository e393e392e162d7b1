"""How a token is chosen from a row of logits, and which parameters may ask for what.

`runtime.sampling.params` checks parameters and needs the standard library alone, so that a gateway
without torch can use it. `runtime.sampling.sampler` chooses tokens. This package imports neither for you.
"""
