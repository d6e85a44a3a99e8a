"""Models behind a server, used as models of this machine are: a client of ``edgellm serve`` and of servers like it.

``RemoteServer`` lists what is there and opens one; ``RemoteLLM`` has what a chat needs of an ``LLM``. What a server
sends is a stranger's: every size is bounded and every value is looked at.
"""
