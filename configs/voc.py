"""PASCAL VOC 2007, 20 labels, 448 x 448: the published AAM recipe.

python -m mljax.main --config configs/voc.py --workdir runs/voc \
    --config.data.root=FOLDER --config.init_from=WEIGHTS.safetensors

FOLDER holds train.json and val.json (annotation JSON, see the README). `:tfds` reads
voc/2007 from TensorFlow Datasets instead, with data.root as its data directory.
`:debug` is one epoch of small images. For this backbone no published figure is known.
"""

from ml_collections import ConfigDict

from mljax.config import common


def get_config(arg: str = "") -> ConfigDict:
    config = common()
    config.epochs = 60
    config.batch_size = 84
    config.model.backbone = "mobilenetv3_large_100"
    config.loss.aam.scale = 17.0
    config.optim.lr = 0.005
    config.ema.decay = 0.9997
    for variant in filter(None, arg.split(",")):
        if variant == "tfds":
            config.data.name = "tfds"
            config.data.tfds_name = "voc/2007"
            config.data.train, config.data.val = "train+validation", "test"
        elif variant == "debug":
            config.epochs = 1
            config.batch_size = 16
            config.data.image_size = 64
        else:
            raise ValueError(f"unknown variant {variant!r}; known: tfds, debug")
    return config
