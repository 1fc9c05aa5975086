#!/usr/bin/env python3
"""Makes the weights of LPIPS 0.1 for `hra` (--lpips-vgg, --lpips-alex): one safetensors file with the convolutions of
torchvision's network (`features.N.weight`, `features.N.bias`) and lpips' linear layers (`lin0.model.1.weight` ..).

    pip install torch torchvision lpips safetensors
    python tools/lpips_to_safetensors.py vgg lpips-vgg.safetensors        59 MB, of torchvision's download of 528 MB
    python tools/lpips_to_safetensors.py alex lpips-alex.safetensors      10 MB, of 233 MB

Without a connection, give torchvision's file (vgg16-397923af.pth, alexnet-owt-7be5be79.pth) with --backbone.
"""

import argparse
import importlib.util
import pathlib

import torch
from safetensors.torch import save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", choices=("vgg", "alex"))
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--backbone", type=pathlib.Path, help="state dict of torchvision's vgg16 or alexnet")
    given = parser.parse_args()

    if given.backbone:
        backbone = torch.load(given.backbone, map_location="cpu", weights_only=True)
    else:
        import torchvision

        make = {"vgg": torchvision.models.vgg16, "alex": torchvision.models.alexnet}[given.net]
        backbone = make(weights="IMAGENET1K_V1").state_dict()
    # Found without importing it, which would need packages that have nothing to do with these files.
    spec = importlib.util.find_spec("lpips")
    if spec is None:
        parser.error("the package lpips is not installed: pip install lpips")
    file = pathlib.Path(spec.origin).parent / "weights" / "v0.1" / f"{given.net}.pth"
    linear = torch.load(file, map_location="cpu", weights_only=True)

    tensors = {name: tensor for name, tensor in backbone.items() if name.startswith("features.")}
    tensors |= {name: tensor for name, tensor in linear.items() if name.startswith("lin")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, given.output, {"format": "pt"})
    print(f"{given.output}: {len(tensors)} tensors, {given.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
