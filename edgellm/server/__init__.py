"""``edgellm serve``: the models of this machine behind the protocols that clients speak.

One process, one event loop, no scheduler of its own: the engine batches, reuses prefixes and gives turns. A protocol is
a file of ``protocols/``; it translates bodies into a ``ChatRequest`` and events into its own words. Needs the extra
``server`` (starlette, uvicorn, msgspec); nothing else of edgellm imports this package.
"""
