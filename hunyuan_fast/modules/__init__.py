"""Neural network modules: they own parameters and call the ops; models are built of them."""
