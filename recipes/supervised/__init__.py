"""Imitation of given responses: supervised fine-tuning, distillation, rejection sampling."""
