from collections.abc import Sequence

isa: str
compiler: str
openmp: bool
cuda_version: str
cuda_architectures: str
cuda_reason: str

class TensorView:
    def __init__(self, data: int, dtype: int, size: Sequence[int], stride: Sequence[int]) -> None: ...
