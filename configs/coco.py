"""MS-COCO 2014, 80 labels: the published AAM recipe (arXiv 2209.06585).

python -m mljax.main --config configs/coco.py:tresnet_v2_l,ml_decoder \
    --workdir runs/coco --config.data.root=FOLDER \
    --config.init_from=hf://timm/WEIGHTS

FOLDER holds train.json and val.json (annotation JSON, see the README).

| configs/coco.py:               | published mAP | WEIGHTS                   |
|--------------------------------|---------------|---------------------------|
| tf_efficientnetv2_s,ml_decoder | 88.75         | tf_efficientnetv2_s.in21k |
| tf_efficientnetv2_l,ml_decoder | 90.10         | tf_efficientnetv2_l.in21k |
| tresnet_v2_l,ml_decoder        | 90.30         | tresnet_v2_l.miil_in21k   |
| tresnet_v2_l,ml_decoder,640    | 91.3          | tresnet_v2_l.miil_in21k   |

Other backbones and heads can be named too (mobilenetv3_large_100 with the weights
mobilenetv3_large_100.miil_in21k; linear, gcn, gat; without an argument:
mobilenetv3_large_100,linear). No figure is known for them, and the run says so.
`tfds` reads coco/2014 from TensorFlow Datasets, with data.root as its data directory;
there the validation images without any label count too (the published 40,137 leave
them out). `debug` is one epoch of small images.

Not in it yet: the published runs augment with RandAugment and Cutout beside the flip.
The figures were chosen on the test images; data.holdout chooses on a part of train.
"""

from ml_collections import ConfigDict

from mljax.recipes import Tfds, recipe

PUBLISHED = {
    "tf_efficientnetv2_s,ml_decoder": 88.75,
    "tf_efficientnetv2_l,ml_decoder": 90.10,
    "tresnet_v2_l,ml_decoder": 90.30,
    "tresnet_v2_l,ml_decoder,640": 91.3,
}


def get_config(arg: str = "") -> ConfigDict:
    return recipe(arg, PUBLISHED, Tfds("coco/2014", "train", "validation"))
