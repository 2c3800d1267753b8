"""training: fine-tuning, training from scratch and distillation, with PyTorch (extra `train`). Never imported by the engine"""
