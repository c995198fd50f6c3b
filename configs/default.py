"""Every key, once. The values are DDPM's for CIFAR-10 (Ho et al. 2020, appendix B); other configs change them.

`python main.py --help` lists the keys, with the names that each may have.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()

    config.seed = 0  # of everything random in training: initial parameters, batches, levels, noise, dropout, flips

    config.data = ConfigDict()
    config.data.source = 'tfds:cifar10'  # 'digits', 'folder:PATH' (a folder or a zip file), or 'tfds:NAME'
    config.data.split = 'train'  # what is trained on; of a folder, also the path of any folder in it, or '.' for all
    config.data.data_dir = ''  # root of the TFDS datasets; '' is $TFDS_DATA_DIR, or ~/tensorflow_datasets
    config.data.image_size = 32  # height and width in pixels; 0 chooses it from the pictures
    config.data.channels = 3  # 1 for grey, 3 for colour; 0 chooses it from the pictures
    config.data.crop = ''  # the square that is cut out before resizing; '' requires square pictures
    config.data.flip = True  # mirror each image with probability 1/2, drawn anew at each step
    config.data.labels = False  # train on the classes of the pictures as well: the model is then conditional
    config.data.max_bad_fraction = 0.01  # fraction of pictures that may be left out because they cannot be decoded
    config.data.max_pixels = 89_478_485  # pixels; larger pictures are left out, since decoding takes much memory
    config.data.cache = True  # keep the decoded images on disk; False decodes them for each batch
    config.data.cache_dir = ''  # folder of the decoded images; '' is $XDG_CACHE_HOME/diffusion, or ~/.cache/diffusion
    # Number of parts of the training images; each host decodes only its own. 0 chooses it: 1 for images of up to 8 GB,
    # else up to 64, whatever the number of hosts. A run keeps what was chosen.
    config.data.shards = 0
    config.data.placement = 'auto'  # where training images are kept: device memory, or the host; auto: where they fit

    config.model = ConfigDict()
    config.model.network = 'unet'  # the architecture: 'unet' is DDPM's, 'adm' OpenAI's, 'dit' a transformer
    config.model.implementation = 'auto'  # how network and training step are computed; 'auto' chooses by the devices
    config.model.kind = 'eps'  # what the network predicts
    config.model.channels = 128  # width at full resolution; 0 chooses a network for the size and number of the images
    config.model.multipliers = (1, 2, 2, 2)  # width at each resolution, in units of channels; each halves the size
    config.model.num_blocks = 2  # residual blocks per resolution
    config.model.attention_resolutions = (16,)  # image sizes, in pixels, at which blocks are followed by attention
    config.model.groups = 32  # groups of GroupNorm
    config.model.patch_size = 2  # height and width, in pixels, of the patches of 'dit'; divides the image size
    config.model.depth = 12  # blocks of 'dit'
    config.model.dropout = 0.1  # probability
    # 'fixed', or 'learned' by as many outputs again, with train.loss 'hybrid' or 'vlb' (arXiv:2102.09672).
    config.model.variance = 'fixed'
    config.model.num_classes = 0  # classes of a conditional model; 0 with data.labels: as many as the source has
    config.model.remat = False  # recompute activations in the backward pass: a third more work, far less memory
    config.model.first_level = 1  # the t with which the network is called at level 1; imported weights need 0
    config.model.level_scale = 1.0  # the network is called with t times this; OpenAI's rescale_timesteps is 1000/T
    config.model.head_channels = 0  # channels of each attention head; 0: num_heads heads for 'adm', else one head
    config.model.num_heads = 0  # attention heads of 'adm', if head_channels is 0; 0 means one head
    config.model.scale_shift_norm = True  # 'adm': True scales and shifts norms by the embedding, False adds it
    config.model.resblock_updown = False  # 'adm': True changes the size by residual blocks, False by convolutions
    # Resolutions of resblock_updown: 'all', or those with 'attention', as in diffusers.
    config.model.updown_levels = 'all'
    config.model.norm_epsilon = 1e-6  # ε of GroupNorm; OpenAI and diffusers: 1e-5
    # Zero pixels before each axis of a convolution with stride 2; after it, there is one. OpenAI and diffusers: 1.
    config.model.downsample_padding = 0
    config.model.mid_attention = True  # attention between the two blocks in the middle
    config.model.embedding_order = 'sin_cos'  # halves of the time embedding; OpenAI and diffusers: 'cos_sin'
    config.model.embedding_shift = 1  # frequencies are 10000^(−i/(channels/2 − shift)); OpenAI and diffusers: 0
    # Of convolutions and matmuls. On accelerators, 'float32' products have JAX's default precision (TF32 on GPUs,
    # bfloat16 passes on TPUs); likelihoods are computed at the highest precision.
    config.model.dtype = 'float32'

    config.schedule = ConfigDict()
    config.schedule.name = 'linear'  # the noise schedule
    config.schedule.T = 1000  # number of noise levels
    config.schedule.beta_start = 1e-4  # β_1, for the schedules that have it
    config.schedule.beta_end = 0.02  # β_T, for the schedules that have it
    config.schedule.offset = 0.008  # of cosine, in units of T: keeps the first β from vanishing
    config.schedule.max_beta = 0.999  # of cosine
    config.schedule.zero_terminal_snr = False  # shift and scale √ᾱ so that ᾱ_T = 0 (arXiv:2305.08891)

    config.train = ConfigDict()
    # 'simple' is DDPM Eq. 14, 'vlb' the ELBO in bits/dim, 'hybrid' their sum for a learned variance; loss.py has the
    # others' sources.
    config.train.loss = 'simple'
    config.train.batch_size = 128  # images per step
    # Probability with which an image's class is hidden, with data.labels; more than 0 also trains an unconditional
    # model, which classifier-free guidance needs.
    config.train.label_dropout = 0.0
    config.train.accumulate = 1  # parts of a batch that are computed one after the other, to save memory
    config.train.num_steps = 800_000  # steps
    config.train.learning_rate = 2e-4  # of Adam
    config.train.warmup_steps = 5000  # steps over which the learning rate rises to its value
    config.train.grad_clip = 1.0  # largest global norm of the gradient of the mean-over-pixels loss; 0 does not clip
    config.train.ema_decay = 0.9999  # per step; smaller at first: min(ema_decay, (1 + step)/(10 + step))
    config.train.deterministic = False  # on GPUs: compute the same bits at each run, by kernels that may be slower
    # Stop if, at a multiple of log_every, the last max_bad_steps steps all had a loss, gradient or update that was not
    # finite.
    config.train.max_bad_steps = 10
    config.train.begin_again = False  # begin at step 0 in a workdir whose checkpoints are all gone
    config.train.accept_other_images = False  # continue on other images than those that the run was trained on so far
    config.train.checkpoint_every = 5000  # steps
    config.train.keep_checkpoints = 3  # number of checkpoints that are kept, the newest ones
    config.train.log_every = 100  # steps
    # Steps between sheets of samples (DDIM, 20 steps, EMA weights); 0 draws none. Smaller sheets come before the first,
    # after 50, 100, 200, 500, … steps.
    config.train.sample_every = 10_000

    config.sample = ConfigDict()
    config.sample.num_images = 256  # images
    config.sample.num_steps = 1000  # network evaluations per image, at most schedule.T
    config.sample.eta = 1.0  # 0 is DDIM, 1 is DDPM
    config.sample.rule = 'kernel'  # how a step goes from x_t to x_s; 'kernel' is DDPM's and DDIM's
    config.sample.spacing = 'trailing'  # which noise levels are visited
    # 'small' is the η family. For η = 1 alone, 'large' is DDPM's σ² = β, and 'learned' that of the network. 'auto' is
    # 'learned' if the network has it and η = 1, else 'large' if η = 1, else 'small'.
    config.sample.variance = 'auto'
    config.sample.clip = True  # clip the predicted image to [−1, 1] at each step
    # Classes that a conditional model draws, in turn: 'all', or some as '0,3,7'; 'none' uses it without classes.
    config.sample.labels = 'all'
    config.sample.guidance = 1.0  # scale w of ε_weak + w·(ε − ε_weak); 1 is the model itself (arXiv:2207.12598)
    # Noise levels σ = √((1−ᾱ)/ᾱ) that are guided, as (lowest, highest); () is all of them (arXiv:2404.07724).
    config.sample.guidance_interval = ()
    # Workdir of the run whose checkpoint is the weak model (autoguidance, arXiv:2406.02507); '' is the unconditional
    # model.
    config.sample.guide = ''
    config.sample.guide_step = -1  # the training step of that checkpoint; −1 is the newest
    config.sample.weights = 'ema'  # which weights
    config.sample.step = -1  # the training step whose checkpoint is sampled; −1 is the newest
    config.sample.png = False  # write each image as a PNG file, too
    config.sample.folder = ''  # where <name>/ with the results is written; '' is samples/ in the workdir
    config.sample.batch_size = 256  # images at a time; the images do not depend on it
    config.sample.seed = 0  # image i depends on (seed, i) alone
    config.sample.compat = ''  # reproduce another codebase's levels, clipping and noise; overrides the keys above

    config.sample.metrics = ('FID', 'FD-EfficientNetLite0', 'FD-pixels')  # metrics of the images

    config.metrics = ConfigDict()
    # File of the weights of Inception 2015-12-05: pytorch-fid's or torch-fidelity's .pth, or its tensors as
    # .safetensors; '' leaves out FID and the other metrics of Inception's features.
    config.metrics.inception = ''
    config.metrics.efficientnet = ''  # file of EfficientNet-Lite0's weights; '' is that of the extra [features]
    config.metrics.dinov2 = ''  # file of the weights of DINOv2's ViT-L/14; '' leaves out its metrics
    # How images are resized; a feature network without any of these uses its default.
    config.metrics.dialects = ('adm',)
    config.metrics.split = ''  # the images that samples are compared with; '' is data.split, what is trained on
    config.metrics.flip = False  # compare with their mirror images as well
    config.metrics.reference = ''  # compare with the moments in this .npz file instead: ours, pytorch-fid's or ADM's
    config.metrics.by_class = True  # also measure within each class, if samples and reference have classes
    config.metrics.memorization = False  # also look for copies of training images, by comparison with the split 'test'
    config.metrics.batch_size = 64  # images at a time in feature networks

    config.sweep = ConfigDict()
    config.sweep.num_steps = (10, 20, 50, 100, 1000)  # columns of the table
    config.sweep.etas = (0.0, 0.2, 0.5, 1.0)  # rows of the table
    config.sweep.large = True  # one more row: σ̂, DDPM's large variance with η = 1
    config.sweep.num_images = 0  # images in each cell; 0 is sample.num_images
    config.sweep.folder = ''  # where <name>/ with the results is written; '' is sweep/ in the workdir

    config.evaluate = ConfigDict()
    config.evaluate.images = ''  # for --mode=evaluate: a folder or zip file of pictures, samples.npz, or an .npy file
    config.evaluate.folder = ''  # where <name>/ with the results is written; '' is evaluations/ in the workdir

    config.likelihood = ConfigDict()
    config.likelihood.quantities = ('posterior', 'transition', 'printed', 'importance', 'flow')  # rows of the ledger
    config.likelihood.num_images = 0  # the first images of the split; 0 takes all
    config.likelihood.split = 'test'  # which images
    config.likelihood.samples = 8  # trajectories per image for the importance-weighted bounds with K = 1, 2, 4, …
    config.likelihood.num_steps = 0  # steps of the chain ('trailing' spacing); 0 takes all T
    config.likelihood.levels = 0  # consistency terms drawn per image, spread evenly over the chain; 0 computes all
    config.likelihood.eta = 1.0  # in (0, 1]
    # σ² of the reverse process: 'small', 'large' or 'learned', as in sample.variance. 'auto' is 'learned' if the
    # network has it and η = 1, else 'small'.
    config.likelihood.variance = 'auto'
    config.likelihood.clip = True  # clip the predicted image to [−1, 1], as DDPM's evaluation does
    config.likelihood.rtol = 1e-4  # relative tolerance of the ODE solver
    config.likelihood.atol = 1e-4  # absolute tolerance of the ODE solver
    # Random vectors for the divergence of the flow; 0 computes it exactly; −1: exactly up to 16 dimensions, else 2.
    config.likelihood.probes = -1
    config.likelihood.weights = 'ema'  # which weights
    config.likelihood.step = -1  # the training step whose checkpoint is measured; −1 is the newest
    config.likelihood.folder = ''  # where <name>/ with the results is written; '' is likelihood/ in the workdir
    config.likelihood.batch_size = 100  # images at a time
    config.likelihood.seed = 0  # of the noise, levels and probes

    config.plan = ConfigDict()
    # For --mode=plan: 'here', or devices that need not be here, such as h100:8, a100-80:8x2 (two hosts), tpu-v5e:4x4.
    config.plan.target = 'here'
    config.plan.programs = ('train', 'sample', 'likelihood')  # which programs are compiled
    config.plan.alternatives = False  # also the training step with remat, accumulate, fsdp or the other dtype
    config.plan.largest_batch = False  # also find the largest batch that fits, by compiling several
    config.plan.folder = ''  # where the results are written; '' is plan/ in the workdir

    config.interop = ConfigDict()
    config.interop.source = ''  # for --mode=import_weights: 'diffusers:FOLDER', 'openai:FILE' or 'ddim:FILE'
    # Of 'openai:', use_new_attention_order: 'new' or 'legacy' (False; improved-diffusion's); '' if it has no effect.
    config.interop.attention_order = ''
    # For --mode=export: 'diffusers', or 'arrays', our parameters by name, for any network.
    config.interop.format = 'diffusers'
    config.interop.weights = 'ema'  # for --mode=export: which weights
    config.interop.step = -1  # for --mode=export: of the checkpoint; −1 is the newest
    config.interop.folder = ''  # for --mode=export: where <name>/ is written; '' is export/ in the workdir

    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices over which parameters, EMA and optimizer state are split

    config.distributed = ConfigDict()
    config.distributed.detect = True  # join the hosts that a TPU pod, SLURM, Open MPI or Kubernetes announces
    config.distributed.coordinator = ''  # by hand: host:port of process 0, the same on all hosts
    config.distributed.num_processes = 0  # with coordinator: the number of processes
    config.distributed.process_id = -1  # with coordinator: the number of this process, from 0
    config.distributed.timeout = 100  # seconds without a response from another host after which a host gives up

    # Folder of compiled programs, which is yours alone; '' is $XDG_CACHE_HOME/diffusion/compiled, or that in ~/.cache,
    # unless JAX_COMPILATION_CACHE_DIR names one; 'off' keeps none.
    config.compile_cache = ''

    config.command = ConfigDict()  # set by the command line, for config.json; not shown by --help
    config.command.config = ''  # the config that --config named; '' is that of the run
    config.command.overrides = ()  # the keys that the command line changed

    return config.lock()  # a misspelt key in another config is an error, too
