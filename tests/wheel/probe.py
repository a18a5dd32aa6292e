"""What a user types first, run by check_wheel.py inside an environment that holds the wheel and nothing else."""

import sys
from pathlib import Path

import timm
import torch
from PIL import Image

import lamzoo

assert Path(lamzoo.__file__).is_relative_to(sys.prefix), f"{lamzoo.__file__} is not the installed package"

image = Image.linear_gradient("L").convert("RGB")
image.save(sys.argv[1])

names = lamzoo.list_models()
assert {"lam_vit_micro", "vit_micro", "lam_vit_base"} <= set(names), names

for name in ("lam_vit_micro", "vit_micro"):
    model = lamzoo.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        logits = model(transform(image)[None])
    assert logits.shape == (1, model.num_classes), logits.shape
    assert logits.isfinite().all(), f"{name} gives {logits}"
    print(f"{name}: {tuple(logits.shape)}, class {logits.argmax().item()}")
