"""Every key, once. The values are DDPM's for CIFAR-10 (Ho et al. 2020, appendix B); other configs change them."""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()

    config.seed = 0  # of the initial parameters, the batches, the noise and the dropout of training

    config.data = ConfigDict()
    config.data.source = 'tfds:cifar10'  # 'digits', 'folder:PATH' (or a zip file), or 'tfds:NAME'
    config.data.data_dir = ''  # where tfds datasets lie ('' is $TFDS_DATA_DIR, or ~/tensorflow_datasets)
    config.data.image_size = 32  # pixels, height and width; 0 finds it out
    config.data.channels = 3  # 1 grey, 3 colour; 0 finds it out
    config.data.crop = ''  # the square that is cut out, and resized: '' (all), center, center_140 or ddim (CelebA)
    config.data.flip = True  # mirror half of the images, drawn anew at each step
    config.data.max_bad_fraction = 0.01  # pictures that cannot be decoded are left out; more than these are an error
    config.data.cache = True  # keep the decoded images on disk; False decodes them whenever they are needed
    config.data.cache_dir = ''  # where; '' is $XDG_CACHE_HOME/diffusion, or ~/.cache/diffusion
    config.data.placement = 'auto'  # of the training images: 'device' memory, 'host' (fed ahead); auto: where they fit

    config.model = ConfigDict()
    config.model.kind = 'eps'  # what the network predicts: 'eps', 'x0' or 'v'
    config.model.channels = 128  # width at full resolution; 0 chooses a network for the images' size and number
    config.model.multipliers = (1, 2, 2, 2)  # width at each resolution, in units of channels; each halves the size
    config.model.num_blocks = 2  # residual blocks a resolution
    config.model.attention_resolutions = (16,)  # image sizes, in pixels, at which blocks are followed by attention
    config.model.groups = 32  # of GroupNorm
    config.model.dropout = 0.1  # probability
    config.model.remat = False  # compute activations again on the way back, a third more work for far less memory
    config.model.first_level = 1  # what the network hears at level 1; 0 for weights of others (--mode=import sets it)
    # Of convolutions and matmuls: 'float32', or 'bfloat16' on accelerators. There 'float32' products have JAX's default
    # precision, TF32 on GPUs and passes of bfloat16 on TPUs; likelihoods are computed at the highest.
    config.model.dtype = 'float32'

    config.schedule = ConfigDict()
    config.schedule.name = 'linear'  # linear, quadratic, constant, jsd, sigmoid or cosine
    config.schedule.T = 1000  # number of noise levels, at most 10,000
    config.schedule.beta_start = 1e-4  # β_1 (not for cosine, jsd, constant)
    config.schedule.beta_end = 0.02  # β_T (not for cosine, jsd)
    config.schedule.offset = 0.008  # of cosine, in units of T: keeps the first β from vanishing
    config.schedule.max_beta = 0.999  # of cosine

    config.train = ConfigDict()
    config.train.loss = 'simple'  # DDPM Eq. 14; or 'vlb', the ELBO in bits/dim
    config.train.batch_size = 128  # images a step
    config.train.accumulate = 1  # parts of a batch that go through the network one after the other, for less memory
    config.train.num_steps = 800_000  # steps
    config.train.learning_rate = 2e-4  # of Adam
    config.train.warmup_steps = 5000  # steps over which the learning rate rises to its value
    config.train.grad_clip = 1.0  # largest global norm of the gradient of the mean-over-pixels loss; 0 does not clip
    config.train.ema_decay = 0.9999  # a step; lower at first: min(ema_decay, (1 + step)/(10 + step))
    config.train.max_bad_steps = 10  # in a row, whose loss or gradient is not finite and which change nothing
    config.train.checkpoint_every = 5000  # steps
    config.train.keep_checkpoints = 3  # the newest ones
    config.train.log_every = 100  # steps
    config.train.sample_every = 10_000  # steps between sample grids (DDIM, 20 steps, EMA weights); 0 draws none

    config.sample = ConfigDict()
    config.sample.num_images = 256
    config.sample.num_steps = 1000  # evaluations of the network an image, at most schedule.T
    config.sample.eta = 1.0  # 0 is DDIM, 1 is DDPM
    config.sample.spacing = 'trailing'  # of the levels visited: trailing, leading, linspace, uniform or quad
    config.sample.variance = 'large'  # 'small' (the η family) or 'large' (DDPM's σ² = β)
    config.sample.clip = True  # clip the predicted image to [−1, 1] at each step
    config.sample.weights = 'ema'  # or 'raw'
    config.sample.batch_size = 256  # images at a time; the images do not depend on it
    config.sample.seed = 0  # image i depends on (seed, i) alone
    config.sample.compat = ''  # as 'diffusers', 'diffusers-ddim', 'ddim' or 'ho' sample, whatever stands above

    config.likelihood = ConfigDict()
    config.likelihood.quantities = ('posterior', 'transition', 'printed', 'importance', 'flow')  # rows of the ledger
    config.likelihood.num_images = 0  # the first ones of the split; 0 takes all
    config.likelihood.split = 'test'
    config.likelihood.samples = 8  # trajectories an image for the importance-weighted bounds 1, 2, 4, …
    config.likelihood.num_steps = 0  # steps of the chain ('trailing'); 0 takes all T
    config.likelihood.levels = 0  # consistency terms drawn an image, evenly over the chain; 0 computes all
    config.likelihood.eta = 1.0  # in (0, 1]
    config.likelihood.variance = 'small'  # of the model: 'small' or 'large'
    config.likelihood.clip = True  # clip the predicted image to [−1, 1], as DDPM's evaluation does
    config.likelihood.rtol = 1e-4  # relative tolerance of the ODE solver
    config.likelihood.atol = 1e-4  # absolute tolerance of the ODE solver
    config.likelihood.probes = -1  # vectors that estimate the divergence; 0 is exact; −1: exact to 16 values, else 2
    config.likelihood.weights = 'ema'  # or 'raw'
    config.likelihood.batch_size = 100  # images at a time
    config.likelihood.seed = 0

    config.interop = ConfigDict()
    config.interop.source = ''  # of --mode=import: 'diffusers:FOLDER', 'diffusers:HUB_ID' or 'ddim:FILE'
    config.interop.weights = 'ema'  # of --mode=export; or 'raw'

    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices over which parameters, EMA and optimizer state are split

    config.distributed = ConfigDict()
    config.distributed.detect = True  # several hosts are found where a TPU pod, SLURM or Kubernetes tells of them
    config.distributed.coordinator = ''  # by hand: host:port of process 0, the same on all hosts
    config.distributed.num_processes = 0  # with coordinator: how many there are
    config.distributed.process_id = -1  # with coordinator: which one this is, from 0
    config.distributed.timeout = 100  # seconds without a sign of another host, after which a host gives up

    config.compile_cache = 'workdir'  # compiled programs are kept here: a folder; 'workdir', its compiled/; 'off'

    return config.lock()  # a misspelt key in another config is an error, too
