"""Every setting of mljax, once, with its default. Other configs change what differs.

A config file defines `get_config(arg)`; `--config configs/coco.py:debug` passes
"debug" as `arg`, and `--config.optim.lr=0.01` overrides one key.
"""

from ml_collections import ConfigDict, FieldReference


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
    # "first:last": a profiler trace of these steps, for TensorBoard; "" = none.
    config.profile = ""

    config.data = data = ConfigDict()
    # Where images and labels come from; mljax/data/NAME.py shows the layout of each:
    # annotations | coco | voc | table (CSV) | nuswide | vg500 | tfds | shards | shapes
    data.name = "annotations"
    # Folder of the data; tfds: its data directory; shards: what mljax.data.shard wrote,
    # here or in an object store (gs://...).
    data.root = ""
    # annotations, coco, table, vg500: a file in root; voc: an image set ("trainval");
    # nuswide: "Train", "Test"; tfds: a split.
    data.train = "train.json"
    data.val = "val.json"
    # Folders of the images in root; "" = the usual place. coco, voc, table, nuswide,
    # vg500.
    data.train_images = ""
    data.val_images = ""
    # File in root that lists the classes, a name a line; "" = those of the annotations.
    # voc, table (lists), vg500, tfds (labels without names of their own, or texts).
    data.classes = ""
    # voc: a label of objects marked difficult only is positive (as in the published
    # files) | ignored (unknown, as in the evaluation of VOC) | negative.
    data.difficult = "positive"
    data.table = ConfigDict(
        dict(
            image="image",  # column with the paths
            columns="",  # label columns between commas; "" = all others
            empty="absent",  # what an empty cell of them means: absent | unknown
            labels="",  # or: the column that lists the labels of an image
            unknown="",  # the column that lists the labels nobody checked, if any
            separator=";",  # between the labels of a list
            delimiter=",",  # between cells: , | ; | tab
            file="",  # one file for both splits, which
            split="",  # are told apart by this column: data.train, data.val in it
        )
    )
    data.tfds_name = ""  # tfds: builder, e.g. "voc/2007"
    # tfds: feature with the labels; "" = the one that fits best (several labels go
    # before one an image).
    data.tfds_labels = ""
    data.drop_missing = False  # leave out images whose files are not there
    # Leave out images without any label (COCO: the usual 40,137 of 40,504 of val2014).
    data.drop_unlabelled = False
    # Of a known data set with so many labels: the images that it has, 0 = any. Where
    # others are found, a line at the start says so.
    data.expected = ConfigDict(dict(labels=0, train=0, val=0))
    data.num_train = 0  # shapes: how many pictures are drawn
    data.num_val = 0
    # Pixels: 448 (a square) or (height, width), on the command line 320,480.
    data.image_size = FieldReference(448, field_type=object)
    # How a picture of another shape gets there: stretch | letterbox (all of it, with
    # grey bars) | crop (a part of that shape: the middle, in training anywhere).
    data.fit = "stretch"
    # bilinear | area (each new pixel is the mean of what it covers: 2 to 3 times as
    # fast as antialiasing where pictures shrink; where they grow it makes blocks).
    data.resize = "bilinear"
    data.antialias = True  # bilinear resize with (True) or without antialiasing
    # A big JPEG is decoded at 1/2, 1/4 or 1/8 of its size (which costs less), as long
    # as both sides stay so many times what is needed; 0 = always whole.
    data.scaled_decode = 2.0
    # Training pictures are resized on the GPU or TPU: sent as they were decoded and
    # cropped, on a square of so many pixels a side (640 for photos of 640 x 480), to
    # which the host only shrinks larger ones. For CPUs that are too slow for the
    # accelerators; slower where there are none. 0 = on the host.
    data.resize_on_device = 0
    # Order of the training images: uniform (each once an epoch) | class_aware (each
    # label equally often: one of its images).
    data.sampling = "uniform"
    # Augmentation of the training images. A random crop shows from crop_area of the
    # picture (1 = no crop) to all of it; its shape is that of image_size times 1 /
    # crop_ratio to crop_ratio, and is cut to that of image_size with fit "crop".
    data.crop_area = 1.0
    data.crop_ratio = 4 / 3
    data.randaugment = ConfigDict(
        dict(
            n=0,  # operations in a row, of 15; 0 = off
            m=0,  # magnitude 1 (weak) to 9; 0 = drawn for each operation
            prob=0.5,  # that an operation which was drawn is done
        )
    )
    # Largest changes: factors of 1 - x to 1 + x; hue in turns, 0 to 0.5. 0 = none.
    data.jitter = ConfigDict(
        dict(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    )
    data.cutout = 0.0  # probability of a square in one random colour
    data.cutout_side = 0.4  # its sides over those of the picture
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
    # An image that is missing or cannot be read: stop | skip (it is counted, named in
    # the work directory, and changes no other image of its step; none is mixed with it.
    # Its place is black, which BatchNorm sees). A file system that does not answer for
    # half a minute ends the run all the same.
    data.on_error = "stop"
    data.max_pixels = 100_000_000  # a larger image counts as unreadable
    data.prefetch = 2  # batches prepared ahead
    # Files that are read at the same time; 0 = one a CPU. More for an object store,
    # which takes long to answer.
    data.parallel_reads = 0

    config.model = model = ConfigDict()
    # mobilenetv3_large_100 | tf_mobilenetv3_large_minimal_100 | tf_efficientnetv2_s |
    # tf_efficientnetv2_m | tf_efficientnetv2_l | tresnet_m | tresnet_l | tresnet_v2_l |
    # resnet50 | resnet101 | vit_tiny_patch16_224 | vit_small_patch16_224 |
    # vit_base_patch16_224
    model.backbone = "mobilenetv3_large_100"
    # linear | cosine | ml_decoder | query2label | csra | gcn | gat. With the loss aam a
    # linear head is a cosine classifier.
    model.head = "linear"
    model.pool = "avg"  # avg | max | avg+max
    model.dropout = 0.0  # before the classifier
    model.drop_path = 0.0  # stochastic depth in the backbone: rate of the last block
    # tresnet_*: the blocks of the last stage end in a PReLU. Those of tresnet_v2_l do
    # in the paper's code with aam.
    model.prelu = False
    # BatchNorm takes its statistics over the whole batch (1) or over each of so many
    # equal parts; as many as there are devices: each device over its own images.
    model.batch_norm_groups = 1
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
        dict(
            gamma_neg=4.0,
            gamma_pos=0.0,
            probability_margin=0.05,
            eps=1e-8,
            # Gradients flow through the focusing weights; ASL's authors train without.
            weight_gradient=True,
        )
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
    # Weight decay on biases, 1-D parameters and learned queries and positions too.
    optim.decay_bias_and_norm = False
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
    # The perturbation is that of the whole batch (1), or each of so many equal parts of
    # the batch has its own: m-sharpness. As many as devices, or as mesh.data (groups of
    # mesh.fsdp devices), or a multiple; model.batch_norm_groups is a multiple of it.
    sam.groups = 1
    sam.update_stats = "both"  # BatchNorm statistics move in passes: both | first
    # SAM for less than two passes a step, in one of three ways:
    # momentum: one pass, perturbed along the optimiser's momentum (Momentum-SAM); it
    # takes a larger rho: its authors use 3 where SAM has 0.2.
    sam.direction = "gradient"  # gradient | momentum
    # SAM in every k-th step only (LookSAM). The others take one pass and add SAM's
    # direction of the last full step with the weight reuse; 0 = they do without.
    sam.every_steps = 1
    sam.reuse = 0.7
    sam.every_images = 1  # the first pass sees every n-th image of the batch

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

    config.hosts = hosts = ConfigDict()  # several processes that train as one
    hosts.start_timeout = 300  # seconds in which all of them must have started
    # Seconds of silence after which a process counts as dead, and the others end.
    hosts.heartbeat_timeout = 30

    config.train = train = ConfigDict()
    train.log_every = 50  # steps
    train.eval_every = 1  # epochs
    train.checkpoint_every = 0  # steps; 0 = at the end of every epoch only
    # Steps in a row that end the run: not finite, or without any readable image.
    train.max_bad_steps = 10
    train.patience = 5  # early stopping, in evaluations; 0 = off
    # Early stopping waits for these, unless mAP is 100; -1 = for those in which the
    # learning rate rises, and for freeze_epochs.
    train.warmup_epochs = -1

    config.eval = ConfigDict(
        dict(
            batch_size=128,
            # Evaluation and prediction take the mean of the outputs for a picture and
            # for its mirror image: twice the work.
            flip=False,
        )
    )
    return config
