"""The conformance suite: one list of requests, every way the system can run, compared bit for bit.

`plain` is the reference, `ways` and `gateway` the named ways, `scenario` and `search` the random ones,
`python -m tests.conformance` runs them all. docs/conformance.md says how to read what it prints.
"""
