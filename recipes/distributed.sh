#!/bin/sh
# A fit on several processes, each with a part of every batch, and a dense export whose shards they divide among themselves. On
# several machines give torchrun its --nnodes and --rdzv-endpoint, and put --out where all of them see it.
set -e
torchrun --nproc-per-node 2 -m wlora_merge fit --base HuggingFaceTB/SmolLM2-135M-Instruct --adapter first=./adapters/first --adapter second=./adapters/second --data shots.jsonl --task causal-lm --batch-size 16 --out mixture
torchrun --nproc-per-node 2 -m wlora_merge export mixture --format dense --out served
wlora-merge verify served
