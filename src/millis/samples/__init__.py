"""Files of samples, read alike wherever they are used: by training, evaluation and cleaning."""
