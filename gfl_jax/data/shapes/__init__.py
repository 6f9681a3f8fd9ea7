"""The `shapes` data set: made on the spot, in COCO's format."""
