"""The `shapes` data set: generated on first use, in COCO's format."""
