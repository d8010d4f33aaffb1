import json
import os
import re

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from litevae.errors import UserError
from litevae.models.layers import OLD_ATTENTION_NAMES
from litevae.models.weight_files import (
    WEIGHTS,
    find_weights,
    list_weights,
    read_index,
    read_weights,
    weight_files,
)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )


def with_old_names(weights):
    """Returns weights as diffusers named them before version 0.15."""
    for new, old in OLD_ATTENTION_NAMES.items():
        weights = {
            name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): x for name, x in weights.items()
        }
    return weights


def in_original_layout(weights, prefix=""):
    """Returns weights as Stable Diffusion's own code names and shapes them."""
    blocks = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("decoder.up_blocks."))
    original = {}
    for name, x in weights.items():
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
        name = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name
        )
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = re.sub(r"to_([qkv])\.", r"\1.", name).replace("to_out.0", "proj_out")
            x = x[..., None, None] if x.ndim == 2 else x
        original[prefix + name] = x
    return original


def write(form, vae, folder):
    """Writes the weights in a form that is published, and returns the path to load."""
    weights = {name: x.clone() for name, x in vae.state_dict().items()}
    if form == "folder":
        vae.save_pretrained(folder)
        return folder
    if form in ("bin", "fp16", "fp16 bin", "parts", "fp16 parts"):
        options = {"safe_serialization": "bin" not in form, "variant": "fp16" if "fp16" in form else None}
        vae.save_pretrained(folder, max_shard_size="20KB" if "parts" in form else "10GB", **options)
        return folder
    if form == "old names":
        vae.save_config(folder)
        save_file(with_old_names(weights), folder / WEIGHTS)
        return folder
    path = folder / "vae.safetensors"
    if form == "file":
        save_file(weights, path)
    elif form == "original file":
        save_file(in_original_layout(weights), path)
    elif form == "checkpoint":
        content = in_original_layout(weights, "first_stage_model.") | {
            "model.diffusion_model.w": torch.zeros(1)
        }
        path = folder / "model.ckpt"
        torch.save({"state_dict": content, "global_step": 5}, path)
    return path


FORMS = [
    "folder",
    "bin",
    "fp16",
    "fp16 bin",
    "parts",
    "fp16 parts",
    "old names",
    "file",
    "original file",
    "checkpoint",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_weights(vae, tmp_path, form):
    weights = read_weights(write(form, vae, tmp_path), "init")
    expected = vae.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], x) for name, x in expected.items())


@pytest.mark.parametrize("form", ["original file", "checkpoint"])
def test_the_original_layout_is_what_diffusers_reads(vae, tmp_path, form):
    vae.save_config(tmp_path)
    loaded = AutoencoderKL.from_single_file(str(write(form, vae, tmp_path)), config=str(tmp_path))
    assert all(torch.equal(loaded.state_dict()[name], x) for name, x in vae.state_dict().items())


def test_the_best_form_in_a_folder_is_taken(vae, tmp_path):
    names = [
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.bin.index.json",
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.safetensors.index.json",
        WEIGHTS,
    ]
    for name in names:
        (tmp_path / name).touch()
        assert find_weights(tmp_path)[0] == tmp_path / name
    assert find_weights(tmp_path)[1] is None
    for name in names[1:]:
        (tmp_path / name).unlink()
    for other in (
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model.fp16-00001-of-00002.bin",
    ):
        (tmp_path / other).touch()
    assert set(list_weights(tmp_path)) == {"fp16"}
    assert find_weights(tmp_path) == (tmp_path / names[0], "fp16")
    (tmp_path / "diffusion_pytorch_model.safetensors.index.ema.json").touch()
    with pytest.raises(UserError, match=r"several variants \(ema, fp16\): give the path of one file"):
        find_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", None, r"a\.safetensors: no such file"),
        ("a.safetensors", b"{", r"a\.safetensors: cannot be read"),
        ("a.ckpt", b"garbage", r"a\.ckpt: cannot be read: it is damaged"),
        ("a.ckpt", {"step": 3}, r"a\.ckpt: holds no tensors"),
        (
            "a.ckpt",
            {"state_dict": UserError("code")},
            "it is damaged, or holds other objects",
        ),
        ("diffusion_pytorch_model.bin.index.json", b"[]", "not an index of weights"),
        (
            "diffusion_pytorch_model.bin.index.json",
            b'{"weight_map": {"a": "../b.bin"}}',
            r"lists .*\.\./b\.bin",
        ),
        (
            "diffusion_pytorch_model.bin.index.json",
            b'{"weight_map": {"a": "b.bin"}}',
            r"b\.bin: no such file",
        ),
    ],
)
def test_damaged_files_are_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    source = tmp_path if path.suffix == ".json" else path
    with pytest.raises(UserError, match=f"^init: .*{message}") as caught:
        read_weights(source, "init")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_an_index_of_other_types_is_refused(tmp_path):
    for content in ({"weight_map": [1]}, {"weight_map": {"a": 1}}, {}, 3):
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="not an index of weights"):
            read_weights(tmp_path, "init")


def test_an_index_that_is_no_regular_file_is_refused(tmp_path):
    path = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    os.mkfifo(path)  # opening it would block
    with pytest.raises(UserError, match="not an index of weights"):
        read_index(path)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("part", [False, True])
def test_weights_that_are_no_regular_file_are_refused(vae, tmp_path, kind, part):
    vae.save_pretrained(tmp_path, max_shard_size="20KB" if part else "10GB")
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)  # opening it would block
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(UserError, match=rf"^init: .*{path.name}: not a regular file$"):
        read_weights(tmp_path, "init")
    with pytest.raises(UserError, match=r": not a regular file$"):
        weight_files(find_weights(tmp_path)[0])


def test_a_variant_can_be_asked_for(vae, tmp_path):
    vae.save_pretrained(tmp_path, variant="fp16")
    for name in ("diffusion_pytorch_model.safetensors.ema.index.json", WEIGHTS):
        (tmp_path / name).touch()
    for variant, name in (
        (None, WEIGHTS),
        ("fp16", "diffusion_pytorch_model.fp16.safetensors"),
        ("ema", "diffusion_pytorch_model.safetensors.ema.index.json"),
    ):
        assert find_weights(tmp_path, variant) == (tmp_path / name, variant)
    with pytest.raises(UserError, match="holds no weights of variant 'int8', only ema, fp16"):
        find_weights(tmp_path, "int8")
