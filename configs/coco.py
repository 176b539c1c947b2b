"""MS-COCO 2014, 80 labels: the published AAM recipe (arXiv 2209.06585).

python -m mljax.main --config configs/coco.py:tresnet_v2_l,ml_decoder \
    --workdir runs/coco --config.data.root=FOLDER \
    --config.init_from=hf://timm/WEIGHTS

FOLDER holds train.json and val.json (annotation JSON, see the README). With `original`
(coco.py:tresnet_v2_l,ml_decoder,original) it is the data set as published: annotations/
instances_{train,val}2014.json, train2014/ and val2014/. As in the published figures,
images without any label are left out of both (40,137 of val2014 stay).

| configs/coco.py:               | published mAP | WEIGHTS                   |
|--------------------------------|---------------|---------------------------|
| tf_efficientnetv2_s,ml_decoder | 88.75         | tf_efficientnetv2_s.in21k |
| tf_efficientnetv2_l,ml_decoder | 90.10         | tf_efficientnetv2_l.in21k |
| tresnet_v2_l,ml_decoder        | 90.30         | tresnet_v2_l.miil_in21k   |
| tresnet_v2_l,ml_decoder,640    | 91.3          | tresnet_v2_l.miil_in21k   |
| tresnet_v2_l,ml_decoder,asl    | 90.1          | tresnet_v2_l.miil_in21k   |
| tresnet_l,linear,asl           | 86.6          | tresnet_l.miil_in1k       |

The paper's own settings for TResNet-L begin from weights that the authors of ML-Decoder
trained on Open Images (tresnet_l_pretrain_ml_decoder.pth), which timm does not have:
from those of ImageNet-21k the figures of these rows may be out of reach.

The last two are what the paper compares itself with: the loss asl, with AdamW and
without SAM. Other backbones and heads can be named too (mobilenetv3_large_100 with the
weights mobilenetv3_large_100.miil_in21k, tf_efficientnetv2_m, resnet101; linear, gcn,
gat, query2label, csra; without an argument: mobilenetv3_large_100,linear). No figure is
known for them, and the run says so.
`tfds` reads coco/2014 from TensorFlow Datasets, with data.root as its data directory,
and leaves out images without a label too. `debug` is one epoch of small images.

Training images are augmented with RandAugment, Cutout and (but with asl) the
flip, as published.
The figures were chosen on the test images; data.holdout chooses on a part of train.
"""

from ml_collections import ConfigDict

from mljax.recipes import Counts, Tfds, recipe

PUBLISHED = {
    "tf_efficientnetv2_s,ml_decoder": 88.75,
    "tf_efficientnetv2_l,ml_decoder": 90.10,
    "tresnet_v2_l,ml_decoder": 90.30,
    "tresnet_v2_l,ml_decoder,640": 91.3,
    "tresnet_v2_l,ml_decoder,asl": 90.1,
    "tresnet_l,linear,asl": 86.6,
}


def get_config(arg: str = "") -> ConfigDict:
    counts = Counts(labels=80, train=82_081, val=40_137)
    tfds = Tfds("coco/2014", "train", "validation")
    original = {
        "name": "coco",
        "train": "annotations/instances_train2014.json",
        "val": "annotations/instances_val2014.json",
    }
    config = recipe(arg, PUBLISHED, counts, tfds, original)
    # The annotation files that the figures were measured on list no other images.
    config.data.drop_unlabelled = config.data.name != "annotations"
    return config
