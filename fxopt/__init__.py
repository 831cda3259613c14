"""fxopt: compile a trained PyTorch model for the machine it must run on."""
