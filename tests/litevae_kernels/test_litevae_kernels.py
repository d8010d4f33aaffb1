import subprocess
import sys

import litevae_kernels


def test_public_names():
    assert sorted(litevae_kernels.__all__) == [
        "accelerate_vae",
        "conv3x3",
        "group_norm_silu",
        "haar_dwt2d",
        "haar_idwt2d",
        "haar_pyramid",
        "modulate_weight",
        "restore_vae",
        "self_modulated_conv2d",
        "use_backend",
        "wavedec2",
        "waverec2",
    ]


def test_kernels_import_neither_the_model_nor_diffusers():
    code = "import sys, litevae_kernels; print({'litevae', 'diffusers'} & {m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
