"""NUS-WIDE, 81 labels, 448 x 448: the published AAM recipe (arXiv 2209.06585).

python -m mljax.main --config configs/nuswide.py:tresnet_v2_l,ml_decoder \
    --workdir runs/nuswide --config.data.root=FOLDER \
    --config.init_from=hf://timm/WEIGHTS

FOLDER holds train.json and val.json (annotation JSON, see the README); the published
val.json has 50,720 images. Splits differ between papers, because many of the original
links are dead: compare figures of one split only. With `original` FOLDER is the data
set as its makers published it (ImageList/, Groundtruth/TrainTestLabels/, Concepts81.txt
and Flickr/): their split of 161,789 / 107,859 images, which is another one, without a
figure. --config.data.drop_missing=true goes on without the images that are gone.

| configs/nuswide.py:     | published mAP                | WEIGHTS                 |
|-------------------------|------------------------------|-------------------------|
| tresnet_v2_l,ml_decoder | 68.3 (quoted second-hand)    | tresnet_v2_l.miil_in21k |
| tresnet_l,linear,asl    | 65.2                         | tresnet_l.miil_in1k     |

The last one is what the paper compares itself with: the loss asl, with AdamW and
without SAM. Other backbones and heads can be named too (mobilenetv3_large_100,
tf_efficientnetv2_s, _m and _l, resnet101; linear, gcn, gat, query2label, csra; without
an argument: mobilenetv3_large_100,linear). No figure is known for them, and the run
says so.
`debug` is one epoch of small images.

Training images are augmented with RandAugment, Cutout and (but with asl) the
flip, as published.
The graph heads of the paper start from word vectors: name a GloVe file with
--config.model.graph.embeddings, without it they are random. The scale of aam and the
learning rate are those of the head on COCO (ML-Decoder) and VOC (graph); what was used
here is not known.
"""

from ml_collections import ConfigDict

from mljax.recipes import Counts, recipe

PUBLISHED = {"tresnet_v2_l,ml_decoder": 68.3, "tresnet_l,linear,asl": 65.2}


def get_config(arg: str = "") -> ConfigDict:
    counts = Counts(labels=81, train=0, val=50_720)
    original = {"name": "nuswide", "train": "Train", "val": "Test"}
    makers = Counts(labels=81, train=161_789, val=107_859)
    return recipe(arg, PUBLISHED, counts, None, original, makers)
