"""Engines that train: FSDP2 and DeepSpeed behind one interface."""
