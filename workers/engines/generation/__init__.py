"""Engines that generate: vLLM and transformers behind one interface."""
