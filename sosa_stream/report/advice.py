"""What a person can do about each kind of incident, the likeliest to help first."""

from __future__ import annotations

from collections.abc import Mapping

ADVICE: Mapping[str, tuple[str, ...]] = {
    "nan_loss": (
        "go back to a checkpoint from before it: weights that are not finite do not come back",
        "look at the batch of that step; drop rows that are not finite, and add an epsilon in log, sqrt and division",
        "clip gradients (clip_grad_norm_), and lower the learning rate if the norm rose before",
    ),
    "nonfinite_gradient": (
        "go back to a checkpoint from before it, if the update went through",
        "torch.autograd.set_detect_anomaly(True) from a checkpoint names the operation",
        "in half precision: a GradScaler, or bfloat16",
    ),
    "lr_jump": (
        "print the schedule over all steps, and compare it with the curve of the learning rate in this report",
        "load the scheduler's state where the run was resumed; count its steps as it is stepped, by batch or by epoch",
        "go on from a checkpoint from before the jump, at the rate of before",
    ),
    "loss_spike": (
        "look at the batch of that step; if it comes back in every epoch, it is the data",
        "clip gradients, or lower the learning rate a little if spikes become more",
    ),
    "loss_divergence": (
        "go back to a checkpoint from before it, with a third of the learning rate",
        "if it began with the first steps: a tenth of the rate, or a warm-up; `sosa doctor` measures which rate works",
        "clip gradients",
    ),
    "loss_oscillation": (
        "lower the learning rate or the momentum",
        "shuffle: a swing as long as an epoch comes from the order of the data",
    ),
    "loss_plateau": (
        "`sosa doctor -- SCRIPT`: can one batch be learned, does every parameter get a gradient, which rate works",
        "where the rate fell before it: raise it again, or let it fall later",
    ),
    "overfitting": (
        "keep the weights of the lowest validation loss, and stop there",
        "more data or augmentation, dropout, weight decay, a smaller model",
    ),
    "exploding_gradient": (
        "clip gradients at a few times their usual norm",
        "lower the learning rate; look at the batch of that step",
    ),
    "vanishing_gradient": (
        "normalisation layers, residual connections, an initialisation made for the activation",
        "look for detach(), no_grad() or an operation without a gradient behind the layers that are named",
    ),
    "dead_units": (
        "go back to a checkpoint from before it, at a lower learning rate: dead units do not come back",
        "LeakyReLU or GELU, or an initialisation with smaller biases",
    ),
    "saturated_activations": ("normalise the inputs, or put a normalisation layer before tanh or sigmoid",),
    "loss_scale_collapse": (
        "bfloat16 instead of float16, or the overflowing operation in float32",
        "clip gradients after unscaling; look for the first layer whose gradient is not finite",
    ),
    "weights_unchanged": (
        "give the optimizer the parameters that are trained, after the model is made and moved",
        "look at the learning rate, the bound of the clipping, and at what is frozen or detached",
    ),
    "missing_zero_grad": ("call optimizer.zero_grad() once for each optimizer.step()",),
    "input_anomaly": (
        "print the feature that is named over the batches around that step, and mend where it is read",
        "check that training and validation data pass through the same normalisation",
    ),
    "duplicate_data": (
        "DistributedSampler, with set_epoch() in each epoch; different seeds where workers draw random numbers",
    ),
    "data_stall": ("more DataLoader workers, prefetching, faster storage; `sosa doctor` measures what workers gain",),
    "straggler": (
        "look at the host that is named: clocks, temperature, other processes, its storage",
        "give all ranks as much data; leave the host out if it stays slow",
    ),
    "posterior_collapse": (
        "lower the weight of the KL term, warm it up, or let each dimension have some nats for free",
        "a weaker decoder; `sosa latent CHECKPOINT` shows which dimensions are left",
    ),
    "oom": (
        "a smaller micro batch with as many more accumulation steps",
        "activation checkpointing, sharded optimizer state; the report says what held the memory",
    ),
    "shape_mismatch": ("print the shapes before the line that is named; sizes of module and input must agree",),
    "exception": ("the traceback ends in the line that failed; the batch and the step are named above",),
    "silent_corruption": (
        "take the host that is named out, and test its memory and processor",
        "go back to a checkpoint from before it",
    ),
    "rank_desync": (
        "resync from the majority, or go back to a checkpoint from before it",
        "look for random numbers, branches and buffers that differ between ranks",
    ),
    "hang": (
        "read the stacks: the rank that is not in the collective is the one that hangs, and its line is named",
        "look for branches that only some ranks take around collectives, and for slow storage",
    ),
    "rank_lost": (
        "read how it ended: SIGKILL is most often the host's memory, SIGSEGV a library",
        "torchrun --max-restarts, with checkpoints that the script loads when it starts",
    ),
    "memory_leak": (
        "look for tensors with their graph in lists and sums: loss.item(), detach()",
        "tracemalloc shows which line of Python allocates",
    ),
}
