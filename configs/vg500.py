"""Visual Genome with its 500 most frequent labels, 448 x 448: the AAM recipe there.

python -m mljax.main --config configs/vg500.py:tresnet_v2_l,ml_decoder \
    --workdir runs/vg500 --config.data.root=FOLDER \
    --config.init_from=hf://timm/WEIGHTS

FOLDER holds train.json and val.json (annotation JSON, see the README); the usual
val.json has 10,000 images. The labels are numbers. With `original` FOLDER holds the
files as published: {train,test}_list_500.txt, vg_category_500_labels_index.json and the
image folders VG_100K/ and VG_100K_2/.

No figure of this method (arXiv 2209.06585) is known for any variant, and the run
says so. A variant is a backbone and a head: mobilenetv3_large_100, tf_efficientnetv2_s,
_m or _l, tresnet_l, tresnet_v2_l or resnet101 with linear, gcn, gat, ml_decoder,
query2label or csra (without an argument: mobilenetv3_large_100,linear); with `asl` that
loss, AdamW and no SAM. WEIGHTS are mobilenetv3_large_100.miil_in21k,
tf_efficientnetv2_s.in21k (_m, _l), tresnet_l.miil_in1k, tresnet_v2_l.miil_in21k,
resnet101.a1h_in1k. `debug` is one epoch of small images.

The settings are those of the head on COCO (ML-Decoder, here with 100 queries for 5
labels each) and VOC (graph), with RandAugment, Cutout and (but with
asl) the flip.
"""

from ml_collections import ConfigDict

from mljax.recipes import Counts, recipe


def get_config(arg: str = "") -> ConfigDict:
    counts = Counts(labels=500, train=98_249, val=10_000)
    original = {
        "name": "vg500",
        "train": "train_list_500.txt",
        "val": "test_list_500.txt",
    }
    return recipe(arg, {}, counts, original=original)
