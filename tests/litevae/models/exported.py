"""A script: exports the model in a folder and prints the errors of the files. Arguments: model, folder, format.

A process in which OpenVINO has run crashes when it gets a signal later, as those of other tests do.
"""

import json
import sys
from pathlib import Path

import torch

from litevae import LiteVAE
from litevae.models.export import compare_exported, export_model

torch.set_num_threads(1)
torch.manual_seed(0)
model = LiteVAE.from_pretrained(sys.argv[1])
files = export_model(model, Path(sys.argv[2]), sys.argv[3])
f = model.spatial_compression_ratio
images = [torch.randn(n, 3, height * f, width * f) for n, height, width in ((1, 2, 2), (3, 5, 3))]
print(json.dumps(compare_exported(model, files, sys.argv[3], "fp32", images)))
