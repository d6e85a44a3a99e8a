"""Bounds that requests are held to. Light: a server reads them before there is a model."""

MAX_SCALE = 1e4  # of an adapter, either way
MAX_ADAPTERS = 64  # of a kind, for one model
