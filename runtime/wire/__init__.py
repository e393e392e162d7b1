"""Length-prefixed msgpack over TCP: step plans to ranks, requests and outputs between gateway and engine.

Nothing here is ever pickled; a peer that does not know the group's token is hung up on.
"""
