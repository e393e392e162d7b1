"""Ray: places and starts processes, and never carries a step. The only package that imports ray."""
