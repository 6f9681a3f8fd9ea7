"""Reading PyTorch files, renaming their parameters, and finding pretrained backbones."""
