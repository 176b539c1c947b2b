"""The programs of mljax with a backbone, `tiny`, that compiles in a second.

python tests/tiny_program.py find_lr --config ... + main --config ...

runs one after the other in one process, with a line of "+" between their outputs.
"""

import sys

import jax
from flax import nnx

from mljax import find_lr, main
from mljax.models import BACKBONES
from mljax.models.batch_norm import BatchNorm
from mljax.models.layers import Conv


class Tiny(nnx.Module):
    num_features, head_hidden, head_activation = 16, 0, "relu"

    def __init__(self, *, rngs, dtype, drop_path, remat):
        self.conv = Conv(3, 16, 4, stride=4, dtype=dtype, rngs=rngs)
        self.bn = BatchNorm(16, dtype=dtype)

    def __call__(self, images, train=False, rngs=None):
        return jax.nn.relu(self.bn(self.conv(images), train))


PROGRAMS = {"find_lr": find_lr.main, "main": main.main}

if __name__ == "__main__":
    BACKBONES["tiny"] = Tiny
    rest = sys.argv[1:]
    while rest:
        end = rest.index("+") if "+" in rest else len(rest)
        (name, *flags), rest = rest[:end], rest[end + 1 :]
        if failed := PROGRAMS[name](flags):
            sys.exit(failed)
        print("+", flush=True)
