"""Every setting of mljax, once, with its default. Other configs change what differs.

A config file defines `get_config(arg)`; `--config configs/coco.py:debug` passes
"debug" as `arg`, and `--config.optim.lr=0.01` overrides one key.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    del arg
    config = ConfigDict()
    config.seed = 0
    config.epochs = 60
    config.batch_size = 84  # images in one optimiser step, over all devices
    # Weights to start from: "" (random), a timm .safetensors / .pth file, a work
    # directory or one that mljax.import_weights wrote, or hf://timm/NAME (downloads).
    config.init_from = ""
    config.dtype = "float32"  # of activations: float32 | bfloat16; weights are float32
    # What a published recipe should reach, in percent; -1 = no figure is known; 0 = not
    # a published recipe.
    config.published_mAP = 0.0

    config.data = data = ConfigDict()
    data.name = "annotations"  # annotations | shapes | tfds
    data.root = ""  # annotations: folder of the two files; tfds: its data directory
    data.train = "train.json"  # annotations: file in root; tfds: split
    data.val = "val.json"
    data.tfds_name = ""  # tfds: builder, e.g. "voc/2007"
    data.tfds_labels = ""  # tfds: feature with the labels; "" = the first that fits
    data.num_train = 0  # shapes: how many pictures are drawn
    data.num_val = 0
    data.image_size = 448  # pixels; pictures are resized to a square
    data.antialias = True  # bilinear resize with (True) or without antialiasing
    data.flip = 0.5  # probability of a horizontal flip
    # Training batches can be mixed, pictures and labels: mixup (shares of both), cutmix
    # (a box of the other). lam ~ Beta(alpha, alpha), one a batch; 0 = off.
    data.mixup_alpha = 0.0
    data.cutmix_alpha = 0.0
    data.mixup_prob = 1.0  # probability that a batch is mixed
    data.mixup_switch_prob = 0.5  # with both on: probability of cutmix
    # Share of the training images held out to choose the best epoch. With 0 the best
    # epoch is chosen on data.val, and the output says so.
    data.holdout = 0.0
    # An image that cannot be read: stop | skip (counted, named in the work directory).
    data.on_error = "stop"
    data.max_pixels = 100_000_000  # a larger image counts as unreadable
    data.prefetch = 2  # batches prepared ahead

    config.model = model = ConfigDict()
    model.backbone = "mobilenetv3_large_100"
    model.head = "linear"  # with the loss aam a linear head is a cosine classifier
    model.pool = "avg"  # avg | max | avg+max
    model.dropout = 0.0  # before the classifier
    model.drop_path = 0.0  # stochastic depth in the backbone: rate of the last block
    # Compute blocks again in the backward pass: less memory (not on CPU), slower.
    model.remat = False
    model.ml_decoder = ConfigDict(
        dict(
            groups=0,  # queries, each for an equal share of the labels; 0 = up to 100
            dim=768,  # width of the decoder
            heads=8,  # attention heads; must divide dim
            feedforward=2048,  # hidden units of the feed-forward network
            dropout=0.1,  # in the decoder layer, on attention weights too
        )
    )
    model.query2label = ConfigDict(
        dict(
            dim=512,  # width of the transformer
            heads=8,  # attention heads; must divide dim
            feedforward=2048,  # hidden units of the feed-forward networks
            encoder_layers=1,  # in which positions look at each other; 0 = none
            decoder_layers=2,  # in which labels look at each other and at the image
            dropout=0.1,  # in all layers, on attention weights too
        )
    )
    model.csra = ConfigDict(
        dict(
            heads=1,  # 1 | 2 | 4 | 6 | 8, each with another sharpness of attention
            residual=0.1,  # weight of the attention (lambda)
        )
    )

    model.graph = ConfigDict(  # of the heads gcn and gat
        dict(
            # P(j | i) in row i: "" = counted in the training labels, or an .npy file.
            adjacency="",
            # Counted: divide by how often label i stands in the annotation file (once
            # an object), as the published method does, instead of by images with i.
            by_occurrences=False,
            tau=0.4,  # pairs from this probability on are edges
            rho=0.25,  # weight of a label's neighbours; the label itself has 1
            # A vector for each label: "" = random ones that depend on its name alone,
            # an .npy file, or a GloVe / word2vec text file.
            embeddings="",
            embedding_dim=300,  # of random vectors
            embedding_std=0.4,  # of random vectors; also for words not in the file
            hidden_dim_scale=1.0,  # hidden units: channels of the map over this
            attention_dropout=0.1,  # gat: share of the attention weights
        )
    )

    config.loss = loss = ConfigDict()
    loss.name = "aam"  # bce | focal | asl | aam
    # sum over the batch (the published recipes) or mean = sum / batch size. The
    # learning rate belongs to this choice.
    loss.reduction = "sum"
    loss.label_smoothing = 0.0
    loss.class_weights = ""  # JSON file {class name: weight}; "" = all 1
    loss.focal = ConfigDict(dict(gamma=2.0))
    loss.asl = ConfigDict(
        dict(gamma_neg=4.0, gamma_pos=0.0, probability_margin=0.05, eps=1e-8)
    )
    loss.aam = ConfigDict(
        dict(
            scale=23.0,  # s: logit = s * cosine
            margin=0.0,  # m
            k=0.7,  # weight of the positives, 1 - k of the negatives
            gamma_neg=0.0,
            gamma_pos=0.0,
            probability_margin=0.05,  # acts only with a gamma above 0
        )
    )

    config.optim = optim = ConfigDict()
    optim.name = "sgd"  # sgd | adamw | lamb
    optim.lr = 0.005  # peak learning rate
    # Directory (or learning_rate.json) of `python -m mljax.find_lr`: lr becomes the one
    # that was found there.
    optim.lr_from = ""
    # 0: lr is used as given. N: lr is meant for batches of N images and is scaled by
    # batch_size / N.
    optim.lr_reference_batch = 0
    optim.weight_decay = 5e-4  # sgd: added to the gradient; adamw, lamb: decoupled
    optim.momentum = 0.9  # sgd; replaced where the schedule cycles it
    optim.nesterov = False
    optim.b1 = 0.9  # adamw, lamb; replaced where the schedule cycles it
    optim.b2 = 0.99
    optim.eps = 1e-8
    optim.bias_lr_factor = 2.0  # learning rate of biases over that of the rest
    optim.decay_bias_and_norm = False  # weight decay on biases and 1-D parameters too
    optim.clip_norm = 0.0  # largest global gradient norm; 0 = no clipping
    # Fine-tuning. freeze: parameters that are not trained, as prefixes of their paths
    # separated by commas: "backbone", "backbone.conv_stem, backbone.blocks.0".
    optim.freeze = ""
    optim.freeze_epochs = 0  # they are trained after so many epochs; 0 = never
    # Frozen BatchNorm uses its running statistics (True) or the batch's, and then
    # its running statistics move (False).
    optim.freeze_stats = True
    optim.backbone_lr_factor = 1.0  # learning rate of the backbone over the head's
    # Learning rate of a block of the backbone over that of the next one.
    optim.layer_decay = 1.0
    optim.accumulate = 1  # a step's batch is run in this many parts
    optim.schedule = "one_cycle"  # one_cycle | cosine | constant
    optim.pct_start = 0.2  # one_cycle: share of steps spent rising; cosine: warm-up
    optim.div_factor = 100.0  # first learning rate = lr / div_factor
    optim.final_div_factor = 1000.0  # last = first / final_div_factor
    optim.cycle_momentum = True  # one_cycle: momentum (or b1) 0.95 -> 0.85 -> 0.95

    config.sam = sam = ConfigDict()
    sam.rho = 0.05  # size of the perturbation; 0 = no SAM
    sam.adaptive = False
    sam.update_stats = "both"  # BatchNorm statistics move in: both | first

    config.ema = ema = ConfigDict()
    ema.decay = 0.9997  # per step; 0 = no EMA
    ema.half_life = 0.0  # in images; above 0 it replaces decay

    # Two networks of this architecture are trained at once, and each learns what the
    # other says too: weight of the mean divergence of their predictions, 0 = one
    # network alone. Beside a loss that is a sum over the batch (loss.reduction) it
    # takes a large weight.
    config.mutual = ConfigDict(dict(weight=0.0))

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices along each axis; -1 = all that are left
    mesh.fsdp = 1

    config.train = train = ConfigDict()
    train.log_every = 50  # steps
    train.eval_every = 1  # epochs
    train.checkpoint_every = 0  # steps; 0 = at the end of every epoch only
    train.max_bad_steps = 10  # non-finite steps in a row that end the run
    train.patience = 5  # early stopping, in evaluations; 0 = off
    train.warmup_epochs = 0  # early stopping waits for these

    config.eval = ConfigDict(dict(batch_size=128))
    return config
