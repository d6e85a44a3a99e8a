"""One file for each protocol: its ROUTES, its bodies, and ``error_body``, an error in its own shape."""
