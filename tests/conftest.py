import os

# The variable is read at import; a developer's own setting must not affect the tests.
os.environ.pop("LITEVAE_BACKEND", None)
