"""Training with PyTorch (extra `train`): fine-tuning, from scratch, distillation. The engine never imports it."""
