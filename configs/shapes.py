"""Pictures drawn on the fly: needs no data and no weights.

python -m mljax.main --config configs/shapes.py --workdir runs/shapes

`:debug` is one short epoch.
"""

from ml_collections import ConfigDict

from mljax.config import common


def get_config(arg: str = "") -> ConfigDict:
    config = common()
    config.epochs = 8
    config.batch_size = 64
    config.data.name = "shapes"
    config.data.num_train = 8192
    config.data.num_val = 1024
    config.data.image_size = 64
    config.model.backbone = "mobilenetv3_large_100"
    config.loss.aam.scale = 17.0
    config.optim.lr = 0.01
    config.sam.rho = 0.0
    config.ema.decay = 0.99
    config.train.log_every = 20
    if arg == "debug":
        config.epochs = 1
        config.data.num_train, config.data.num_val = 128, 64
        config.data.image_size = 32
        config.train.log_every = 1
    elif arg:
        raise ValueError(f"unknown variant {arg!r}; known: debug")
    return config
