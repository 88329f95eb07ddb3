"""Every field of a run, once, with its unit and its default.

A config file imports this (or another config) and changes what differs. Of the report are CIFAR-10, the dropout rates
of the config files, random resized crops, mirroring; it does not state its split, batch size, optimiser or schedule.
40,000 / 10,000 images, batches of 128, and AdamW at 1e-3 (ViT: 3e-4) that decays by 0.9 an epoch are ours.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = ''  # set to the config file's stem; ends up in result.json
    config.seed = 0  # initialisation, order of the epochs, augmentation and dropout all derive from it

    # Data
    config.dataset = 'cifar10'  # 'digits' (embedded), 'folder:PATH', or the name of a TFDS dataset
    config.splits = ConfigDict()  # TFDS slices; must be disjoint
    config.splits.train = 'train[:80%]'  # CIFAR-10: train[:40000]
    config.splits.validation = 'train[80%:]'  # CIFAR-10: train[40000:]; '' is none: the last checkpoint is tested
    config.splits.test = 'test'
    config.batch_size = 128  # examples per step over all devices
    config.accumulate_steps = 1  # parts that a device computes its share of a batch in, to use less memory
    config.evaluation_batch_size = 500  # examples per forward pass over all devices; metrics change by rounding at most

    # Model
    config.model = ConfigDict()
    config.model.name = 'cnn'  # 'cnn', 'resnet18', 'vit' or 'airbench'
    config.model.stem = 'imagenet'  # ResNet18: 'imagenet' (7x7 stride 2, max pool) or 'cifar' (3x3)
    config.model.embed_dim = 256  # ViT: features per token
    config.model.hidden_dim = 512  # ViT: features inside the MLP
    config.model.num_heads = 8  # ViT: attention heads, must divide embed_dim
    config.model.num_layers = 6  # ViT: transformer blocks
    config.model.patch_size = 4  # ViT: pixels, must divide the image's height and width
    config.model.patch_stem = 'linear'  # ViT: 'linear', or 'convolutional': two 3x3 convolutions before the patches
    config.model.stochastic_depth_rate = 0.0  # ViT: probability to drop a branch of the last block; the first's is 0
    config.model.widths = (64, 256, 256)  # airbench: features of each block
    config.model.depth = 2  # airbench: convolutions in a block, 2 or 3; the third is residual
    config.synchronize_batch_norm = False  # ResNet18, airbench: training statistics over all devices, not each one's
    config.compute_dtype = 'float32'  # 'float32' or 'bfloat16'; parameters, normalisation and loss stay float32

    config.init_from = ''  # run directory whose best checkpoint the run begins with, as far as it fits; '' is none

    # Regularisation
    config.dropout_rate = 0.0  # probability to drop, in [0, 1)
    config.label_smoothing = 0.0  # probability mass spread over all classes, in [0, 1)
    config.augment = ConfigDict()
    config.augment.random_resized_crop = False
    config.augment.random_resized_crop_scale = (0.08, 1.0)  # crop area as a fraction of the image's, lowest and highest
    config.augment.random_resized_crop_ratio = (3 / 4, 4 / 3)  # crop width / height, lowest and highest
    config.augment.random_mirror = False  # left-right, with probability 1/2
    config.augment.alternating_mirror = False  # a random half of the images left-right, the other half an epoch later
    config.augment.random_translate = 0  # pixels, at most, along each axis; the border is reflected
    config.augment.trivial_augment = False  # one of 14 operations, at random strength, on each image
    config.augment.mixup_alpha = 0.0  # images and labels blended with shares from Beta(alpha, alpha); 0 is off
    config.augment.cutmix_alpha = 0.0  # likewise a rectangle of another image; with both on, a batch draws one
    config.augment.cutout = 0  # pixels, side of the square that is set to the mean; 0 is off

    # Optimisation
    config.num_epochs = 30
    config.learning_rate = 1e-3  # the schedule's peak
    config.optimizer = ConfigDict()
    config.optimizer.name = 'adamw'  # 'adamw', 'sgd' or 'muon' (on convolutions, SGD on everything else)
    config.optimizer.momentum = 0.9  # sgd, muon
    config.optimizer.weight_decay = 0.01  # adamw, sgd: of kernels, times the learning rate; muon: see optim.make_muon
    config.optimizer.gradient_clip_norm = 0.0  # global norm; 0 is off
    config.optimizer.newton_schulz_steps = 3  # muon
    config.optimizer.sgd_momentum = 0.85  # muon: of what is trained by SGD
    config.optimizer.classifier_factor = 1.0  # muon: the classifier's learning rate over that of the convolutions
    config.optimizer.bias_factor = 1.0  # muon: likewise, of all that is no kernel
    config.optimizer.whitening_bias_epochs = 3.0  # muon: after which the bias of airbench's first layer is frozen
    config.schedule = ConfigDict()
    config.schedule.name = 'exponential'  # 'constant', 'exponential', 'linear', 'cosine' or 'one_cycle'
    config.schedule.decay_per_epoch = 0.9  # exponential: factor applied after each epoch
    config.schedule.warmup_epochs = 0.0  # linear from 0 to the peak, before all but 'one_cycle'
    config.ema_decay = 0.0  # of the average of the parameters that is validated and tested, per step; 0 is off

    # Evaluation
    config.test_time_augmentation = 'none'  # logits averaged over views: 'none', 'mirror' or 'mirror_translate' (six)

    # Stopping and keeping
    config.early_stopping = ConfigDict()
    config.early_stopping.metric = 'validation_accuracy'  # or 'validation_loss'; also chooses the best checkpoint
    config.early_stopping.patience = 5  # epochs without improvement before the run stops; 0 never stops early
    config.early_stopping.min_delta = 0.0  # an improvement has to be larger than this
    config.keep_checkpoints = 2  # latest checkpoints kept, besides the best one
    config.checkpoint_every_steps = 0  # besides every epoch, after a compiled call; 0 is off
    config.checkpoint_every_minutes = 0.0  # besides every epoch; 0 is off
    config.on_divergence = 'stop'  # or 'rewind': back to the best epoch so far, with half the learning rate
    config.max_rewinds = 3  # after which a diverging run stops all the same

    # Execution
    config.num_devices = 0  # local devices to use, 0 is all; moves dropout masks, mixing, unsynchronised batch norm
    config.steps_per_call = 0  # training steps per compiled call; 0: 1 on a CPU, else 20 to 50, or an epoch's if fewer
    return config
