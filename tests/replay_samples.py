"""Small logs in the style of the programs that write them, by hand, and what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sosa_stream.cli import main

RNG = np.random.default_rng(0)
LOSSES = (1.8 + 2.7 * np.exp(-np.arange(200) / 60) + 0.03 * RNG.standard_normal(200)).tolist()
"""A healthy run's."""


def code_of(*arguments: str) -> int:
    """How ``sosa replay`` ends."""
    try:
        return main(["replay", *arguments])
    except SystemExit as end:  # argparse's way
        return int(end.code or 0)


def csv_of(losses: Sequence[float], first_step: int = 0, name: str = "loss") -> str:
    """A log with a step and a loss in each row."""
    return f"step,{name}\n" + "".join(f"{first_step + i},{loss!r}\n" for i, loss in enumerate(losses))


def sick(losses: Sequence[float] = LOSSES, at: int = 150) -> list[float]:
    """Losses that are NaN from some point on."""
    return [*losses[:at], *[float("nan")] * (len(losses) - at)]


def write(name: str, text: str) -> str:
    """A file below the working directory; its name again."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """``points`` by our names: (step, value), as they must come out."""

    name: str
    text: str
    format: str
    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


NAN = float("nan")

SAMPLES = (
    Sample(
        name="trainer_state.json",
        text="""{
  "best_metric": null, "global_step": 30,
  "log_history": [
    {"epoch": 0.1, "grad_norm": 2.5, "learning_rate": 5e-05, "loss": 2.0, "step": 10},
    {"epoch": 0.2, "grad_norm": NaN, "learning_rate": 4e-05, "loss": NaN, "step": 20},
    {"epoch": 0.2, "eval_loss": 1.75, "eval_runtime": 3.0, "step": 20},
    {"epoch": 0.3, "grad_norm": 1.5, "learning_rate": 3e-05, "loss": 1.5, "step": 30},
    {"epoch": 0.3, "step": 30, "total_flos": 1.0, "train_loss": 1.8, "train_runtime": 9.0}
  ]
}""",
        format="hf",
        points={
            "loss": [(10, 2.0), (20, NAN), (30, 1.5)],
            "grad_norm": [(10, 2.5), (20, NAN), (30, 1.5)],
            "lr": [(10, 5e-5), (20, 4e-5), (30, 3e-5)],
            "eval_loss": [(20, 1.75)],
        },
    ),
    Sample(
        name="keras_history.json",
        text='{"history": {"loss": [2.0, 1.0, 0.5], "val_loss": [2.5, 1.5, 1.75], "accuracy": [0.1, 0.2, 0.3]}}',
        format="json",
        points={"loss": [(1, 2.0), (2, 1.0), (3, 0.5)], "eval_loss": [(1, 2.5), (2, 1.5), (3, 1.75)]},
    ),
    Sample(
        name="rows.json",
        text='[{"epoch": 0, "train": {"loss": 2.0}, "val": {"loss": 2.5}}, {"epoch": 1, "train": {"loss": 1.0}}]',
        format="json",
        points={"loss": [(0, 2.0), (1, 1.0)], "eval_loss": [(0, 2.5)]},
    ),
    Sample(
        name="printed_history.json",
        text="{'loss': [2.0, nan], 'val_loss': [2.5, 1.5]}\n",
        format="json",
        points={"loss": [(1, 2.0), (2, NAN)], "eval_loss": [(1, 2.5), (2, 1.5)]},
    ),
    Sample(
        name="lightning/metrics.csv",
        text="""epoch,lr-Adam,step,train_loss_epoch,train_loss_step,val_loss
,0.001,0,,,
0,,49,,2.0,
0,,99,,1.5,
0,,99,,,1.75
0,,99,1.8,,
,0.0005,100,,,
1,,149,,1.25,
""",
        format="csv",
        points={
            "loss": [(49, 2.0), (99, 1.5), (149, 1.25)],
            "lr": [(49, 1e-3), (99, 1e-3), (149, 5e-4)],
            "eval_loss": [(99, 1.75)],
        },
    ),
    Sample(
        name="ultralytics/results.csv",
        text="""                  epoch,         train/box_loss,         train/cls_loss,           val/box_loss,           val/cls_loss,                 lr/pg0,                 lr/pg1
                      1,                      1,                      2,                    1.5,                    2.5,                  0.001,                  0.002
                      2,                    0.5,                      1,                   1.25,                   2.25,                 0.0005,                  0.001
""",
        format="csv",
        points={"loss": [(1, 3.0), (2, 1.5)], "eval_loss": [(1, 4.0), (2, 3.5)], "lr": [(1, 1e-3), (2, 5e-4)]},
    ),
    Sample(
        name="algoperf/measurements.csv",
        text="""global_step,grad_norm,loss,train/loss,validation/loss,score
0,6.5,7.0,,,
1,,,6.75,6.875,21.5
1,5.5,6.5,,,
100,4.5,,,,
""",
        format="csv",
        points={"loss": [(0, 7.0), (1, 6.5)], "grad_norm": [(0, 6.5), (1, 5.5), (100, 4.5)], "eval_loss": [(1, 6.875)]},
    ),
    Sample(
        name="decimal_commas.csv",
        text="Step;Train Loss;Valid Loss\n1;2,5;2,75\n2;1,5;\n",
        format="csv",
        points={"loss": [(1, 2.5), (2, 1.5)], "eval_loss": [(1, 2.75)]},
    ),
    Sample(
        name="one_column.csv",
        text="loss\n3.0\n2.0\n1.0\n",
        format="csv",
        points={"loss": [(1, 3.0), (2, 2.0), (3, 1.0)]},
    ),
    Sample(
        name="tensors.csv",
        text="step\tloss\tnote\n1\t\"tensor(2.5, device='cuda:0')\"\tfirst\n2\tnan\t\n",
        format="csv",
        points={"loss": [(1, 2.5), (2, NAN)]},
    ),
    Sample(
        name="wandb.jsonl",
        text="""{"_step": 0, "train": {"loss": 2.0, "lr": 0.001}, "tags": ["a"]}
{"_step": 1, "val": {"loss": 2.25}}
not json
{"_step": 2, "train": {"loss": NaN, "lr": 0.001}}
{"_step": 3, "train": {"loss": 1.0, "l""",
        format="jsonl",
        points={"loss": [(0, 2.0), (2, NAN)], "lr": [(0, 1e-3), (2, 1e-3)], "eval_loss": [(1, 2.25)]},
    ),
    Sample(
        name="nanogpt.txt",
        text="""Overriding config with config/train_gpt2.py:
step 0: train loss 10.9886, val loss 10.9898
iter 0: loss 10.9856, time 41234.12ms, mfu -100.00%
iter 10: loss 9.5, time 389.10ms, mfu 42.31%
step 10: train loss 9.25, val loss 9.125
iter 20: loss nan, time 389.10ms, mfu 42.31%
""",
        format="text (nanoGPT)",
        points={"loss": [(0, 10.9856), (10, 9.5), (20, NAN)], "eval_loss": [(0, 10.9898), (10, 9.125)]},
    ),
    Sample(
        name="build_nanogpt.txt",
        text="""using device: cuda
validation loss: 10.9522
step     0 | loss: 10.955 | lr 6.0000e-04 | norm: 15.342 | dt: 19152.47ms | tok/sec: 27374.43
step     1 | loss: 10.0149 | lr 6.0000e-04 | norm: 3.8393 | dt: 394.95ms | tok/sec: 1327465.30
rank 0 sample 0: Hello, I'm a language model, you can't step 5 over me
step     2 | loss: 9.3442 | lr 6.0000e-04 | norm: 2.0221 | dt: 399.41ms | tok/sec: 1312662.41
validation loss: 9.25
""",
        format="text (llm.c)",
        points={
            "loss": [(0, 10.955), (1, 10.0149), (2, 9.3442)],
            "lr": [(0, 6e-4), (1, 6e-4), (2, 6e-4)],
            "grad_norm": [(0, 15.342), (1, 3.8393), (2, 2.0221)],
            "eval_loss": [(0, 10.9522), (2, 9.25)],
        },
    ),
    Sample(
        name="llmc_main.log",
        text="s:0 tel:11.0\ns:0 trl:10.9 lr:0.0001 norm:15.5\ns:1 trl:10.5 lr:0.0002 norm:5.5\ns:1 tel:10.75\n"
        "s:2 trl:10.0 lr:0.0003 norm:4.5\n",
        format="text (llm.c)",
        points={"loss": [(0, 10.9), (1, 10.5), (2, 10.0)], "eval_loss": [(0, 11.0), (1, 10.75)]},
    ),
    Sample(
        name="modded_nanogpt.txt",
        text="""step:0/6000 val_loss:11.0149 train_time:305ms step_avg:nanms
step:1/6000 train_loss:11.0091 train_time:24179ms step_avg:nanms
step:2/6000 train_loss:11.0001 train_time:24523ms step_avg:343.30ms
step:2/6000 val_loss:10.9 train_time:24523ms step_avg:343.30ms
""",
        format="text (modded-nanogpt)",
        points={"loss": [(1, 11.0091), (2, 11.0001)], "eval_loss": [(0, 11.0149), (2, 10.9)]},
    ),
    Sample(
        name="detectron2.txt",
        text="""[11/17 15:16:13] detectron2 INFO: Rank of current process: 0. World size: 6
[11/17 15:16:42] d2.utils.events INFO:  eta: 21:12:23  iter: 19  total_loss: 0.4109  loss_cls: 0.2853  loss_box_reg: 0.0985  time: 0.6826  lr: 0.00019981  max_mem: 11810M
[11/17 15:16:55] d2.utils.events INFO:  eta: 21:12:09  iter: 39  total_loss: 0.3992  loss_cls: 0.2716  loss_box_reg: 0.1011  time: 0.6832  lr: 0.00039961  max_mem: 11811M
""",
        format="text (detectron2)",
        points={"loss": [(19, 0.4109), (39, 0.3992)], "lr": [(19, 0.00019981), (39, 0.00039961)]},
    ),
    Sample(
        name="mmengine.txt",
        text="""2023/01/01 10:00:00 - mmengine - INFO - Epoch(train)  [1][ 50/100]  lr: 1.0e-02  eta: 1:00:00  time: 0.5  loss: 2.5  grad_norm: 3.5
2023/01/01 10:00:20 - mmengine - INFO - Epoch(train)  [1][100/100]  lr: 1.0e-02  eta: 1:00:00  time: 0.5  loss: 2.0  grad_norm: 3.0
2023/01/01 10:01:00 - mmengine - INFO - Epoch(train)  [2][ 50/100]  lr: 1.0e-03  eta: 1:00:00  time: 0.5  loss: 1.5  grad_norm: 2.5
""",
        format="text (mmengine)",
        points={
            "loss": [(50, 2.5), (100, 2.0), (150, 1.5)],
            "grad_norm": [(50, 3.5), (100, 3.0), (150, 2.5)],
            "lr": [(50, 1e-2), (100, 1e-2), (150, 1e-3)],
        },
    ),
    Sample(
        name="hf_stdout.txt",
        text="""  0%|          | 0/30 [00:00<?, ?it/s]
 33%|███▎      | 10/30 [00:10<00:20,  1.00s/it]{'loss': 2.0, 'grad_norm': 2.5, 'learning_rate': 5e-05, 'epoch': 0.1}
{'loss': '1.5', 'grad_norm': 'nan', 'learning_rate': '4e-05', 'epoch': '0.2'}
{'eval_loss': 1.75, 'eval_runtime': 3.0, 'epoch': 0.2}
{'loss': 1.25, 'grad_norm': 1.5, 'learning_rate': 3e-05, 'epoch': 0.3}
{'train_runtime': 9.0, 'train_loss': 1.8, 'epoch': 0.3}
""",
        format="text (Hugging Face)",
        points={
            "loss": [(1, 2.0), (2, 1.5), (3, 1.25)],
            "grad_norm": [(1, 2.5), (2, NAN), (3, 1.5)],
            "lr": [(1, 5e-5), (2, 4e-5), (3, 3e-5)],
            "eval_loss": [(2, 1.75)],
        },
    ),
    Sample(
        name="word_language_model.txt",
        text="""| epoch   1 |   200/  500 batches | lr 20.00 | ms/batch 12.12 | loss  7.64 | ppl  2079.22
| epoch   1 |   400/  500 batches | lr 20.00 | ms/batch 12.06 | loss  6.87 | ppl   960.57
-----------------------------------------------------------------------------------------
| end of epoch   1 | time: 36.96s | valid loss  5.60 | valid ppl   271.23
| epoch   2 |   200/  500 batches | lr 5.00 | ms/batch 12.03 | loss  6.49 | ppl   657.14
""",
        format="text (word_language_model)",
        points={
            "loss": [(200, 7.64), (400, 6.87), (700, 6.49)],
            "lr": [(200, 20.0), (400, 20.0), (700, 5.0)],
            "eval_loss": [(400, 5.6)],
        },
    ),
    Sample(
        name="tqdm.txt",
        text="Epoch 1:   0%|          | 0/3 [00:00<?, ?it/s, loss=9.0]\r"
        "Epoch 1:  33%|███▎      | 1/3 [00:01<00:02,  1.0it/s, loss=9.0]\r"
        "Epoch 1:  33%|███▎      | 1/3 [00:01<00:02,  1.0it/s, loss=3.0, lr=1e-3]\r"
        "Epoch 1: 100%|██████████| 3/3 [00:03<00:00,  1.0it/s, loss=2.0, lr=1e-3]\n"
        "Validation: 100%|██████████| 2/2 [00:03<00:00,  1.0it/s, loss=2.5]\n"
        "Epoch 2:  33%|███▎      | 1/3 [00:01<00:02,  1.0it/s, loss=1.0, lr=1e-3]\r",
        format="text (progress bar)",
        points={"loss": [(1, 3.0), (3, 2.0), (4, 1.0)], "eval_loss": [(3, 2.5)]},
    ),
    Sample(
        name="verl.txt",
        text="""(TaskRunner pid=1234) step:1 - global_seqlen/mean:512.0 - actor/pg_loss:0.25 - actor/grad_norm:np.float64(1.5) - actor/lr:1e-06
(TaskRunner pid=1234) step:2 - global_seqlen/mean:512.0 - actor/pg_loss:-0.125 - actor/grad_norm:np.float64(2.5) - actor/lr:1e-06
""",
        format="text (verl)",
        points={"loss": [(1, 0.25), (2, -0.125)], "grad_norm": [(1, 1.5), (2, 2.5)], "lr": [(1, 1e-6), (2, 1e-6)]},
    ),
    Sample(
        name="keras_fit.txt",
        text="""Epoch 1/3
1405/1407 [============================>.] - ETA: 0s - loss: 1.8953 - accuracy: 0.3240
1407/1407 [==============================] - 9s 5ms/step - loss: 2.0 - accuracy: 0.2742 - val_loss: 1.75 - val_accuracy: 0.3858 - lr: 0.0100
Epoch 2/3
1407/1407 [==============================] - 9s 5ms/step - loss: 1.5 - accuracy: 0.2742 - val_loss: 1.25 - val_accuracy: 0.3858 - lr: 0.0050
313/313 [==============================] - 0s 1ms/step - loss: 0.5 - accuracy: 0.9
Epoch 3/3
1407/1407 ━━━━━━━━━━━━━━━━━━━━ 9s 5ms/step - accuracy: 0.2742 - loss: 1.0 - val_accuracy: 0.3858 - val_loss: 0.75
""",
        format="text (Keras)",
        points={"loss": [(1, 2.0), (2, 1.5), (3, 1.0)], "eval_loss": [(1, 1.75), (2, 1.25), (3, 0.75)]},
    ),
    Sample(
        name="cyclegan_loss_log.txt",
        text="""================ Training Loss (Mon Jan  1 10:00:00 2024) ================
(epoch: 1, iters: 100, time: 0.5, data: 0.25) D_A: 0.25 G_A: 0.5 cycle_A: 1.0 D_B: 0.25 G_B: 0.25 cycle_B: 1.5
(epoch: 1, iters: 200, time: 0.5, data: 0.25) D_A: 0.25 G_A: 0.5 cycle_A: 0.5 D_B: 0.25 G_B: 0.25 cycle_B: 1.5
(epoch: 2, iters: 50, time: 0.5, data: 0.25) D_A: 0.25 G_A: 0.5 cycle_A: 0.5 D_B: 0.25 G_B: 0.25 cycle_B: 0.5
""",
        format="text (CycleGAN)",
        points={"loss": [(100, 3.25), (200, 2.75), (300, 1.75)]},
    ),
    Sample(
        name="megatron.txt",
        text=""" iteration      100/  500000 | consumed samples:        25600 | elapsed time per iteration (ms): 512.3 | learning rate: 1.500E-04 | global batch size:   256 | lm loss: 6.112E+00 | loss scale: 1.0 | grad norm: 2.312 | number of skipped iterations:   0 |
 iteration      200/  500000 | consumed samples:        51200 | elapsed time per iteration (ms): 512.3 | learning rate: 1.500E-04 | global batch size:   256 | lm loss: 5.112E+00 | loss scale: 1.0 | grad norm: 1.312 | number of skipped iterations:   0 |
 validation loss at iteration 200 | lm loss value: 5.25 | lm loss PPL: 190.0 |
""",
        format="text (Megatron-LM)",
        points={
            "loss": [(100, 6.112), (200, 5.112)],
            "grad_norm": [(100, 2.312), (200, 1.312)],
            "lr": [(100, 1.5e-4), (200, 1.5e-4)],
            "loss_scale": [(100, 1.0), (200, 1.0)],
            "eval_loss": [(200, 5.25)],
        },
    ),
    Sample(
        name="fairseq.txt",
        text="""2020-01-01 10:00:00 | INFO | train_inner | epoch 001:    100 / 1000 loss=12.5, nll_loss=12.25, ppl=5000, wps=1000, num_updates=100, lr=1e-05, gnorm=3.5, loss_scale=128
2020-01-01 10:01:00 | INFO | train_inner | epoch 001:    200 / 1000 loss=11.5, nll_loss=11.25, ppl=5000, wps=1000, num_updates=200, lr=2e-05, gnorm=2.5, loss_scale=128
2020-01-01 10:02:00 | INFO | valid | epoch 001 | valid on 'valid' subset | loss 11.75 | nll_loss 11.5 | ppl 3000 | num_updates 200
""",
        format="text (fairseq)",
        points={
            "loss": [(100, 12.5), (200, 11.5)],
            "grad_norm": [(100, 3.5), (200, 2.5)],
            "lr": [(100, 1e-5), (200, 2e-5)],
            "eval_loss": [(200, 11.75)],
        },
    ),
    Sample(
        name="by_hand.txt",
        text="""Training on cuda
Epoch [1/3], Loss: 2.5000, Val Loss: 2.7500
Epoch [2/3], Loss: tensor(1.5000, device='cuda:0'), Val Loss: 1.7500
\x1b[32mEpoch [3/3], Loss: 1.0000, Val Loss: 1.2500\x1b[0m
""",
        format="text (plain text)",
        points={"loss": [(1, 2.5), (2, 1.5), (3, 1.0)], "eval_loss": [(1, 2.75), (2, 1.75), (3, 1.25)]},
    ),
    Sample(
        name="over_lines.txt",
        text="Epoch 1/2\nTrain Loss: 2.5 Acc: 0.5\nVal Loss: 2.75 Acc: 0.5\n"
        "Epoch 2/2\nTrain Loss: 1.5 Acc: 0.5\nVal Loss: 1.75 Acc: 0.5\n",
        format="text (plain text)",
        points={"loss": [(1, 2.5), (2, 1.5)], "eval_loss": [(1, 2.75), (2, 1.75)]},
    ),
    Sample(
        name="batches.txt",
        text="Epoch: 001/002 | Batch 0000/0100 | Loss: 2.5\nEpoch: 001/002 | Batch 0050/0100 | Loss: 2.0\n"
        "Epoch: 001/002 | Train: 18.59%\nEpoch: 002/002 | Batch 0000/0100 | Loss: 1.5\n"
        "Epoch: 002/002 | Batch 0050/0100 | Loss: 1.0\n",
        format="text (plain text)",
        points={"loss": [(0, 2.5), (50, 2.0), (100, 1.5), (150, 1.0)]},
    ),
    Sample(
        name="cost.txt",
        text="Cost after iteration 0: 0.75\nCost after iteration 100: 0.5\nCost after iteration 200: 0.25\n",
        format="text (plain text)",
        points={"loss": [(0, 0.75), (100, 0.5), (200, 0.25)]},
    ),
    Sample(
        name="mnist.txt",
        text="""Train Epoch: 1 [0/60000 (0%)]\tLoss: 2.300039
Train Epoch: 1 [640/60000 (1%)]\tLoss: 1.213470
Train Epoch: 1 [59520/60000 (99%)]\tLoss: 0.123456

Test set: Average loss: 0.0512, Accuracy: 9830/10000 (98%)

Train Epoch: 2 [0/60000 (0%)]\tLoss: 0.102511
Train Epoch: 2 [640/60000 (1%)]\tLoss: nan

Test set: Average loss: nan, Accuracy: 980/10000 (10%)
""",
        format="text (PyTorch's MNIST)",
        points={
            "loss": [(0, 2.300039), (640, 1.21347), (59520, 0.123456), (60000, 0.102511), (60640, NAN)],
            "eval_loss": [(59520, 0.0512), (60640, NAN)],
        },
    ),
)
