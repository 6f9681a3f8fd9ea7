"""Data sets in the forms people have: each is read into what a COCO json says."""
