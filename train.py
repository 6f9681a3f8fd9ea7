"""Trains a detector: `python train.py [CONFIG] [--workdir W] [--any.field VALUE ...]`.

The same as `gfl-jax train`: see gfl_jax/train.py.
"""

if __name__ == "__main__":  # workers that import this file again import nothing else
    from gfl_jax.__main__ import program

    program("train")
