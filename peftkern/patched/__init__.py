# SPDX-License-Identifier: Apache-2.0
"""What ``peftkern.patch`` puts in front of HF PEFT's classes: copies.py how they are copied and saved, layer.py the
layers, bases.py what they add to, watched.py whether a module inside does more than its forward, batch.py batches whose
items choose an adapter, model.py the models, allocator.py AdaLoRA's rank allocation. No file of this folder imports HF
PEFT at the top: it may not be installed."""
