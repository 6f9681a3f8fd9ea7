"""Data: datasets in the COCO format, their augmentation and their batching."""
