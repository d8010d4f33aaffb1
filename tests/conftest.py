import os

# read at import; a developer's own setting must not reach the tests
os.environ.pop("LITEVAE_BACKEND", None)
