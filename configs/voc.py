"""PASCAL VOC 2007, 20 labels, 448 x 448: the published AAM recipe (arXiv 2209.06585).

python -m mljax.main --config configs/voc.py:tf_efficientnetv2_s,gcn \
    --workdir runs/voc --config.data.root=FOLDER \
    --config.init_from=hf://timm/WEIGHTS

FOLDER holds train.json and val.json (annotation JSON, see the README): 5,011 and 4,952
images. In the published files objects marked difficult count as positives. With
`original` (voc.py:tf_efficientnetv2_s,gcn,original) FOLDER is VOCdevkit/VOC2007 itself,
train and test unpacked into one place; --config.data.difficult=ignored leaves difficult
objects out, as the VOC evaluation does.

| configs/voc.py:                | published mAP | WEIGHTS                   |
|--------------------------------|---------------|---------------------------|
| tf_efficientnetv2_s,ml_decoder | 95.86         | tf_efficientnetv2_s.in21k |
| tf_efficientnetv2_l,ml_decoder | 96.05         | tf_efficientnetv2_l.in21k |
| tresnet_v2_l,ml_decoder        | 96.70         | tresnet_v2_l.miil_in21k   |
| tresnet_l,linear,asl           | 94.6          | tresnet_l.miil_in1k       |

The last one is what the paper compares itself with: the loss asl, with AdamW and
without SAM. Other backbones and heads can be named too (mobilenetv3_large_100 with the
weights mobilenetv3_large_100.miil_in21k, tf_efficientnetv2_m, resnet101; linear, gcn,
gat, query2label, csra; without an argument: mobilenetv3_large_100,linear). No figure is
known for them, and the run says so.
`tfds` reads voc/2007 from TensorFlow Datasets, with data.root as its data directory;
--config.data.tfds_labels=labels_no_difficult leaves difficult objects out, as the VOC
evaluation does. `debug` is one epoch of small images.

Training images are augmented with RandAugment, Cutout and (but with asl) the
flip, as published.
The graph heads of the paper start from word vectors: name a GloVe file with
--config.model.graph.embeddings, without it they are random. The figures were chosen on
the test images; data.holdout chooses on a part of train. The scale of aam that went
with ML-Decoder here is not known (23 is that of COCO).
"""

from ml_collections import ConfigDict

from mljax.recipes import Counts, Tfds, recipe

PUBLISHED = {
    "tf_efficientnetv2_s,ml_decoder": 95.86,
    "tf_efficientnetv2_l,ml_decoder": 96.05,
    "tresnet_v2_l,ml_decoder": 96.70,
    "tresnet_l,linear,asl": 94.6,
}


def get_config(arg: str = "") -> ConfigDict:
    counts = Counts(labels=20, train=5_011, val=4_952)
    tfds = Tfds("voc/2007", "train+validation", "test")
    original = {"name": "voc", "train": "trainval", "val": "test"}
    config = recipe(arg, PUBLISHED, counts, tfds, original)
    # The graph of the paper is counted by objects, which TFDS does not tell.
    graph = config.model.head in ("gcn", "gat")
    config.model.graph.by_occurrences = graph and config.data.name != "tfds"
    return config
