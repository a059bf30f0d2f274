"""Names of the columns of metric frames, and what other people call the same things.

A *step column* has one value per rank and optimizer step. A *sampled* one is looked at every few ticks and NaN in
between. Every other column is a *logged metric*: it belongs to a step but makes none.
"""

from __future__ import annotations

import re

STEP_COLUMNS = (
    "tick",  # outermost optimizer step-calls of this process so far, left out by GradScaler or not: the fence's time
    "loss",  # this rank's loss of the step, unscaled: the primary optimizer's own backward, accumulation parts summed
    "grad_norm",  # total 2-norm of the gradients as the optimizer received them, unscaled, before our clip
    "lr",  # learning rate of the first parameter group as the script set it
    "lr_multiplier",  # what our fixes multiply it with; effective = lr * lr_multiplier
    "step_seconds",  # wall time since the previous step
    "skipped",  # 1 where the in-process guard or a fix kept this update from the weights
    "model",  # times that another optimizer became the primary one: a new model, not comparable with the last
    "num_objectives",  # optimizer step-calls since the last row, its own included, that had a backward of their own:
    # 2 in some rows at least where losses play against each other (GAN, actor and critic); 1 for two optimizers after
    # one backward, and for accumulation; 0 where no backward was seen
    "input_mean",  # mean of the batch's largest floating-point input (of as much of it as is looked at)
    "input_std",  # its standard deviation
    "input_min",
    "input_max",
    "input_nonfinite",  # how many of its elements are NaN or infinite
    "input_score",  # largest robust z over the input's features, against this rank's own recent batches; inf where
    # they were all finite and this one is not, NaN while there are too few of them
    "input_change",  # how far that feature moved: mean, in standard deviations; or standard deviation, |log ratio|
    "input_feature",  # index of that feature; 0 where the input is looked at as a whole
    "samples",  # the first dimension of the batch's largest input, times the parts that it is accumulated of
    "fingerprint",  # 53-bit hash of the batch's inputs: equal on two ranks, equal batches
    "weights_nonfinite",  # at the first of several steps that are not finite: 1 where the weights were not before it
    "batch_nonfinite",  # likewise, 1 where the batch holds a NaN or +inf
    "repeat_differs",  # likewise, 1 where the step came out finite when it was repeated, else 0
    # Where the rest of step_seconds went on this rank, by the host's clock; what cannot be seen is not sent.
    "data_seconds",  # waiting for the batch
    "forward_seconds",  # between batch and backward pass
    "backward_seconds",  # in backward passes, up to this rank's last gradient
    "wait_seconds",  # waiting for other ranks: own time is step_seconds without it
    "optimizer_seconds",
)
SAMPLED_COLUMNS = (
    "layer_ratio",  # gradient norm of the first weight matrix over the last one's
    "first_norm",  # gradient norm of the first weight matrix, unscaled
    "loss_scale",  # the AMP scale in force; at every step that has one
    "num_parts",  # parts in which the batch was run; at every step where it was more than one
    "update_ratio",  # norm of the update over norm of the weights, median over the sampled parameters
    "changed_share",  # share of the sampled parameters that the update changed; those that once had a gradient
    "zero_grad_share",  # share of exactly-zero elements in the sampled gradients, embeddings left out
    "dead_share",  # share of ReLU units that were zero for the whole batch, worst layer
    "saturated_share",  # share of values at the flat ends of tanh and sigmoid, worst hidden layer
    "active_units",  # latent dimensions with Var_x(E[z|x]) > 0.01
    "latent_dims",  # latent dimensions in all
    "kl_per_dim",  # mean KL divergence to the prior per latent dimension, nats
    "orphan_parameters",  # trainable parameters that got a gradient and belong to no optimizer
    "stale_parameters",  # parameters of the optimizer that got no gradient
    "kept_gradients",  # 1 where the last update's gradients were still there when the next backward began, else 0
    "digest",  # 53-bit digest of one chunk of parameters or optimizer state after the update: equal on replicas
    # Which one: even of parameters, odd of optimizer state; 32 more with each new set of optimizers, 2^32 for each part
    # of large tensors.
    "digest_chunk",
    "digest_owed",  # 1 where DDP reduces all gradients on all ranks, so that it must be equal from the first update on
    "frozen_digest",  # the same of one chunk of the model's parameters that no optimizer steps
    "frozen_place",  # which one: 16 more with each new set of optimizers, 2^32 for each part of large tensors
    "local_norm",  # norm of this rank's own gradient before the reduction, unscaled; of several backwards the largest
    "local_nonfinite",  # how many of its elements are NaN or infinite, over all backwards of the step
    "epoch",  # passes over the longest DataLoader, this one included; at every step where somebody counts them
)
DIGEST_CHUNKS = 32
FROZEN_CHUNKS = DIGEST_CHUNKS // 2
DIGEST_PARTS = 1 << 32
COLUMNS = STEP_COLUMNS + SAMPLED_COLUMNS
EVAL_LOSS = "eval_loss"
LOG_PREFIX = "log/"
"""Prefix of the column of a metric that the script logs under a name of its own."""

# Lower case, with "/", "-", "." and spaces as "_". In order of preference where a log has several.
ALIASES: dict[str, tuple[str, ...]] = {
    "loss": (
        *("loss", "train_loss", "training_loss", "loss_train", "train_loss_step", "loss_step", "total_loss"),
        *("train_total_loss", "train_loss_epoch", "loss_epoch", "lm_loss", "actor_pg_loss", "avg_loss", "mean_loss"),
        *("train_avg_loss", "avg_train_loss", "running_loss", "epoch_loss", "cost", "training_cost"),
    ),
    EVAL_LOSS: (
        *("eval_loss", "val_loss", "valid_loss", "validation_loss", "loss_val", "dev_loss", "val_loss_epoch"),
        *("val_total_loss", "avg_val_loss", "val_avg_loss", "loss_valid", "loss_eval", "test_loss", "loss_test"),
    ),
    "lr": ("lr", "learning_rate", "train_lr", "train_learning_rate", "base_lr", "actor_lr"),
    "grad_norm": (
        *("grad_norm", "gradient_norm", "gnorm", "train_grad_norm", "grad_norm_total", "grad_2_0_norm_total"),
        *("total_grad_norm", "actor_grad_norm", "norm"),
    ),
    "loss_scale": ("loss_scale", "grad_scale", "amp_scale"),
}


def plain(name: str) -> str:
    """``train/Loss`` → ``train_loss``: how names are compared."""
    return re.sub(r"[\s/.\-]+", "_", name.strip().lower())


def logged_name(name: str) -> str:
    """The column of a metric that a script logs: `EVAL_LOSS` for what people call so, else ``log/<name>``."""
    return EVAL_LOSS if plain(name) in ALIASES[EVAL_LOSS] else LOG_PREFIX + name
