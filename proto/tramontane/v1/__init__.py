"""Generated from the .proto files beside it by proto/generate.py; see those for the contract."""
