"""The contract between the compiled core and the Python files. CMakeLists.txt reads it when the core is built."""

# Raise it whenever the arguments or the meaning of a function of the core change: `backend` then refuses a core that
# was built from other sources.
INTERFACE = 11

# Each operator has a folder of its name here and in csrc. `info` reports them in this order.
OPERATORS = ("haar", "group_norm_silu", "smc", "conv3x3")
