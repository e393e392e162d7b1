"""The model on a GPU: the same shards, units and rule as on a CPU, other operations and another step.

Imported only where ranks compute on a GPU (or interpret its kernels), since it brings Triton along:
`limits` apart, which headers are held to where there may be neither Triton nor torch.
"""
