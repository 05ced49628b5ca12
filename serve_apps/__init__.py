"""HTTP endpoints: Ray Serve applications."""

import gc

# Ray Serve LLM imports half a million objects that stay. Python looks through them for garbage after every 700 new
# ones, which is a seventh of the import, in each process of a starting application.
gc.set_threshold(50_000)
