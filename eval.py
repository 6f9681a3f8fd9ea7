"""Evaluates a checkpoint: `python eval.py FOLDER [--limit N] [--out DIR] [--any.field VALUE ...]`.

The same as `gfl-jax eval`: see gfl_jax/evaluate.py.
"""

if __name__ == "__main__":  # workers that import this file again import nothing else
    from gfl_jax.__main__ import program

    program("eval")
